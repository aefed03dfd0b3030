"""Cached words: what a frozen encoder said of a sample's captions, each as long as it is.

A file of safetensors has two tensors: `tokens` (T, E), those of all captions one after the other, and `counts`, int32
(captions, 2): how many of them are a caption's, and how many tokens the whole caption has. A sample without words has
one caption of none.
"""

import json
import math
from typing import TYPE_CHECKING, NamedTuple

from dtrain.data.fields.caption import chosen
from dtrain.data.fields.field import Field, View
from dtrain.data.shards.sample_files import embeddings_field
from dtrain.errors import BadSample

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from torch import Tensor

# dtype as a config names it → (as safetensors do, as NumPy reads it: it knows no bfloat16)
DTYPES = {"float32": ("F32", "<f4"), "float16": ("F16", "<f2"), "bfloat16": ("BF16", "<u2")}
_COUNTS = ("I32", "<i4")
_LONGEST_HEADER = 1 << 16


class Content(NamedTuple):
    """tokens (T, E), counts int32 (captions, 2): views on a file's bytes."""

    tokens: "np.ndarray"
    counts: "np.ndarray"

    @classmethod
    def of(cls, data: bytes, dtype: str, length: int, width: int) -> "Content":
        """Of a file whose tokens have this dtype and width, at most `length` a caption. Raises BadSample."""
        found = cls(_array(data, "tokens", *DTYPES[dtype]), _array(data, "counts", *_COUNTS))
        shapes = found.tokens.shape, found.counts.shape
        if len(shapes[0]) != 2 or shapes[0][1] != width or len(shapes[1]) != 2 or shapes[1][1] != 2 or not shapes[1][0]:
            raise BadSample(
                f"holds tokens {list(shapes[0])} and counts {list(shapes[1])}, not of {width}; encode again"
            )
        kept = found.counts[:, 0]
        if kept.min() < 0 or kept.max() > length or kept.sum() != shapes[0][0]:
            raise BadSample(f"counts other tokens than it holds, or captions longer than {length}; encode again")
        return found

    def caption(self, choice: float) -> int:
        return chosen(choice, len(self.counts))


class Embedded(Field):
    """The tokens of a caption, (L, E) in the dtype of the cache, 0 where the caption is shorter; float32 completed."""

    chooses = True

    def __init__(self, name: str, length: int, width: int, dtype: str):
        self.name, self.extensions, self.shape, self.dtype = name, (embeddings_field(name),), (length, width), dtype

    @property
    def described(self) -> str:
        return f"a {self.extensions[0]} of cached words"

    def read(self, data: bytes, view: View) -> "np.ndarray":
        import numpy as np

        words = Content.of(data, self.dtype, *self.shape)
        caption = words.caption(view.choice)
        end = int(words.counts[: caption + 1, 0].sum())
        own = words.tokens[end - int(words.counts[caption, 0]) : end]
        row = np.zeros(self.shape, dtype=own.dtype)
        row[: len(own)] = own
        return row

    def collate(self, rows: "Sequence[np.ndarray]") -> "Tensor":
        import torch

        column = super().collate(rows)
        return column.view(torch.bfloat16) if self.dtype == "bfloat16" else column

    def complete(self, column: "Tensor", mirrored: "Tensor | None") -> "Tensor":
        return column.float()


class TokenCounts(Field):
    """Of the same caption, int32 (2,): the tokens that are told, and those that the whole caption has."""

    chooses = True
    dtype, shape = "int32", (2,)

    def __init__(self, tokens: Embedded):
        self.name, self.extensions, self._tokens = f"{tokens.name}_tokens", tokens.extensions, tokens

    @property
    def described(self) -> str:
        return self._tokens.described

    def read(self, data: bytes, view: View) -> "np.ndarray":
        words = Content.of(data, self._tokens.dtype, *self._tokens.shape)
        return words.counts[words.caption(view.choice)]

    def truncated(self, column: "Tensor") -> int:
        """How many rows of (n, 2) were cut."""
        return int((column[:, 1] > column[:, 0]).sum())


def _array(data: bytes, name: str, dtype: str, as_numpy: str) -> "np.ndarray":
    """A tensor of a file of safetensors, without a copy. Raises BadSample."""
    import numpy as np

    length = int.from_bytes(data[:8], "little")
    try:
        if not 2 <= length <= min(_LONGEST_HEADER, len(data) - 8):
            raise ValueError("it has no header")
        found = json.loads(data[8 : 8 + length])[name]
        if found["dtype"] != dtype:
            raise ValueError(f"it is {found['dtype']}, not {dtype}")
        shape, (start, end) = tuple(map(int, found["shape"])), found["data_offsets"]
        size = math.prod(shape) * np.dtype(as_numpy).itemsize
        if min(shape, default=0) < 0 or start < 0 or end - start != size or 8 + length + end > len(data):
            raise ValueError(f"{name} lies outside of it")
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as e:
        raise BadSample(f"is no file of safetensors with {name} ({e}); encode again") from None
    return np.frombuffer(data, as_numpy, math.prod(shape), 8 + length + start).reshape(shape)
