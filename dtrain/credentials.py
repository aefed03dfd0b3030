"""Addresses as they may be shown and kept: without the user and password that some carry."""

import re

_USER = re.compile(r"//[^\s/]*@")


def without_credentials(text: str) -> str:
    """`text` with `https://user:password@host` shown as `https://host`, in every address it has."""
    return _USER.sub("//", text)
