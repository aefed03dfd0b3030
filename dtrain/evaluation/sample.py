"""`dtrain sample`: images of a run into a grid, a folder or an .npz file; `dtrain.load` draws in the same way."""

import csv
import itertools
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dtrain import distributed
from dtrain.checkpoint.export import class_names_of
from dtrain.config import Config, Eval
from dtrain.diffusion.samplers import network_evaluations
from dtrain.errors import UserError
from dtrain.evaluation.generate import Generator, OnProgress, grid, quiet
from dtrain.evaluation.opened import open_generator, weights_name
from dtrain.evaluation.requirements import check_generates
from dtrain.files import as_file_name, replacing
from dtrain.interrupt import ctrl_c
from dtrain.run import RunDirectory

FORMATS = {"png": ".png", "npz": ".npz", "adm": ".npz", "folder": ""}  # and how --out ends


def labels_in_turn(n: int, num_classes: int) -> Tensor:
    """int64 (n,): all classes in turn, 0 for a model without."""
    return torch.arange(n) % max(1, num_classes)


def draw(
    generator: Generator,
    labels: Tensor,
    how: Eval,
    rank: int = 0,
    world_size: int = 1,
    on_progress: OnProgress = quiet,
) -> dict[int, np.ndarray]:
    """This rank's blocks of ids 0 … n − 1, by their first id: uint8 (b, H, W, C) each. labels: int64 (n,).

    on_progress: called with this rank's evaluations of the network.
    """
    n, size = len(labels), how.batch_size
    starts = range(0, n, size)[rank::world_size]
    blocks, evaluations = {}, itertools.count(1)
    of = len(starts) * network_evaluations(generator.process, how.sampler, how.steps, how.spacing)
    for start in starts:
        ids = list(range(start, min(start + size, n)))
        images = generator.draw(ids, labels[ids], how, lambda: on_progress(next(evaluations), of))
        blocks[start] = images.permute(0, 2, 3, 1).numpy()
    return blocks


def together(blocks: dict[int, np.ndarray]) -> np.ndarray:
    """uint8 (n, H, W, C), in the order of ids."""
    return np.ascontiguousarray(np.concatenate([blocks[start] for start in sorted(blocks)]))


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


def draw_to_file(
    run: RunDirectory,
    config: Config,
    n: int,
    label: int | None,
    step: int | None,
    out: Path,
    format: str,
    on_progress: OnProgress,
) -> None:
    """Draw n images, labels in turn or all `label`, in blocks dealt to ranks; rank 0 writes `out` in a FORMATS.

    png: a grid. npz: `images` uint8 (N, H, W, C) and `labels` int64 (N,). adm: the same as `arr_0` and, of a model with
    classes, `arr_1`, grey images as RGB, for that evaluator reads no others. folder: a PNG an image, named by id and
    class, and labels.csv. Raises UserError where `out` cannot be written.
    """
    check_generates(config, run.path)
    if not out.absolute().parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.absolute().parent}")
    if format == "folder" and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out} holds something already, which would be taken for samples; name an empty folder")
    distributed.initialize()
    generator = open_generator(run, config, weights_name(config.eval), distributed.device(), step).generator
    classes = config.model.num_classes
    labels = labels_in_turn(n, classes) if label is None else torch.full((n,), label)
    mine = distributed.agree(
        draw, generator, labels, config.eval, distributed.rank(), distributed.world_size(), on_progress
    )
    parts = distributed.gather_objects(mine)
    blocks = {start: block for part in parts for start, block in part.items()}
    distributed.on_rank_0(_write, out, format, config, blocks, labels, label is None)


def _write(
    out: Path, format: str, config: Config, blocks: dict[int, np.ndarray], labels: Tensor, in_turn: bool
) -> None:
    """blocks as of `draw`, labels int64 (N,); in_turn: they are all classes in turn. Raises UserError."""
    images, n, classes = together(blocks), len(labels), config.model.num_classes
    try:
        if format == "npz":
            with replacing(out) as f:
                np.savez(f, images=images, labels=labels.numpy())
        elif format == "adm":
            rgb = images.repeat(3, axis=-1) if images.shape[-1] == 1 else images
            with replacing(out) as f:
                np.savez(f, **{"arr_0": rgb} | ({"arr_1": labels.numpy()} if classes else {}))
        elif format == "folder":
            ctrl_c.kept(f"{out} does not hold all images; remove it")
            _write_folder(out, images, labels.tolist(), classes, class_names_of(config.data, classes) or [])
        else:
            columns = classes if in_turn and 1 < classes <= 16 else int(np.ceil(np.sqrt(n)))
            tensor = torch.from_numpy(images).permute(0, 3, 1, 2)
            with replacing(out) as f:
                grid(tensor, columns, scale=max(1, 32 // config.data.image_size)).save(f, "png")
    except OSError as e:
        raise UserError(f"cannot write --out {out}: {e.strerror}") from None


def _write_folder(out: Path, images: np.ndarray, labels: list[int], classes: int, names: list[str]) -> None:
    """000012-3-cat.png, the id, the class and its name as far as a file's name allows; labels.csv has it as it is."""
    out.mkdir(exist_ok=True)
    named = {i: name for i, name in enumerate(names) if name != str(i)}
    digits = max(6, len(str(len(images) - 1)))
    with open(out / "labels.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["file", *(["label", "class"] if classes else [])])
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            parts = [f"{i:0{digits}}"]
            if classes:
                plain = re.sub(r"[^\w.]+", "_", named.get(label, ""))
                parts += [str(label), as_file_name(plain) if plain else ""]
            name = "-".join(filter(None, parts)) + ".png"
            Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(out / name)
            table.writerow([name, *([label, named.get(label, label)] if classes else [])])
