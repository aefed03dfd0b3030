"""The file or folder that `dtrain sample` writes: it takes blocks of images in their order, as they are drawn.

A file is there whole or not at all: until then its bytes lie in one without a name, which is gone with the process. A
folder fills, and its labels.csv names the pictures that are whole.
"""

import csv
import io
import re
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from dtrain.checkpoint.export import class_names_of
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.evaluation.grid import CaptionedGrid, Grid
from dtrain.files import as_file_name, replacing
from dtrain.interrupt import ctrl_c

FORMATS = {"png": ".png", "npz": ".npz", "adm": ".npz", "folder": ""}  # and how --out ends


def format_of(out: Path, asked: str | None) -> str:
    """What to write at `out`: as asked, else by its name; a folder where that has no ending. Raises UserError."""
    if asked is not None and asked not in FORMATS:
        raise UserError(f"--format {asked} is not one of {', '.join(FORMATS)}")
    ending = "" if out.is_dir() else out.suffix
    by_name = next((name for name, suffix in FORMATS.items() if suffix == ending), None)
    if asked is None and by_name is None:
        raise UserError(f"--out {out} must end in .png or .npz, or be a folder")
    chosen = asked or by_name
    if chosen != "folder" and ending != FORMATS[chosen]:
        raise UserError(f"--out {out} must end in {FORMATS[chosen]} for --format {chosen}")
    if chosen == "folder" and ending in FORMATS.values() and ending:
        raise UserError(f"--out {out} is called like a file; name a folder for --format folder")
    return chosen


def check_place(out: Path, format: str) -> None:
    """Raises UserError where nothing can be written at `out`, or something lies there that is not to be mixed with."""
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")
    if format == "folder" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} holds something already, which would be taken for samples; name an empty folder")


def packed(format: str, images: np.ndarray) -> list[bytes]:
    """Images uint8 (b, H, W, C) as an output takes them: PNG files for a folder, made by the rank that drew them."""
    if format != "folder":
        return [images.tobytes()]
    files = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(file, "png")
        files.append(file.getvalue())
    return files


class Output(Protocol):
    def take(self, first: int, block: list[bytes]) -> None:
        """The images from id `first` on, the next ones, as `packed` gives them. Raises OSError."""

    def finish(self) -> None:
        """All have come. Raises OSError."""

    def close(self) -> None:
        """Whether they have or not."""

    def left(self) -> str | None:
        """What lies at `out` before the end, for the user to read; None for nothing."""


def open_output(
    out: Path, format: str, config: Config, labels: Tensor, in_turn: bool, prompts: Sequence[str] = ()
) -> Output:
    """For images with labels int64 (N,); in_turn: they are all classes in turn; prompts: N or none. Raises OSError.

    png: a grid, with prompts below the pictures. npz: `images` uint8 (N, H, W, C), `labels` int64 (N,) and, of a model
    that is told in words, `prompts` (N,). adm: the same as `arr_0` and, of a model with
    classes, `arr_1`, grey images as RGB, for that evaluator reads no others. folder: a PNG an image, named by id and
    class, and labels.csv, where the prompts stand too.
    """
    classes, n = config.model.num_classes, len(labels)
    shape = (n, config.data.image_size, config.data.image_size, config.data.channels)
    if format == "npz":
        more = {"prompts": np.array(prompts)} if prompts else {}
        return _Arrays(out, shape, "images", {"labels": labels.numpy()} | more)
    if format == "adm":
        return _Arrays(out, shape, "arr_0", {"arr_1": labels.numpy()} if classes else {}, rgb=True)
    if format == "folder":
        return _Folder(out, labels.tolist(), classes, class_names_of(config.data, classes) or [], prompts)
    if prompts:
        each = len(dict.fromkeys(prompts))
        return _Picture(out, shape, CaptionedGrid(prompts, each if 1 < each <= 8 else min(8, n), *shape[1:3]), 1)
    columns = classes if in_turn and 1 < classes <= 16 else int(np.ceil(np.sqrt(n)))
    grid = Grid(n, columns, config.data.channels, *shape[1:3])
    return _Picture(out, shape, grid, scale=max(1, 32 // config.data.image_size))


class _Arrays:
    """What numpy.savez writes, byte for byte, without the images in memory."""

    def __init__(self, out: Path, shape: tuple[int, ...], name: str, more: dict[str, np.ndarray], rgb: bool = False):
        """name: of the images' array; rgb: grey ones are stored as such."""
        self._out, self._shape, self._more = out, shape, more
        self._channels = 3 if rgb else shape[-1]
        with ExitStack() as opened:
            self._file = opened.enter_context(tempfile.TemporaryFile(dir=out.absolute().parent))
            self._zip = opened.enter_context(zipfile.ZipFile(self._file, "w", zipfile.ZIP_STORED))
            self._images = opened.enter_context(self._member(name))
            header = {"descr": "|u1", "fortran_order": False, "shape": (*shape[:-1], self._channels)}
            np.lib.format.write_array_header_1_0(self._images, header)
            self._opened = opened.pop_all()

    def _member(self, name: str):
        return self._zip.open(f"{name}.npy", "w", force_zip64=True)

    def take(self, first: int, block: list[bytes]) -> None:
        images = np.frombuffer(block[0], np.uint8).reshape(-1, *self._shape[1:])
        self._images.write(images.repeat(self._channels // self._shape[-1], axis=-1).tobytes())

    def finish(self) -> None:
        self._images.close()
        for name, values in self._more.items():
            with self._member(name) as member:
                np.lib.format.write_array(member, values)
        self._zip.close()
        self._file.seek(0)
        with replacing(self._out) as f:
            shutil.copyfileobj(self._file, f, 1 << 20)

    def close(self) -> None:
        with suppress(OSError, ValueError):  # what was not finished has an end that cannot be written
            self._opened.close()

    def left(self) -> None:
        return None


class _Picture:
    """The one picture is in rank 0's memory, all else is a block at a time."""

    def __init__(self, out: Path, shape: tuple[int, ...], grid: Grid | CaptionedGrid, scale: int):
        self._out, self._shape, self._grid, self._scale = out, shape, grid, scale

    def take(self, first: int, block: list[bytes]) -> None:
        self._grid.put(first, np.frombuffer(block[0], np.uint8).reshape(-1, *self._shape[1:]))

    def finish(self) -> None:
        with replacing(self._out) as f:
            self._grid.picture(self._scale).save(f, "png")

    def close(self) -> None:
        pass

    def left(self) -> None:
        return None


class _Folder:
    """000012-3-cat.png, the id, the class and its name as far as a file's name allows; labels.csv has it as it is."""

    def __init__(self, out: Path, labels: list[int], classes: int, names: list[str], prompts: Sequence[str] = ()):
        self._out, self._labels, self._classes, self._prompts = out, labels, classes, prompts
        self._named = {i: name for i, name in enumerate(names) if name != str(i)}
        self._digits = max(6, len(str(len(labels) - 1)))
        self._count = 0  # in labels.csv
        out.mkdir(exist_ok=True)
        self._file = open(out / "labels.csv", "w", newline="", encoding="utf-8")  # noqa: SIM115 - closed by `close`
        self._table = csv.writer(self._file)
        self._table.writerow(["file", *(["label", "class"] if classes else []), *(["prompt"] if prompts else [])])
        ctrl_c.kept(self.left)

    def take(self, first: int, block: list[bytes]) -> None:
        rows = []
        for i, file in enumerate(block, first):
            label = self._labels[i]
            parts = [f"{i:0{self._digits}}"]
            if self._classes:
                plain = re.sub(r"[^\w.]+", "_", self._named.get(label, ""))
                parts += [str(label), as_file_name(plain) if plain else ""]
            name = "-".join(filter(None, parts)) + ".png"
            (self._out / name).write_bytes(file)
            said = [self._prompts[i]] if self._prompts else []
            rows.append([name, *([label, self._named.get(label, label)] if self._classes else []), *said])
        self._table.writerows(rows)  # of pictures that are whole
        self._file.flush()
        self._count = first + len(block)

    def finish(self) -> None:
        self._file.close()

    def close(self) -> None:
        self._file.close()

    def left(self) -> str:
        done = f"the first {self._count:,} of {len(self._labels):,} images" if self._count else "no image"
        return f"{self._out} holds {done}, as its labels.csv says; remove it to start again"
