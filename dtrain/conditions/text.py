"""Words as a condition: tokens that the backbone attends to, of a trained encoder of bytes or of a frozen one.

What an image is told are two arguments of the network, `NAME` and `NAME_mask`, bool (n, L): which tokens there are. An
image without words has none, and the null stands instead, the same one in training and in sampling.
"""

from typing import Protocol

import torch
from torch import Tensor

from dtrain.batch import Batch, Condition
from dtrain.data.fields.caption import Caption


class Encoder(Protocol):
    """tokens int64 (n, L), mask bool (n, L) → what the network is told, (n, L) or (n, L, E), on the tokens' device.

    shape, dtype: of a row. fingerprint: all that decides what it says; None where it is trained and so has none.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    fingerprint: str | None

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor: ...


class Trained:
    """The encoder is in the network: it is told the tokens themselves."""

    dtype = torch.int64
    fingerprint = None

    def __init__(self, length: int):
        self.shape = (length,)

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        return tokens


class Words:
    """null_is_empty: what stands for no words is what the encoder says of an empty caption, and not the network's."""

    def __init__(self, caption: Caption, encoder: Encoder, dropout: float, null_is_empty: bool):
        self._caption, self._encoder, self._dropout = caption, encoder, dropout
        self._null_is_empty = null_is_empty
        self.name = caption.name

    @property
    def fingerprint(self) -> str | None:
        """The encoder's; a large folder takes a while to be read, so nobody pays for it who does not ask."""
        return self._encoder.fingerprint

    def given(self, batch: Batch) -> Condition:
        return self._of_rows(batch[self.name])

    def said(self, words: list[str], device: torch.device) -> Condition:
        """What rows are told these words, of prompts and captions that come in no batch."""
        return self._of_rows(self.rows(words).to(device))

    def _of_rows(self, rows: Tensor) -> Condition:
        return self._nulled(self._encoded(rows), rows[:, 0] == 0)

    def dropped(self, condition: Condition, batch: Batch) -> Condition:
        return self._nulled(condition, batch[f"{self.name}_drop"] < self._dropout)

    def null(self, condition: Condition) -> Condition:
        mask = condition[f"{self.name}_mask"]
        return self._nulled(condition, torch.ones(len(mask), dtype=torch.bool, device=mask.device))

    def of_ids(self, ids: list[int], labels: Tensor) -> Condition:
        """No words: which ones, `given` is told where there are some."""
        return self.null(self.typical(len(ids), labels.device))

    def typical(self, rows: int, device: torch.device | None = None) -> Condition:
        """A stand-in of the shapes that a condition has; no encoder is asked."""
        told = torch.zeros(rows, *self._encoder.shape, dtype=self._encoder.dtype, device=device)
        mask = torch.ones(rows, self._caption.shape[0] - 1, dtype=torch.bool, device=device)
        return {self.name: told, f"{self.name}_mask": mask}

    def all_told(self, condition: Condition, words: str) -> Condition:
        """As many rows as a condition has, told these words."""
        told = condition[self.name]
        one = self._encoded(self.rows([words]).to(told.device))
        return {name: value.to(condition[name].dtype).expand_as(condition[name]) for name, value in one.items()}

    def rows(self, words: list[str]) -> Tensor:
        """int32 (n, 1 + L): what a batch would hold of images with these captions."""
        return self._caption.collate([self._caption.row(one) for one in words])

    def _encoded(self, rows: Tensor) -> Condition:
        """rows: int32 (n, 1 + L)."""
        tokens = rows[:, 1:].long()
        mask = tokens >= 0
        return {self.name: self._encoder(tokens.clamp(min=0), mask), f"{self.name}_mask": mask}

    def _nulled(self, condition: Condition, rows: Tensor) -> Condition:
        """The rows of which `rows`, bool (n,), is true, told nothing."""
        nothing = self._nothing(condition)
        return {
            name: torch.where(rows.view(-1, *[1] * (value.dim() - 1)), nothing[name], value)
            for name, value in condition.items()
            if name in nothing
        }

    def _nothing(self, condition: Condition) -> Condition:
        """What a row that is told nothing has, of the shapes (1, …)."""
        told = condition[self.name]
        if self._null_is_empty:
            return self._encoded(self._caption.collate([self._caption.empty()]).to(told.device))
        return {name: torch.zeros_like(condition[name][:1]) for name in (self.name, f"{self.name}_mask")}


class CachedWords(Words):
    """The words of a batch come encoded (`data/fields/embedded.py`); others, such as prompts, the encoder is asked."""

    def given(self, batch: Batch) -> Condition:
        counts, told = batch[f"{self.name}_tokens"], batch[self.name]
        mask = torch.arange(told.shape[1], device=told.device) < counts[:, :1]  # (n, L)
        return self._nulled({self.name: told, f"{self.name}_mask": mask}, counts[:, 0] == 0)
