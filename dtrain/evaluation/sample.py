"""`dtrain sample`: images of a run into a grid, a folder or an .npz file; `dtrain.load` draws in the same way."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from dtrain import distributed
from dtrain.conditions.build import NOTHING, Said, taken
from dtrain.config import Config, Eval
from dtrain.errors import UserError
from dtrain.evaluation.control import in_turn
from dtrain.evaluation.generate import Generator, OnProgress, quiet
from dtrain.evaluation.opened import open_generator
from dtrain.evaluation.prior import Prior
from dtrain.evaluation.requirements import check_generates, check_walks
from dtrain.evaluation.sample_output import Output, check_place, open_output, packed
from dtrain.evaluation.start import Start
from dtrain.run import RunDirectory


def labels_in_turn(n: int, num_classes: int) -> Tensor:
    """int64 (n,): all classes in turn, 0 for a model without."""
    return torch.arange(n) % max(1, num_classes)


def prompts_in_turn(prompts: list[str], n: int) -> list[str]:
    """n prompts: all in turn."""
    return [prompts[i % len(prompts)] for i in range(n)]


def draw(
    generator: Generator | Prior,
    labels: Tensor,
    how: Eval,
    rank: int = 0,
    world_size: int = 1,
    on_progress: OnProgress = quiet,
    said: Said = NOTHING,
    start: Start | None = None,
) -> Iterator[tuple[int, np.ndarray]]:
    """This rank's blocks of ids 0 … n − 1, drawn when they are asked for: first id and uint8 (b, H, W, C).

    labels: int64 (n,). said: n prompts, or pictures, of each condition that has some. on_progress: called with this
    rank's evaluations of the network. start: the pictures that they begin at, in turn.
    """
    n, size = len(labels), how.batch_size
    starts = range(0, n, size)[rank::world_size]
    evaluations = itertools.count(1)
    of = len(starts) * generator.evaluations(how, start)
    for first in starts:
        ids = list(range(first, min(first + size, n)))
        count = lambda: on_progress(next(evaluations), of)  # noqa: E731
        images = generator.draw(ids, labels[ids], how, count, taken(said, ids), start.of(ids) if start else None)
        yield first, np.ascontiguousarray(images.permute(0, 2, 3, 1).numpy())


def together(blocks: Iterable[tuple[int, np.ndarray]], n: int) -> np.ndarray:
    """uint8 (n, H, W, C) of all blocks as of `draw`, n ≥ 1."""
    found = None
    for start, images in blocks:
        if found is None:
            found = np.empty((n, *images.shape[1:]), np.uint8)
        found[start : start + len(images)] = images
    return found


def draw_to_file(
    run: RunDirectory,
    config: Config,
    n: int,
    label: int | None,
    step: int | None,
    out: Path,
    format: str,
    on_progress: OnProgress,
    prompts: Sequence[str] = (),
    pictures: Said = NOTHING,
    start: Start | None = None,
) -> None:
    """Draw n images, labels in turn or all `label`, in blocks dealt to ranks; rank 0 writes `out` in a FORMATS.

    prompts: in turn too, of a model that is told in words; without any it is told nothing. pictures:
    in turn too, as of `control.of_files`. start: the pictures that they begin at, in turn.

    A collective. Raises UserError where `out` cannot be written.
    """
    check_generates(config, run.path)
    if start is not None:
        check_walks(config, run.path)
    check_place(out, format)
    distributed.initialize()
    generator = open_generator(run, config, distributed.device(), step).generator
    labels = labels_in_turn(n, config.model.num_classes) if label is None else torch.full((n,), label)
    said = prompts_in_turn(list(prompts), n) if prompts else ()
    write(generator, config, labels, out, format, label is None, on_progress, said, in_turn(pictures, n), start)


def write(
    generator: Generator | Prior,
    config: Config,
    labels: Tensor,
    out: Path,
    format: str,
    in_turn: bool,
    on_progress: OnProgress = quiet,
    prompts: Sequence[str] = (),
    pictures: Said = NOTHING,
    start: Start | None = None,
) -> None:
    """Draw images of labels int64 (n,) and write them as they come: no rank holds more than a block and its own.

    in_turn: the labels are all classes in turn. prompts, pictures: one an image, or none. start: in turn.
    A collective; raises UserError.
    """
    said = distributed.agree(generator.conditions.saying, list(prompts)) if prompts else {}
    output = distributed.agree(_on_rank_0, out, open_output, out, format, config, labels, in_turn, prompts)
    try:
        _write_blocks(generator, labels, {**said, **pictures}, config.eval, output, out, format, on_progress, start)
    except UserError as e:
        if output is not None and (left := output.left()):
            raise type(e)(f"{e}; {left}") from None
        raise
    finally:
        if output is not None:
            output.close()


def _on_rank_0(out: Path, function: Callable, *args):
    """function(*args), which writes `out`, on rank 0; None elsewhere. Raises UserError."""
    try:
        return function(*args) if distributed.rank() == 0 else None
    except OSError as e:
        raise UserError(f"cannot write --out {out}: {e.strerror}") from None


def _write_blocks(
    generator: Generator | Prior,
    labels: Tensor,
    said: Said,
    how: Eval,
    output: Output | None,
    out: Path,
    format: str,
    on_progress: OnProgress,
    start: Start | None,
) -> None:
    """output: on rank 0. The ranks draw a block each, then rank 0 takes one after another."""
    rank, world_size = distributed.rank(), distributed.world_size()
    own = draw(generator, labels, how, rank, world_size, on_progress, said, start)
    met: Exception | None = None  # in writing; raised where all ranks meet next, so that none waits for another

    def turn() -> tuple[int, list[bytes]]:
        if met is not None:
            raise met
        start, images = next(own, (0, None))
        return start, packed(format, images) if images is not None else []

    for _ in range(0, len(labels), how.batch_size * world_size):
        for first, block in _received(*distributed.agree(turn), generator.device):
            try:
                if met is None:
                    _on_rank_0(out, output.take, first, block)
            except Exception as e:
                met = e

    def end() -> None:
        if met is not None:
            raise met
        if output is not None:
            _on_rank_0(out, output.finish)

    distributed.agree(end)


def _received(start: int, block: list[bytes], device: torch.device) -> Iterator[tuple[int, list[bytes]]]:
    """On rank 0 the blocks of all ranks that have one, in their order; elsewhere nothing. A collective."""
    rank = distributed.rank()
    for owner, (first, lengths) in enumerate(distributed.gather_objects((start, list(map(len, block))))):
        if rank == 0 and owner == 0:
            yield first, block
        elif rank == 0 and lengths:
            received = torch.empty(sum(lengths), dtype=torch.uint8, device=device)
            dist.recv(received, src=owner)
            data, ends = received.cpu().numpy().tobytes(), list(itertools.accumulate(lengths))
            yield first, [data[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        elif rank == owner and lengths:
            dist.send(torch.frombuffer(bytearray(b"".join(block)), dtype=torch.uint8).to(device), dst=0)
