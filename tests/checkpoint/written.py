"""A checkpoint of given tensors, without a training."""

from dataclasses import dataclass

import torch

from dtrain.checkpoint.writer import Writer


@dataclass
class Piece:
    """What a rank holds of a tensor: its elements from `start` on, flat."""

    name: str
    start: int
    values: torch.Tensor


def save(directory, tensors, cuts, step=1, meta=None):
    """Write `tensors` as a world of len(cuts) ranks, rank r holding elements cuts[r][name] = (start, stop)."""
    directory.mkdir(exist_ok=True)
    writers = [Writer(directory, rank, len(cuts)) for rank in range(len(cuts))]
    for writer, cut in zip(writers, cuts, strict=True):
        pieces = [Piece(n, a, torch.from_numpy(tensors[n][a:b])) for n, (a, b) in cut.items() if b > a]
        writer.begin(step, pieces, {n: len(t) for n, t in tensors.items()}, meta or {"step": step})
    for writer in reversed(writers):
        writer.wait()
        assert writer.written
    for writer in reversed(writers):
        path = writer.commit()
    return path
