"""What must not reach others by what is kept, sent or printed: logins and queries of addresses, keys, tokens.

`redacted` cleans text and `masked` plain data; all that a run leaves goes through one of them: the config as it is
kept, errors, the journal, params, differences of the code, the report. They know the shapes of secrets and the names
that secrets are given. A password under an innocent name in a program of the user's is not known by either.
"""

import os
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

MASK = "•••"
_SECRET_KEY = re.compile(
    r"password|passwd|passphrase|secret|credential|"
    r"(^|[_.\-])(pass|pwd|tokens?|authorization|auth|bearer|jwt|cookie|signature|sig|sas|"
    r"(api|access|account|private|storage|ssh|aws|shared_access|encryption)[_\-]?keys?([_\-]id)?)($|[_.\-])",
    re.IGNORECASE,
)
# Every name of those, and of keys, has one of these.
_STEM = re.compile(r"pass|pwd|secret|credential|token|auth|bearer|jwt|cookie|sig|sas|key", re.IGNORECASE)
# To the next address, where several stand in a row.
_ADDRESS = re.compile(
    r"\b[a-z][a-z0-9+.\-]{0,30}://(?:(?!(?<![a-z0-9])[a-z][a-z0-9+.\-]{0,30}://)[^\s\"'<>`])*", re.IGNORECASE
)
_QUOTE_IN_LOGIN = re.compile(
    r"(\b[a-z][a-z0-9+.\-]{0,30}://)[^\s/@\"'<>`]*[\"'<>`][^\s/@]*(?:@[^\s/@]*)*@", re.IGNORECASE
)
# Not behind a port: `http://host:5000 is away, ask me@host` is prose.
_SPACE_IN_LOGIN = re.compile(
    r"(\b[a-z][a-z0-9+.\-]{0,30}://)[^\s/@:\"'<>`]+:(?!\d{1,5}\b)[^\s/@\"'<>`]+"
    r"(?: [^\s/@\"'<>`]{0,100}){1,4}@(?=[\w\[])",
    re.IGNORECASE,
)
# To the end of the text, or of the quotes it stands in: a command may say anything.
_PIPE = re.compile(r"([\"'`])pipe:(?=[^\s•\"'`]).*\1|\bpipe:(?=[^\s•\"'`]).*", re.DOTALL)
_WEB = re.compile(r"https?|wss?", re.IGNORECASE)
_BY_WEB = re.compile(r"(.+\+)?(https?|wss?)", re.IGNORECASE)  # git+https://TOKEN@host
_DATABASE = re.compile(
    r"(sqlite|postgres|postgresql|mysql|mariadb|mssql|oracle|cockroachdb|redis|rediss|mongodb|amqp)(\+.*)?",
    re.IGNORECASE,
)
_PORT = re.compile(r"\d{1,5}")
_HOST = re.compile(r"[\w\-]+(\.[\w\-]+)+(:\d+)?|localhost(:\d+)?|\[.*\](:\d+)?|[\w.\-]+:\d+", re.IGNORECASE)
_USER_KEY = re.compile(r"user(name)?|uid|login", re.IGNORECASE)
_HEADER = re.compile(
    r"((?:proxy-)?authorization[\"']?\s*[:=](?>\s*(?:[rbfu]{0,2}[\"'])?))(?!•)[^\"'\n]+", re.IGNORECASE
)
_COOKIE = re.compile(r"\b((?:set-)?cookie:\s*)(?!\s*•)[^\"'\n]+", re.IGNORECASE)
_BEARER = re.compile(r"\b(bearer|basic|token)\s+(?=\S*\d)[\w.~+/\-]{8,}=*", re.IGNORECASE)
_OPTION = re.compile(r"(?<![\w\-])(--([\w\-]+)[ =])(?!•)(\"[^\"\n]*\"|'[^'\n]*'|[^\s\"';]+)")
_LOGIN_OPTION = re.compile(r"(\s(?:-u|--user|--proxy-user)[ =]?[\"']?)[^\s:\"']+:[^\s\"']+")
# The name starts where no longer one does: a long line is searched once.
_NAME = r"(?<![\w.\-])([\w.\-]*\w)"
# What stands before a value: the value is looked at only where the name is secret, as most of a long line is not.
# `"key": "value"`, `key = "value"`, `["key"] = "value"`, `("key", "value")`, `key: str = "value"`
_QUOTED = re.compile(
    rf"{_NAME}([\"']?\]?\s*(?::|=>?)\s*|[\"']\s*,\s*|\s*:\s*[\w\[\]|. ]+=\s*)[rbfu]{{0,2}}(?!.•)(?=[\"'])"
)
_TEXT = re.compile(r"\"(?:[^\"\\\n]|\\.)*\"|'(?:[^'\\\n]|\\.)*'")
# `key=value`, and `key: value` where the value has a digit: prose has colons too.
_BARE = re.compile(rf"{_NAME}(=(?!=)|:\s+(?=[^\s\"']*\d))(?!\(?•)(?=[^\s&\"'])")
_WORD = re.compile(r"[^\s&\"']{0,4000}[^\s&\"',;)\]}]")
_LONG_WORD = re.compile(r"[\w\-+/~]{12,4000}=*(?=[,;)\]}]*(?:[\s&\"']|$))")
_PAIR = re.compile(r"\b(auth\s*=\s*\()(?=[\"'])[^)\n]*\)")  # of requests: user and password
_NETRC = re.compile(r"(\bmachine\s+\S+(?:\s+\S+\s+\S+)??\s+password\s+)(?!•)\S+")
_HEADER_OPTION = re.compile(r"([\"'])([\w\-]+)(:\s*)(?![\s•])[^\"'\n]+\1")
_LONG = re.compile(r"(?=.*\d)(?=.*[A-Za-z])[\w\-+/~]{12,}=*")
# `wandb_key`, `hf_key`: a key of a service, where the value looks like one.
_SOME_KEY = re.compile(r"(?:\w[_\-]key|[a-z]Key|[A-Z]_?KEY)$")
_OF_NO_SERVICE = {"run_key"}  # by which the journal and MLflow know a run
_OF_A_KEY = re.compile(r"[\"']?(?=.*\d)(?=.*[A-Za-z])[\w\-+~]{20,}=*[\"']?")
_KNOWN = re.compile(
    r"\b((?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_\w{20,}|github_pat_\w{20,}|hf_[A-Za-z0-9]{20,}|glpat-[\w\-]{15,}"
    r"|sk-(?=[\w\-]*\d)(?=[\w\-]*[A-Z])[\w\-]{20,}|xox[abprs]-[\w\-]{10,}|AIza[\w\-]{30,}|dapi[0-9a-f]{32}"
    r"|npm_[A-Za-z0-9]{30,}|pypi-[\w\-]{40,}|eyJ[\w\-]{10,}\.[\w\-]{10,}(?:\.[\w\-]*)?)"
)
_PRIVATE_KEY = re.compile(r"(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)


_LEAST_HIDDEN = 8  # characters: a shorter word may stand anywhere
_hidden: dict[str, str] = {}  # value → the variable that it was taken from
_unset: set[str] = set()  # variables that a kept config names and this process lacks
_OF_A_PLACE = re.compile(r"_(dir|path|file|home)$", re.IGNORECASE)


def hide(name: str, value: str) -> None:
    """What a secret variable of the environment put into a config: from now on `${NAME}` is shown in its place.

    Where credentials lie is no secret: SSH_KEY_PATH, or a value that is a file or folder here.
    """
    place = _OF_A_PLACE.search(name) or ("/" in value and os.path.exists(value))
    if not place and names_a_secret(name, value) and len(value) >= _LEAST_HIDDEN:
        _hidden[value] = f"${{{name}}}"


def lacks(name: str) -> None:
    """A kept config has `${NAME}`, and the environment does not."""
    _unset.add(name)


def to_set(text: str) -> str:
    """What `text`, a message, is to end in where it names something by a variable that is not set; else nothing."""
    found = [name for name in dict.fromkeys(re.findall(r"\$\{(\w+)\}", text)) if name in _unset - os.environ.keys()]
    hint = f"; set {', '.join(found)} in the environment, which the run was started with"
    return hint if found and hint not in text else ""


class Address(NamedTuple):
    """The parts of `scheme://login@rest?query`; None for a login or a query that it does not have."""

    scheme: str
    login: str | None
    rest: str
    query: str | None


def parts(address: str) -> Address | None:
    """None for what is no address.

    A password may have any character: `postgresql://me:pa/ss@host/db` is a login and a host.
    """
    scheme, colon, body = address.partition("://")
    if not colon:
        return None
    end = _login_end(scheme, body)
    login, rest = (None, body) if end < 0 else (body[:end], body[end + 1 :])
    place, _, query = rest.partition("?")
    if "#" in place or not query or not (_WEB.fullmatch(scheme) or "=" in query or query == MASK):
        return Address(scheme, login, rest, None)  # a page of a site, or a pattern such as s3://bucket/x-0?.tar
    return Address(scheme, login, place, query)


def _login_end(scheme: str, body: str) -> int:
    """Where the @ behind the login is; -1 for none."""
    head = re.split(r"[/?#]", body, maxsplit=1)[0]
    if "@" in head:
        end, beyond = head.rindex("@"), re.split(r"[?#]", body, maxsplit=1)[0].rfind("@")
        # A second @ is of the path where what stands before it is a host, else of the password.
        return beyond if beyond > end and not _HOST.fullmatch(head[end + 1 :]) else end
    name, colon, rest = head.partition(":")
    if colon and name and "@" in body and (_DATABASE.fullmatch(scheme) or not _PORT.fullmatch(rest)):
        return body.rindex("@")
    return -1


def without_login_and_query(address: str) -> str:
    """An address as it is kept: no login, `?•••` for a query; of a database's query what is no secret stays.

    A login without a password stays where it is the name of a user or a container: `abfss://train@account/images`.
    """
    found = parts(address)
    if found is None:
        return address
    clean = f"{found.scheme}://{_name_in(found)}{_fragment(found.rest)}"
    if not found.query:
        return clean
    if not _DATABASE.fullmatch(found.scheme):
        return f"{clean}?{MASK}"
    harmless = [
        one
        for one in re.split(r"[&;]", found.query)
        if not is_secret(one.partition("=")[0]) and not _USER_KEY.fullmatch(one.partition("=")[0])
    ]
    return f"{clean}?{'&'.join(harmless)}" if harmless else clean


def _name_in(found: Address) -> str:
    """`user@`, where that is no secret; of the web it may be a token."""
    if found.login is None or _BY_WEB.fullmatch(found.scheme) or _DATABASE.fullmatch(found.scheme):
        return ""
    secret = re.search(r":|%3a|\s", found.login, re.IGNORECASE) or _KNOWN.search(found.login)
    return "" if secret else f"{found.login}@"


def _fragment(rest: str) -> str:
    """MLflow's pages are fragments, and logins by a browser leave their tokens in one."""
    place, mark, fragment = rest.partition("#")
    secret = any(is_secret(one.partition("=")[0]) for one in re.split(r"[&?]", fragment) if "=" in one)
    return f"{place}#{MASK}" if mark and secret else rest


def without_credentials(text: str) -> str:
    """`text` with each of its addresses as it is kept, `pipe:•••` for a command, and `${NAME}` for what such a variable
    gave. Nothing else of it changes.
    """
    return _clean(_PIPE.sub(lambda m: f"{m[1]}pipe:{MASK}{m[1]}" if m[1] else f"pipe:{MASK}", _by_variables(str(text))))


def value_without_credentials(value: str) -> str:
    """The same of one value of a config: `pipe:` is a command only where the value begins with it."""
    value = _by_variables(value)
    return f"pipe:{MASK}" if value.startswith("pipe:") else _clean(value)


def _by_variables(text: str) -> str:
    for value, name in _hidden.items():
        text = text.replace(value, name)
    return text


def _clean(text: str) -> str:
    text = _SPACE_IN_LOGIN.sub(r"\1", _QUOTE_IN_LOGIN.sub(r"\1", text))
    return _ADDRESS.sub(lambda m: without_login_and_query(m[0]), text)


def redacted(text: Any, code: bool = False) -> str:
    """`text` without login and query of an address, the command of a `pipe:`, secrets by their names, known tokens.

    code: of a programming language, where `token=tokens[0]` is no secret and only texts in quotes and long words are.
    """
    text = without_credentials(str(text))
    text = _COOKIE.sub(rf"\1{MASK}", _HEADER.sub(rf"\1{MASK}", _PRIVATE_KEY.sub(rf"\1{MASK}", text)))
    text = _LOGIN_OPTION.sub(
        rf"\1{MASK}", _OPTION.sub(lambda m: f"{m[1]}{MASK}" if names_a_secret(m[2], m[3]) else m[0], text)
    )
    text = _NETRC.sub(rf"\1{MASK}", _PAIR.sub(rf"\1{MASK})", text))
    text = _HEADER_OPTION.sub(lambda m: f"{m[1]}{m[2]}{m[3]}{MASK}{m[1]}" if is_secret(m[2]) else m[0], text)
    text = _of_secret_names(_QUOTED, _TEXT, text, lambda value: f"{value[0]}{MASK}{value[0]}")
    text = _of_secret_names(_BARE, _LONG_WORD if code else _WORD, text, lambda value: MASK, code)
    return _KNOWN.sub(MASK, _BEARER.sub(rf"\1 {MASK}", text))


def _of_secret_names(
    head: re.Pattern, values: re.Pattern, text: str, mask: Callable[[str], str], only_long: bool = False
) -> str:
    """Values by `mask` where the name is secret; behind another name the search goes on within its value."""
    if not _STEM.search(text):  # no name in it is secret, so none is looked at
        return text
    found, kept, at = [], 0, 0
    while match := head.search(text, at):
        at = match.end(2)
        if not is_secret(match[1]) and not _SOME_KEY.search(match[1], max(0, len(match[1]) - 6)):
            continue
        value = values.match(text, match.end())
        if value and names_a_secret(match[1], value[0]) and not (only_long and not _LONG.fullmatch(value[0])):
            found += [text[kept : value.start()], mask(value[0])]
            kept = at = value.end()
    return "".join(found) + text[kept:]


@lru_cache(maxsize=4096)
def is_secret(key: str) -> bool:
    """Whether a dotted config key, or the name of a variable, names something that is nobody's business."""
    camel = re.sub(r"([a-z0-9])([A-Z])", r"\1_\2", key)
    return bool(_SECRET_KEY.search(camel)) and key not in ("PWD", "OLDPWD")


def names_a_secret(key: str, value: str) -> bool:
    """The same where the value is known too: `wandb_key` is secret with a long mixed one."""
    some_key = _SOME_KEY.search(key, max(0, len(key) - 6)) and _OF_A_KEY.fullmatch(value)
    return is_secret(key) or bool(some_key and key not in _OF_NO_SERVICE)


def masked(tree: Any, key: str = "") -> Any:
    """Plain data with the values of secret keys masked and all its strings redacted. Numbers of tokens are none."""
    if isinstance(tree, dict):
        return {str(k): masked(v, str(k)) for k, v in tree.items()}
    if isinstance(tree, list | tuple):
        return [masked(v, key) for v in tree]
    if isinstance(tree, str):
        return MASK if names_a_secret(key, tree) else redacted(tree)
    counts = tree is None or isinstance(tree, bool) or key.lower().endswith("tokens")
    return MASK if is_secret(key) and not counts else tree


def shown_argument(argument: str) -> str:
    """An argument of a command line with its secrets masked; of `key.sub=value` they are known by the keys, in the
    value too."""
    import yaml

    key, equals, value = argument.partition("=")
    if not equals:
        return redacted(argument)
    try:
        given = yaml.safe_load(value)
    except yaml.YAMLError:
        return f"{key}={MASK}"  # what cannot be read cannot be cleaned
    clean = masked(given, key)
    if clean == given:
        return argument
    if not isinstance(clean, str):
        clean = yaml.safe_dump(clean, default_flow_style=True, allow_unicode=True, width=10**6).strip()
    return f"{key}={clean}"


_LANGUAGES = ("py", "pyi", "c", "h", "cc", "cpp", "cu", "cuh", "hpp", "rs", "go", "js", "ts", "java", "jl")
_PROSE = ("md", "rst", "txt", "html", "tex")
_SECRET_FILE = re.compile(
    r"(^|/)(\.env[^/]*|[^/]*\.(pem|key|p12|pfx|keytab|kdbx)|id_(rsa|dsa|ecdsa|ed25519)|[._]?netrc|\.pgpass|"
    r"\.htpasswd|\.git-credentials|[^/]*(credential|secret)s?(\.\w+)?)$",
    re.IGNORECASE,
)
_SETTING = re.compile(rf"{_NAME}(\\?[\"']?\s*(?::=|[:=])\s*)(?!•)(?=\S)")
_NO_SECRET = re.compile(r"(null|~|none|true|false|\$\{?\w+\}?|[\"']{2}|[|>\[{(]|<[^>]*>)[,;]?\s*", re.IGNORECASE)


def redacted_diff(difference: str) -> str:
    """What `git diff` prints, without secrets: file by file, as a secret is written in files of its kind.

    Of a file whose name says that it holds secrets nothing is kept but that it differs.
    """
    found, name, hidden = [], "", False
    for line in _PRIVATE_KEY.sub(rf"\1{MASK}", difference).split("\n"):
        if line.startswith("diff --git "):
            name = line.rpartition(" b/")[2].strip('"')
            hidden = bool(_SECRET_FILE.search(name)) and _ending(name) not in _LANGUAGES
            found.append(line)
            if hidden:
                found.append(f"# left out: the name of {name} says that it holds secrets")
        elif not hidden:
            found.append(_changed_line(line, _ending(name)))
    return "\n".join(found)


def _ending(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _changed_line(line: str, ending: str) -> str:
    if ending in _LANGUAGES:
        return redacted(line, code=True)
    setting = None if ending in _PROSE or not _STEM.search(line) else _SETTING.search(line)
    while setting and not is_secret(setting[1]):
        setting = _SETTING.search(line, setting.end(2))
    if setting and not _NO_SECRET.fullmatch(line, setting.end()):
        line = line[: setting.end()] + MASK
    return redacted(line)
