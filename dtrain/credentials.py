"""What must not reach others by what is kept or passed on: passwords in addresses, keys and tokens in settings."""

import re
from typing import Any

MASK = "•••"
_SECRET_KEY = re.compile(
    r"(^|[_.\-])(password|passwd|passphrase|pwd|secrets?|tokens?|credentials?|authorization|auth|cookie|signature|"
    r"(api|access|account|private|storage|ssh|aws)_?keys?(_id)?)($|[_.\-])",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"(\b[a-z][a-z0-9+.\-]*://)[^\s/@]*(?:@[^\s/@]*)*@", re.IGNORECASE)
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.\-]*://[^\s?#\"']*)[?#][^\s\"'<>]*", re.IGNORECASE)
_PIPE = re.compile(r"\bpipe:(?!•).*", re.DOTALL)  # to the end of the value: a command may say anything
_BEARER = re.compile(r"\b(bearer|basic|token)\s+[\w.~+/\-]{8,}=*", re.IGNORECASE)
_KNOWN = re.compile(r"\b(AKIA[0-9A-Z]{16}|gh[pousr]_\w{20,}|hf_\w{20,}|sk-[\w\-]{20,}|glpat-[\w\-]{15,})")
_USER = re.compile(r"//[^\s/]*@")


def without_credentials(text: str) -> str:
    """`text` with `https://user:password@host` shown as `https://host`, in every address it has."""
    return _USER.sub("//", text)


def redacted(text: Any) -> str:
    """`text` without user and password of an address, its query, the command of a `pipe:`, and well-known tokens."""
    text = _PIPE.sub(f"pipe:{MASK}", str(text))
    text = _QUERY.sub(rf"\1?{MASK}", _LOGIN.sub(r"\1", text))
    return _KNOWN.sub(MASK, _BEARER.sub(rf"\1 {MASK}", text))


def is_secret(key: str) -> bool:
    """Whether a dotted config key names something that is nobody's business."""
    return bool(_SECRET_KEY.search(re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key)))


def masked(tree: Any, key: str = "") -> Any:
    """Plain data with the values of secret keys masked and all its strings redacted."""
    if isinstance(tree, dict):
        return {str(k): masked(v, str(k)) for k, v in tree.items()}
    if tree is not None and is_secret(key):
        return MASK
    if isinstance(tree, list | tuple):
        return [masked(v, key) for v in tree]
    return redacted(tree) if isinstance(tree, str) else tree
