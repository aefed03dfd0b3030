"""Byte ranges of shards that lie behind a URL: s3://, gs://, http(s):// by fsspec, `pipe:` commands by webdataset.

Trouble that may pass (time-outs, 5xx, connections that break) is retried with growing waits, and then is a UserError
with the URL. What will be the same tomorrow (no such shard, a shard cut off) is a BadSample.
"""

import os
import re
import time
from pathlib import Path
from urllib.parse import unquote

from dtrain.addresses import VARIABLE, complete, kept
from dtrain.credentials import MASK, parts, redacted
from dtrain.errors import BadSample, UserError

ATTEMPTS = 5
FIRST_WAIT = 0.5  # seconds, doubled after each attempt
REQUEST_SECONDS = 60.0  # without a byte, after which a server has stalled
_CREDENTIALS = f"its credentials: in {VARIABLE}, for a web server in ~/.netrc, for S3 in its own variables"
_RETRIED_CLIENT_ERRORS = (408, 425, 429)


def is_url(place: str | Path) -> bool:
    return "://" in str(place) or str(place).startswith("pipe:")


def is_pipe(place: str | Path) -> bool:
    return str(place).startswith("pipe:")


def join(base: str, name: str) -> str:
    """The URL of a shard by its name in the manifest; a command goes by itself. A query stays at the end."""
    if is_pipe(base):
        return name if is_pipe(name) else f"{base.rstrip('/')}/{name}"
    folder, query = split_query(base)
    return f"{folder.rstrip('/')}/{name}{query}"


def shown(base: str, name: str, shard: int) -> str:
    """`join` for messages and the journal: a command may hold a password, so it goes by the shard's number."""
    return f"pipe:{MASK} of shard {shard}" if is_pipe(base) else join(base, name)


def split_query(url: str) -> tuple[str, str]:
    """(address, `?query` or nothing)."""
    found = parts(url)
    query = "" if found is None or found.query is None else f"?{found.query}"
    return url.removesuffix(query), query


def _opened(url: str) -> str:
    """The URL with its login and query. Raises UserError for one that is kept without its query."""
    full = complete(url)
    if full.endswith(f"?{MASK}"):
        raise UserError(
            f"{url} needs the query that it was first given with, and a run's config is kept without: give the whole "
            f"address in the environment variable {VARIABLE}"
        )
    return full


def fetch(url: str, start: int, stop: int, size: int) -> bytes:
    """Bytes start..stop of a file of `size` bytes, exactly; fewer, after all attempts, only where it is cut off.

    Raises BadSample where there is no such file, UserError with the URL for trouble that stayed.
    """
    data = b""

    def once() -> bytes | None:
        nonlocal data
        data = _range(_opened(url), start, stop, size)
        return data if len(data) == stop - start else None

    whole = _retried(url, once)
    if whole is None and len(data) > stop - start:
        raise UserError(f"{url} answers with {len(data):,} bytes where {stop - start:,} were asked; use another server")
    return data if whole is None else whole


def stat(url: str) -> tuple[int, str]:
    """(bytes, a string that changes when the file does). Raises as `fetch` does."""

    def once():
        filesystem, path = _filesystem(_opened(url))
        info = filesystem.info(path)
        if info.get("size") is None:
            raise UserError(f"{url}: the server does not tell its length; copy the shard to another place")
        marks = [str(info[k]) for k in ("ETag", "etag", "LastModified", "Last-Modified", "mtime") if info.get(k)]
        return int(info["size"]), " ".join(marks)

    return _retried(url, once)


def expand(pattern: str) -> list[str]:
    """The URLs a glob stands for, sorted; the pattern itself where it is none. Raises UserError."""
    folder, query = split_query(pattern)
    if is_pipe(pattern) or not set("*?[") & set(folder.split("://", 1)[1]):
        return [pattern]
    scheme = pattern.split("://", 1)[0]

    def once() -> list[str]:
        filesystem, path = _filesystem(_opened(folder))
        return sorted(filesystem.glob(path))

    found = (f if "://" in f else f"{scheme}://{f}" for f in _retried(pattern, once))
    return [f"{kept(f)}{query}" for f in found]


def run_pipe(command: str, destination: Path, shown: str) -> None:
    """Write what the command of a `pipe:` URL prints to a file. Raises UserError, which calls the shard `shown`."""

    def once():
        from webdataset.gopen import gopen

        with open(destination, "wb") as out:
            try:
                stream = gopen(command)
                while chunk := stream.read(1 << 20):
                    out.write(chunk)
                stream.close()  # raises where the command failed
            except OSError as e:
                if e.errno is not None:
                    raise
                # webdataset's message repeats the command, which may hold a password.
                code = re.search(r": exit (-?\d+) \(read\)", str(e))
                raise OSError(f"its command ended with exit code {code[1]}" if code else "its command failed") from None
            out.flush()
            os.fsync(out.fileno())
        return True

    _retried(shown, once)


def _filesystem(url: str):
    """(what reads it, the URL for it). The web takes a login in the URL, S3 a key and its secret beside it."""
    import fsspec

    options = {}
    if url.startswith("http"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=REQUEST_SECONDS, sock_read=REQUEST_SECONDS)
        options = {"client_kwargs": {"timeout": timeout}, "headers": {"Accept-Encoding": "identity"}}
    elif url.startswith("s3"):
        # Its own retries, within each of ours, would make a server that is gone a matter of minutes.
        waits = {"connect_timeout": REQUEST_SECONDS, "read_timeout": REQUEST_SECONDS}
        options = {"config_kwargs": {"retries": {"total_max_attempts": 1}} | waits}
        if (found := parts(url)).login:
            key, _, secret = found.login.partition(":")
            options |= {"key": unquote(key), "secret": unquote(secret)}
            url = f"{found.scheme}://{found.rest}"
    scheme = url.split("://", 1)[0]
    try:
        return fsspec.filesystem(scheme, **options), url
    except ImportError as e:
        raise UserError(f"{url} needs another package: {e}; install it beside dtrain") from None
    except ValueError:
        raise UserError(f"{url}: no reader is known for {scheme}://; use s3://, gs:// or https://") from None


def _range(url: str, start: int, stop: int, size: int) -> bytes:
    filesystem, url = _filesystem(url)
    if not url.startswith("http"):
        return filesystem.cat_file(url, start=start, end=stop)
    # Opened, because cat_file takes the whole file for the range where a server ignores ranges.
    with filesystem.open(url, "rb", block_size=1 << 20, cache_type="none", size=size) as file:
        file.seek(start)
        return file.read(stop - start)


def _retried(url: str, once):
    """The first result that is not None; None when there is none after all attempts."""
    url = redacted(url)  # for messages: of a command, whatever it holds
    problem: Exception | None = None
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(FIRST_WAIT * 2 ** (attempt - 1))
        try:
            problem, result = None, once()
            if result is not None:
                return result
        except UserError:
            raise
        except FileNotFoundError:
            raise BadSample(f"there is no shard {url}; restore it or run `dtrain index` again") from None
        except PermissionError as e:
            raise UserError(f"{url} may not be read ({_reason(e)}); check {_CREDENTIALS}") from None
        except ValueError as e:
            if "range" in str(e):
                raise UserError(
                    f"{url}: the server ignores byte ranges; copy the shards to one that serves them"
                ) from None
            problem = e
        except Exception as e:
            status = getattr(e, "status", None)
            if status == 404:
                raise BadSample(f"there is no shard {url}; restore it or run `dtrain index` again") from None
            if status is not None and 400 <= status < 500 and status not in _RETRIED_CLIENT_ERRORS:
                raise UserError(
                    f"{url} may not be read (HTTP {status}); check the address, and {_CREDENTIALS}"
                ) from None
            problem = e
    if problem is not None:
        raise UserError(
            f"cannot read {url} after {ATTEMPTS} attempts ({_reason(problem)}); start again when it answers"
        )
    return None


def _reason(error: Exception) -> str:
    status = getattr(error, "status", None)
    text = f"HTTP {status}" if status else " ".join(str(error).split())
    return text[:200] or type(error).__name__
