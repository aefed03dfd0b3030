"""A batch: tensors by name, a row an image."""

from collections.abc import Iterator

from torch import Tensor

Batch = dict[str, Tensor]  # every tensor (n, …)
Condition = dict[str, Tensor]  # what a network is told beside x_t and t: its arguments by name, every tensor (n, …)


def split(batch: Batch, rows: int) -> Iterator[Batch]:
    """The batch in parts of `rows` rows, which divide it."""
    for start in range(0, len(batch["k"]), rows):
        yield {name: column[start : start + rows] for name, column in batch.items()}
