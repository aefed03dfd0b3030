"""Makes manifests: finds shards by folder, pattern, list or URL, and scans them in parallel, going on after a kill.

What one shard's scan found is kept in `.NAME.partial/` beside the manifest until the manifest is written, named by the
shard's place, size and time of change, so that an interrupted run repeats nothing but the shards it was at.
"""

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from dtrain.addresses import kept
from dtrain.credentials import redacted
from dtrain.data.shards import remote
from dtrain.data.shards.embeddings import Embeddings
from dtrain.data.shards.lacking import lacking, of_labels
from dtrain.data.shards.latents import Latents
from dtrain.data.shards.manifest import (
    ABSENT,
    FORMAT,
    Document,
    Manifest,
    Shard,
    SideFile,
    class_names,
    load,
    replacing,
)
from dtrain.data.shards.pairs import Pairs
from dtrain.data.shards.parallel import each
from dtrain.data.shards.sample_files import DOT_RULE, IMAGE_FIELDS, LABEL_FIELD, dotted
from dtrain.data.shards.tar import MAX_FIELDS, MEMBER, Scan, scan
from dtrain.errors import UserError
from dtrain.files import opener, parse_json
from dtrain.terminal import printable

_FEW = 16  # shards, or fewer, are scanned by this process: others take a while to start


def index_shards(
    shards: Sequence[Path | str],
    destination: Path,
    progress: Callable[[int], None] | None = None,
    classes: list[str] | None = None,
    processes: int | None = None,
    latents: Latents | None = None,
    embeddings: Sequence[Embeddings] = (),
    pairs: Pairs | None = None,
) -> Manifest:
    """Scan tar shards, paths or URLs, and write their manifest to `destination`, its side file beside it.

    Shards keep the given order and are named relative to the folder they share. `remarks` of the manifest that is given
    back say what a training would stumble over. `progress` is called with the bytes of each shard done. Both files
    appear whole or not at all. processes: default one a core, one for a few shards.
    """
    places = [kept(str(s)) if remote.is_url(s) else os.path.abspath(s) for s in shards]
    if len(set(places)) < len(places):
        twice = next(s for n, s in enumerate(places) if s in places[:n])
        raise UserError(f"{twice} is named twice; name every shard once")
    for place in places:
        if place != place.encode(errors="ignore").decode():
            raise UserError(f"the shard {place} has a name that is no UTF-8, which a manifest cannot keep; rename it")
    root = common_folder(places)
    partial_folder = destination.with_name(f".{destination.name}.partial")
    try:
        partial_folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot write {destination}: {e.strerror}; name a writable place with `--out`") from None
    parts: list[Path | None] = [None] * len(places)
    processes = processes or (1 if len(places) <= _FEW else None)
    for number, (part, size) in each(partial(_scan_once, folder=str(partial_folder)), places, processes):
        parts[number] = Path(part)
        if progress:
            progress(size)

    heads = [_head(part) for part in parts]
    fields = sorted({field for head in heads for field in head["fields"]})
    if len(fields) > MAX_FIELDS:
        raise UserError(
            f"the shards of {root} have {len(fields)} different extensions, more than {MAX_FIELDS}; {DOT_RULE}"
        )
    side, digest = destination.with_suffix(".members"), hashlib.sha256()
    with replacing(side) as file:
        for part in parts:
            found = _load_part(part)
            table = np.zeros((len(found.members), len(fields)), dtype=MEMBER)
            table["size"] = ABSENT
            for column, field in enumerate(found.fields):
                table[:, fields.index(field)] = found.members[:, column]
            file.write(table.tobytes())
            digest.update(table.tobytes())
    document = Document(
        format=FORMAT,
        fields=fields,
        shards=[
            Shard(name=_relative(place, root), samples=h["samples"], bytes=h["bytes"], sha256=h["sha256"])
            for place, h in zip(places, heads, strict=True)
        ],
        classes=classes,
        members=SideFile(file=side.name, sha256=digest.hexdigest()),
        latents=latents,
        embeddings=list(embeddings),
        pairs=pairs,
    )
    with replacing(destination) as file:
        file.write(document.as_json())
    shutil.rmtree(partial_folder, ignore_errors=True)
    made = load(destination)
    return replace(made, remarks=_remarks(made, root, places, heads))


def _remarks(manifest: Manifest, root: str, places: list[str], heads: list[dict]) -> tuple[str, ...]:
    """What a training that reads the pictures, the labels or an array of every sample would stumble over."""
    arrays = [(field,) for field in manifest.fields if field.endswith("npy")]
    found = [str(lack) for lack in lacking(manifest, root, [IMAGE_FIELDS, (LABEL_FIELD,), *arrays])]
    wrong = [(place, *head["wrong_labels"]) for place, head in zip(places, heads, strict=True) if head["wrong_labels"]]
    if wrong:
        place, _, name, text = wrong[0]
        count = sum(number for _, number, _, _ in wrong)
        found.append(
            of_labels(count, manifest.samples, manifest.samples, 0, f"{place}: {name}", text.encode("latin-1"))
        )
    if not set(IMAGE_FIELDS) & set(manifest.fields):
        other = dotted(manifest.fields, IMAGE_FIELDS)
        found.append("no sample has a jpg, jpeg, png or webp" + (f", but a `{other}`: {DOT_RULE}" if other else ""))
    return tuple(printable(remark) for remark in found)


def index(source: str | Sequence[str], destination: Path | None = None) -> Manifest:
    """Index shards: folders of *.tar, globs, brace patterns such as `x-{000..099}.tar`, @FILE with one a line, or URLs.

    destination: the manifest's path, or an existing folder for it; by default manifest.json beside the shards, which
    remote ones do not have. The class names of a manifest that is there are kept: shards do not hold them.
    """
    from dtrain.data.shards.progress import bytes_bar

    shards = [s for one in ([source] if isinstance(source, str) else source) for s in find_shards(one)]
    local = not any(remote.is_url(s) for s in shards)
    if destination is None:
        if not local:
            raise UserError(f"{shards[0]} is remote; say where the manifest shall go with `--out`")
        destination = Path(common_folder([os.path.abspath(s) for s in shards])) / "manifest.json"
    elif Path(destination).is_dir():
        destination = Path(destination) / "manifest.json"
    total = sum(s.stat().st_size for s in shards if s.exists()) if local else None
    with bytes_bar(f"indexing {len(shards):,} shards", total) as progress:
        return index_shards(shards, Path(destination), progress, class_names(destination))


def find_shards(source: str) -> list[Path | str]:
    """The shards a folder (sorted), glob (sorted), brace pattern (as it expands), @list or URL stands for.

    Local ones exist, as Path; URLs are strings.
    """
    if source.startswith("@"):
        try:
            lines = Path(source[1:]).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as e:
            problem = getattr(e, "strerror", None) or e
            raise UserError(f"cannot read the list of shards {source[1:]}: {problem}") from None
        named = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not named:
            raise UserError(f"the list of shards {source[1:]} is empty; write a path or URL a line")
        if nested := [line for line in named if line.startswith("@")]:
            raise UserError(f"the list of shards {source[1:]} names another, {nested[0]}; write a path or URL a line")
        return [shard for line in named for shard in find_shards(line)]
    if os.path.isdir(source):
        shards = sorted(Path(source).glob("*.tar"))
        if not shards:
            raise UserError(f"there are no *.tar files in {source}; name the folder of the shards, or a pattern")
        return shards
    if os.path.isfile(source):
        return [Path(source)]
    from braceexpand import UnbalancedBracesError, braceexpand

    folder = "" if remote.is_url(source) else _folder_of(source)
    try:
        patterns = [folder + rest for rest in braceexpand(source[len(folder) :])]
    except UnbalancedBracesError:
        raise UserError(f"the braces of {source!r} do not balance; write x-{{000..099}}.tar") from None
    shards = []
    for pattern in map(kept, patterns):
        found = remote.expand(pattern) if remote.is_url(pattern) else _files(pattern)
        if not found:
            raise UserError(f"there is no shard {pattern}; name a folder of *.tar files, a glob or a brace pattern")
        shards += found if remote.is_url(pattern) else map(Path, found)
    return shards


def _folder_of(pattern: str) -> str:
    """The longest beginning that is a folder as it is written, whatever brackets and braces are in its name."""
    folder = os.path.dirname(pattern)
    while folder and folder != os.path.dirname(folder) and not os.path.isdir(folder):
        folder = os.path.dirname(folder)
    return folder


def _files(pattern: str) -> list[str]:
    """The files of a glob, sorted. A name that is there as it is written is meant so before it is a pattern."""
    if os.path.isfile(pattern):
        return [pattern]
    folder = _folder_of(pattern)
    literal = glob.escape(folder) + pattern[len(folder) :]
    return sorted(glob.glob(literal, recursive=True)) or sorted(glob.glob(pattern, recursive=True))


def common_folder(places: Sequence[str]) -> str:
    """The folder, or URL, that all shards share. Raises UserError where some are local and some are not."""
    urls = [remote.is_url(p) for p in places]
    if all(remote.is_pipe(p) for p in places):
        return "pipe:"
    if any(urls):
        schemes = {p.split("://", 1)[0] for p in places}
        if not all(urls) or len(schemes) > 1:
            raise UserError(f"{places[0]} and others lie in different storages; index each storage by itself")
        parents = [p.split("://", 1)[1].rsplit("/", 1)[0] for p in places]
        shared = os.path.commonpath(parents) if len({p.split("/")[0] for p in parents}) == 1 else ""
        if not shared:
            raise UserError(f"{places[0]} and others lie on different hosts; index each by itself")
        return f"{schemes.pop()}://{shared}"
    return os.path.commonpath([os.path.dirname(p) for p in places])


def _relative(place: str, root: str) -> str:
    if remote.is_pipe(root):
        return place
    return remote.split_query(place)[0][len(root) + 1 :] if remote.is_url(place) else os.path.relpath(place, root)


def _scan_once(place: str, folder: str) -> tuple[str, int]:
    """The file with what the scan of a shard found, made unless it is there, and the shard's bytes."""
    if remote.is_pipe(place):
        size, version = 0, ""
    elif remote.is_url(place):
        size, version = remote.stat(place)
    else:
        try:
            status = os.stat(place)
        except OSError as e:
            raise UserError(f"cannot read the shard {place}: {e.strerror}") from None
        size, version = status.st_size, str(status.st_mtime_ns)
    part = Path(folder) / f"{hashlib.sha256(f'{place} {size} {version}'.encode()).hexdigest()}.scan"
    if not _is_whole(part):
        if remote.is_pipe(place):
            with tempfile.NamedTemporaryFile(dir=folder, suffix=".tar") as copy:
                remote.run_pipe(place, Path(copy.name), redacted(place))
                found = scan(copy.name, shown=redacted(place))
        else:
            found = scan(place)
        head = {"fields": found.fields, "samples": len(found.members), "bytes": found.bytes, "sha256": found.sha256}
        head["wrong_labels"] = found.wrong_labels
        with replacing(part) as file:
            file.write(json.dumps(head).encode() + b"\n" + found.members.tobytes())
    return str(part), size


def _is_whole(part: Path) -> bool:
    """Whether it is there, and not what a power cut left of it."""
    try:
        _load_part(part)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return True


def _head(part: Path) -> dict:
    with open(part, "rb", opener=opener) as file:
        return parse_json(file.readline())


def _load_part(part: Path) -> Scan:
    with open(part, "rb", opener=opener) as file:
        head, members = parse_json(file.readline()), file.read()
    table = np.frombuffer(members, dtype=MEMBER).reshape(head["samples"], len(head["fields"]))
    return Scan(head["fields"], table, head["bytes"], head["sha256"], head["wrong_labels"])
