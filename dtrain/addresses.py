"""Addresses with credentials: a config holds and keeps them without, and who opens one asks here for the rest.

Where a login or a query comes from, the first that has it: the address as this process was given it, in a config or on
its command line; an address in DTRAIN_CREDENTIALS, several separated by spaces, each for all that lies below it; a
login of a web server from the netrc file (NETRC, else ~/.netrc). So a command that finds a run's shards by the config
that the run keeps needs one of the last two.
"""

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from urllib.parse import quote

from dtrain.credentials import MASK, Address, is_secret, parts, without_login_and_query

VARIABLE = "DTRAIN_CREDENTIALS"
_given: dict[str, str] = {}  # address without login and query → as this process was given it
_lock = threading.Lock()
# By place, what the queries of the config that is being read ask for.
_of_config: ContextVar[dict[str, list[str]] | None] = ContextVar("_of_config", default=None)
# What stands in signed queries and changes with a new signature: of S3 and GCS, of Azure, of CDNs.
_SIGNED = re.compile(
    r"x-(amz|goog|oss)-.+|s[eiprstv]|srt|spr|sip|sdd|scid|sk(oid|tid|[tesv])|s[au]oid|"
    r"expires|policy|key-pair-id|(aws|oss)accesskeyid|googleaccessid",
    re.IGNORECASE,
)


@contextmanager
def one_config() -> Iterator[None]:
    """While a config is read: `kept` raises ValueError for two addresses that it could not tell apart afterwards."""
    token = _of_config.set({})
    try:
        yield
    finally:
        _of_config.reset(token)


def kept(address: str) -> str:
    """`address` without login and query, which this process has from now on for all that lies below it.

    What is no URL comes back as it is, the command of a `pipe:` too.
    """
    if "://" not in address or address.startswith("pipe:"):
        return address
    clean = without_login_and_query(address)
    if clean != address:
        _check_distinct(clean, parts(address).query)
        with _lock:
            _given[_place(clean)] = address
    return clean


def _check_distinct(clean: str, query: str | None) -> None:
    others, asked = _of_config.get(), _asked(query)
    if others is not None and query not in (None, MASK) and others.setdefault(_place(clean), asked) != asked:
        raise ValueError(
            f"{clean} is given twice, with queries that ask for different things, and a run keeps no query: the one "
            "would be read for the other; give each its own path"
        )


def _asked(query: str | None) -> list[str]:
    """A query's parameters without a signature."""
    given = [one for one in re.split(r"[&;]", query or "") if one]
    return sorted(one for one in given if not is_secret(n := one.partition("=")[0]) and not _SIGNED.fullmatch(n))


def complete(address: str) -> str:
    """`address` with the login and the query that belong to it, as far as they are known."""
    own = None if address.startswith("pipe:") else parts(address)
    if own is None or without_login_and_query(address) != address:
        return address
    place = _place(address)
    for known, given in _known():
        if place == known:
            return _joined(own, parts(given)) if _is_web(own) else given
        if place.startswith(f"{known.rstrip('/')}/"):
            return _joined(own, parts(given))
    if own.query is None and _is_web(own) and (login := _of_netrc(own.rest)):
        return _joined(own, Address(own.scheme, login, own.rest, None))
    return address


def environment() -> dict[str, str]:
    """What a process started by this one needs to open what this one can open."""
    known = [re.sub(r"\s", lambda m: quote(m[0]), given) for _, given in _known()]
    return {VARIABLE: " ".join(known)} if known else {}


def _known() -> Iterator[tuple[str, str]]:
    """Places and the addresses that this process knows with more, the nearest first."""
    with _lock:
        given = dict(_given)
    lent = os.environ.get(VARIABLE, "").split()
    both = {_place(without_login_and_query(one)): one for one in lent if parts(one)} | given
    yield from sorted(both.items(), key=lambda item: -len(item[0]))


def _is_web(address: Address) -> bool:
    return address.scheme.lower() in ("http", "https")


def _place(clean: str) -> str:
    return clean.removesuffix(f"?{MASK}").replace(" ", "%20")


def _joined(own: Address, given: Address) -> str:
    login = own.login if given.login is None else given.login
    login = "" if login is None else f"{quote(login, safe=_LOGIN)}@"
    return f"{own.scheme}://{login}{own.rest}{f'?{given.query}' if given.query else ''}"


_LOGIN = ":%!$&'()*+,;=~"  # what a login in a URL may hold as it is


def _of_netrc(rest: str) -> str | None:
    from netrc import NetrcParseError, netrc

    host = rest.split("/")[0].rpartition(":")[0] or rest.split("/")[0]
    try:
        found = netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, NetrcParseError):
        return None
    return f"{quote(found[0] or found[1] or '', safe='')}:{quote(found[2] or '', safe='')}" if found else None
