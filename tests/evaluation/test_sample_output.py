"""Samples are written as they are drawn: the same bytes on any number of ranks, in memory that does not grow."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtrain.diffusion.process import build as build_process
from dtrain.errors import NotFinite, SharedError, UserError
from dtrain.evaluation.generate import Generator
from dtrain.evaluation.sample import draw, labels_in_turn, write
from tests.digits import tiny
from tests.folders import contents
from tests.ranks import run_ranks
from tests.small_disk import small_disk

BLOCK, N = 12, 31  # two full blocks and one that is not, so that of three ranks each has one


class Tints(torch.nn.Module):
    """A network that costs nothing: x_0 is a level of the class, a little of the noise, and NaN for one class."""

    def __init__(self, spoilt: int | None = None):
        super().__init__()
        self.spoilt = spoilt

    def forward(self, x: torch.Tensor, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        level = y[:, None, None, None] / 10 + x / 20
        return (
            torch.where(y[:, None, None, None] == self.spoilt, torch.nan, level) if self.spoilt is not None else level
        )


def ready(digits, folder, *overrides, spoilt=None):
    config = tiny(digits, folder, "diffusion.prediction=x0", "eval.steps=1", f"eval.batch_size={BLOCK}", *overrides)
    process = build_process(config.diffusion)
    return config, Generator.of(Tints(spoilt), process, config, torch.device("cpu"))


def written(digits, outs, n, *overrides):
    """On a rank: draws n images into each of outs, (path, format), and what that raised."""
    config, generator = ready(digits, outs[0][0].parent, *overrides)
    return [raised(generator, config, labels_in_turn(n, 10), out, format) for out, format in outs]


def raised(generator, config, labels, out, format):
    try:
        write(generator, config, labels, out, format, in_turn=True)
    except UserError as e:
        return type(e), str(e)


def expected(digits, folder, channels):
    """The images (N, H, W, C) without blocks of ranks, by what the output does not use."""
    _, generator = ready(digits, folder, f"data.channels={channels}")
    return np.concatenate(
        [images for _, images in draw(generator, labels_in_turn(N, 10), ready(digits, folder)[0].eval)]
    )


@pytest.mark.parametrize(("world_size", "channels"), [(1, 1), (2, 3), (3, 1)])
def test_files_have_the_bytes_that_numpy_and_pillow_write_of_all_images(digits, tmp_path, world_size, channels):
    images, labels = expected(digits, tmp_path, channels), labels_in_turn(N, 10).numpy()
    assert len(np.unique(images)) > 50
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    ours.mkdir()
    np.savez(theirs / "plain.npz", images=images, labels=labels)
    np.savez(theirs / "adm.npz", arr_0=images.repeat(3 // channels, axis=-1), arr_1=labels)
    canvas = np.full((4 * 9 - 1, 10 * 9 - 1, channels), 24, np.uint8)
    pictures = [Image.fromarray(image.squeeze(-1) if channels == 1 else image) for image in images]
    (theirs / "folder").mkdir()
    rows = ["file,label,class"]
    for i, image in enumerate(images):
        canvas[i // 10 * 9 :, i % 10 * 9 :][:8, :8] = image
        pictures[i].save(theirs / "folder" / f"{i:06d}-{i % 10}.png")
        rows.append(f"{i:06d}-{i % 10}.png,{i % 10},{i % 10}")
    (theirs / "folder" / "labels.csv").write_text("".join(f"{row}\r\n" for row in rows), newline="")
    picture = Image.fromarray(canvas.squeeze(-1) if channels == 1 else canvas)
    picture.resize((4 * picture.width, 4 * picture.height), Image.NEAREST).save(theirs / "grid.png")
    outs = {"plain.npz": "npz", "adm.npz": "adm", "folder": "folder", "grid.png": "png"}
    told = run_ranks(
        *(written, world_size, digits, [(ours / name, format) for name, format in outs.items()], N),
        f"data.channels={channels}",
    )
    assert told == [[None] * 4] * world_size
    assert contents(ours) == contents(theirs)


def peaks(digits, folder, few, many):
    """On a rank: the peak of resident bytes, by format, while few images of 48 KiB are written, few again, and many."""
    config, generator = ready(digits, folder, "data.image_size=128", "data.channels=3", "model.patch=8")
    found = {"npz": [], "folder": []}
    for format, measured in found.items():
        for number, n in enumerate((few, few, many)):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
            out = folder / f"{number}.npz" if format == "npz" else folder / f"{number}"
            write(generator, config, labels_in_turn(n, 10), out, format, in_turn=True)
            measured.append(resident("VmHWM"))
    return found


def resident(which: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which)]
    return int(line.split()[1]) * 1024


def test_memory_does_not_grow_with_the_number_of_images(digits, tmp_path):
    """To gather them took more than all their bytes, on every rank."""
    few, many = 5 * BLOCK, 70 * BLOCK  # 3 and 40 MiB
    for of_formats in run_ranks(peaks, 2, digits, tmp_path, few, many):
        for format, (_, before, after) in of_formats.items():
            assert after - before < 0.7 * (many - few) * 128 * 128 * 3, format


def written_spoilt(digits, outs):
    """48 images, of which number 40 alone, which rank 1 draws in its second block, is no number."""
    config, generator = ready(digits, outs[0][0].parent, spoilt=9)
    labels = torch.arange(48) % 9
    labels[40] = 9
    return [raised(generator, config, labels, out, format) for out, format in outs]


def test_a_block_that_fails_ends_all_ranks_and_a_folder_says_what_it_holds(digits, tmp_path):
    out = tmp_path / "pictures"
    outs = [(out, "folder"), (tmp_path / "none.npz", "npz"), (tmp_path / "none.png", "png")]
    told = run_ranks(written_spoilt, 2, digits, outs)
    assert [[kind for kind, _ in of_rank] for of_rank in told] == [[NotFinite] * 3] * 2
    why = "x_0 is not finite in 1 of 12 samples drawn together (ids 40)"
    assert all(message.startswith(why) for _, message in told[0])
    left = f"; {out} holds the first 24 of 48 images, as its labels.csv says; remove it to start again"
    assert [message.endswith(left) for _, message in told[0]] == [True, False, False]
    with open(out / "labels.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["file"] for row in rows} == {path.name for path in out.glob("*.png")}
    assert [int(row["label"]) for row in rows] == [i % 9 for i in range(24)]
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]


def test_a_disk_that_is_full_ends_all_ranks_in_one_line(digits, tmp_path):
    with small_disk(tmp_path / "disk", "size=1m"):
        disk = tmp_path / "disk"
        outs = [(disk / "many.npz", "npz"), (disk / "many", "folder")]
        big = ("data.image_size=192", "data.channels=3", "model.patch=8")
        told = run_ranks(written, 2, digits, outs, 4 * BLOCK, *big)
        assert [[kind for kind, _ in of_rank] for of_rank in told] == [[SharedError] * 2] * 2
        for (out, _), (_, message) in zip(outs, told[0], strict=True):
            assert message.startswith(f"cannot write --out {out}: No space left on device")
        assert os.listdir(disk) == ["many"]  # of the arrays nothing
