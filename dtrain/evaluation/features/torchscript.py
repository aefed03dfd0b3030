"""A TorchScript file is a program: what it is allowed to be is seen in its text, before any of it runs.

torch.jit.load runs code of the file already (`__setstate__`), so the file is read once as bytes, held against the hash
that a config may pin, and its code is searched for operators that read or write files and for those of no known
library. This stops accidents and plain malice; it is no sandbox. A file of somebody else's is to be pinned, after a
look at it.
"""

import ast
import hashlib
import io
import re
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

from dtrain.config.evaluation import PIN
from dtrain.errors import UserError, from_where
from dtrain.evaluation.features.torchscript_code import FILES, LIBRARIES, declared, harm_in, module_of
from dtrain.files import read_bytes

MOST_BYTES = 16 << 30  # of a file
MOST_CODE = 32 << 20  # bytes
_OPERATOR = re.compile(r"\b(\w+)::(\w+)\(")


class Program(NamedTuple):
    """An archive of exactly the members of a file that were looked at, and the sha256 of the file as hex."""

    path: Path
    data: bytes
    sha256: str


def file_of(features: str) -> tuple[Path, str | None]:
    """`net.pt#sha256=…` as the file and the hash that it must have; None where none is pinned."""
    path, _, pinned = features.partition(PIN)
    return Path(path), pinned.lower() or None


def read_program(features: str, key: str = "eval.features") -> Program:
    """The TorchScript file that a key of the config names, whose code does nothing but compute.

    Raises UserError where it is missing, has another hash than is pinned, is no TorchScript, or could do more.
    """
    path, pinned = file_of(features)
    try:
        data = read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        ours = (
            "is inception, dinov2, effnet_lite0, pixels or a path"
            if key == "eval.features"
            else "names it, so copy it there"
        )
        raise UserError(f"there is no TorchScript file {path}{from_where(path)}; {key} {ours}") from None
    except OSError as e:
        raise UserError(f"cannot read the TorchScript file {path}: {e.strerror}") from None
    found = hashlib.sha256(data).hexdigest()
    if pinned not in (None, found):
        raise UserError(f"{path} has the sha256 {found}, and {key} pins {pinned}: it is another file")
    members = _members(path, data)
    _check_code(path, {name: source for name, source in members.items() if _is_code(name)})
    return Program(path, _archive(members), found)


def _check_code(path: Path, code: dict[str, bytes]) -> None:
    trees = {}
    for name, source in code.items():
        try:
            trees[name] = ast.parse(source.decode())
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise UserError(f"{path}: its code in {name} cannot be read, so it is not run; script it anew") from None
    classes = declared(trees)
    for name, tree in trees.items():
        for what in harm_in(tree, module_of(name), classes):
            _refuse(path, what)
    # Loading runs this part of a file, so nothing like it may stand there, not even in a text.
    text = "\n".join(source.decode() for source in code.values())
    if "__setstate__" in text and (found := re.search(rf"\b({'|'.join(sorted(FILES))})\b", text)):
        _refuse(path, found[0])


def _members(path: Path, data: bytes) -> dict[str, bytes]:
    """Name → content of all members. Raises UserError where there is no code, or two readers could see another."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = [one for one in archive.infolist() if not one.is_dir()]
            if sum(one.file_size for one in parts if _is_code(one.filename)) > MOST_CODE:
                raise UserError(f"{path} has more than {MOST_CODE >> 20} MiB of code, so it is not run")
            if sum(one.file_size for one in parts) > MOST_BYTES:
                raise UserError(f"{path} has more than {MOST_BYTES >> 30} GiB in it, so it is not run")
            if any(one.filename.lower().endswith("/model.json") for one in parts):
                raise UserError(f"{path} is of a PyTorch before 1.4, whose code cannot be looked at; script it anew")
            if len({one.filename.lower() for one in parts}) < len(parts):
                raise UserError(f"{path} is not run: two of its members have the same name; script it anew")
            members = {one.filename: archive.read(one) for one in parts}
    except (zipfile.BadZipFile, zlib.error, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} cannot be read as TorchScript ({e})") from None
    if not any(map(_is_code, members)):
        raise UserError(f"{path} cannot be read as TorchScript (it holds no code)")
    return members


def _archive(members: dict[str, bytes]) -> bytes:
    """A new archive: torch parses ZIP files by another library, which could find other members in the same bytes."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content)
    return made.getvalue()


def _is_code(name: str) -> bool:
    name = name.lower()
    return name.endswith(".py") or ("/code/" in name and not name.endswith(".debug_pkl"))


def check_graphs(path: Path, network) -> None:
    """The same of a loaded torch.jit.ScriptModule, as it was compiled, before it is called. Raises UserError."""
    for module in network.modules():
        for name in module._c._method_names():
            for library, operator in _OPERATOR.findall(str(module._c._get_method(name).graph)):
                if library not in LIBRARIES or operator in FILES:
                    _refuse(path, f"{library}::{operator}")


def _refuse(path: Path, what: str) -> None:
    raise UserError(
        f"{path} is not run: its code uses {what}, and an extractor may only compute, not reach files or other code"
    )
