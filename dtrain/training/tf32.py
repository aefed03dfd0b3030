"""In which arithmetic a GPU computes fp32 products, and by which algorithms it convolves. A CPU takes no notice."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def set_tf32(which: str) -> None:
    """`train.tf32`, said to PyTorch, so that no library and no version of it decides.

    The fastest of cuDNN's algorithms is found by trying, once a shape: those of a training never change.
    """
    torch.backends.cuda.matmul.allow_tf32 = which == "all"
    torch.backends.cudnn.allow_tf32 = which != "none"
    torch.backends.cudnn.benchmark = torch.cuda.is_available()


@contextmanager
def untimed_algorithms() -> Iterator[None]:
    """No algorithm chosen by its time: each rounds otherwise, and every rank must draw the same image of an id."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
