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
from pathlib import Path
from typing import NamedTuple

from dtrain.errors import UserError, from_where
from dtrain.files import read_bytes

PIN = "#sha256="
# Operators and classes of torch itself that compute and do no more; all others could do anything.
LIBRARIES = {"aten", "prim", "prims", "quantized", "_quantized", "sparse", "mkl", "mkldnn", "onednn"}
FILES = {"save", "from_file", "load", "read_file", "write_file", "load_tensor", "_load_for_lite_interpreter"}
MOST_BYTES = 16 << 30  # of a file
MOST_CODE = 32 << 20  # bytes
_OPERATOR = re.compile(r"\b(\w+)::(\w+)\(")


class Program(NamedTuple):
    """A file's bytes, and their sha256 as hex."""

    path: Path
    data: bytes
    sha256: str


def file_of(features: str) -> tuple[Path, str | None]:
    """`net.pt#sha256=…` as the file and the hash that it must have; None where none is pinned."""
    path, _, pinned = features.partition(PIN)
    return Path(path), pinned.lower() or None


def read_program(features: str) -> Program:
    """The TorchScript file of `eval.features`, whose code does nothing but compute.

    Raises UserError where it is missing, has another hash than is pinned, is no TorchScript, or could do more.
    """
    path, pinned = file_of(features)
    try:
        data = read_bytes(path, MOST_BYTES)
    except FileNotFoundError:
        raise UserError(
            f"there is no TorchScript file {path}{from_where(path)}; eval.features is inception, effnet_lite0, pixels "
            "or a path"
        ) from None
    except OSError as e:
        raise UserError(f"cannot read the TorchScript file {path}: {e.strerror}") from None
    found = hashlib.sha256(data).hexdigest()
    if pinned not in (None, found):
        raise UserError(f"{path} has the sha256 {found}, and eval.features pins {pinned}: it is another file")
    _check_code(path, data)
    return Program(path, data, found)


def _check_code(path: Path, data: bytes) -> None:
    code = _code(path, data)
    text = "\n".join(code.values())
    for name, source in code.items():
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise UserError(f"{path}: its code in {name} cannot be read, so it is not run; script it anew") from None
        for node in ast.walk(tree):
            if what := _does_more(node):
                _refuse(path, what)
    # Loading runs this part of a file, so nothing like it may stand there, not even in a text.
    if "__setstate__" in text and (found := re.search(rf"\b({'|'.join(sorted(FILES))})\b", text)):
        _refuse(path, found[0])


def _code(path: Path, data: bytes) -> dict[str, str]:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            parts = [one for one in archive.infolist() if _is_code(one.filename)]
            if sum(one.file_size for one in parts) > MOST_CODE:
                raise UserError(f"{path} has more than {MOST_CODE >> 20} MiB of code, so it is not run")
            if any(one.filename.lower().endswith("/model.json") for one in archive.infolist()):
                raise UserError(f"{path} is of a PyTorch before 1.4, whose code cannot be looked at; script it anew")
            code = {one.filename: archive.read(one).decode() for one in parts}
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, RuntimeError, EOFError) as e:
        if isinstance(e, UserError):
            raise
        raise UserError(f"{path} cannot be read as TorchScript ({e})") from None
    if not code:
        raise UserError(f"{path} cannot be read as TorchScript (it holds no code)")
    return code


def _is_code(name: str) -> bool:
    name = name.lower()
    return name.endswith(".py") or ("/code/" in name and not name.endswith(".debug_pkl"))


def _does_more(node: ast.AST) -> str | None:
    """What this part of a program could do beside computing."""
    if isinstance(node, ast.Attribute):
        if node.attr in FILES:
            return ast.unparse(node)
        words = _words(node)
        if words[:1] == ["ops"] and len(words) > 1 and words[1] not in LIBRARIES:
            return ".".join(words)
        if "classes" in words[:-1] and words[words.index("classes") + 1] not in LIBRARIES | {"rnn", "xnnpack"}:
            return ".".join(words)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
        name = node.args[1] if len(node.args) == 2 else None
        if not isinstance(name, ast.Constant) or name.value in FILES:
            return ast.unparse(node)
    if isinstance(node, ast.Import | ast.ImportFrom):
        return ast.unparse(node)
    return None


def _words(node: ast.expr) -> list[str]:
    """`ops.image.read_file` as its parts; empty where it is of a value."""
    words: list[str] = []
    while isinstance(node, ast.Attribute):
        words.insert(0, node.attr)
        node = node.value
    return [node.id, *words] if isinstance(node, ast.Name) else []


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
