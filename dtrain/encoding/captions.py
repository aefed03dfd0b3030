"""Captions as what a frozen text encoder says of them, each as long as it is."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import ValidationError

from dtrain.conditions.encoders import Frozen
from dtrain.conditions.requirements import ITEM_BYTES, caption_bytes, fingerprint_of
from dtrain.config import Text
from dtrain.config.encoders import check as check_folder
from dtrain.data.declared import caption
from dtrain.data.shards.embeddings import Embeddings
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.sample_files import embeddings_field
from dtrain.errors import BadSample, UserError
from dtrain.terminal import size as shown

COUNTS = ("captions", "truncated", "wordless", "tokens")
LOOKED_AT = 256  # samples, of how long captions are


@dataclass(frozen=True)
class CaptionRequest:
    """How captions are encoded. name: of the condition that will read them. folder, field, length, precision, block: as
    its section has them. dtype: of what is kept.
    """

    folder: str
    name: str = "text"
    field: str = "txt"
    length: int = 64
    dtype: str = "float16"
    precision: str = "fp32"
    block: int = 1

    @property
    def section(self) -> Text:
        """The condition that such words are of. Raises UserError for what cannot be."""
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"--precision {self.precision} is neither fp32 nor bf16")
        if self.dtype not in ITEM_BYTES:
            raise UserError(f"--dtype {self.dtype} is none of {', '.join(ITEM_BYTES)}")
        given = {"encoder": self.folder, "field": self.field, "length": self.length, "cached": self.dtype}
        try:
            return Text(**given, precision=self.precision, block=self.block)
        except ValidationError as e:
            first = e.errors()[0]
            option = {"field": "--caption", "encoder": "--text"}.get(".".join(map(str, first["loc"])), "--text")
            raise UserError(f"{option}: {first['msg'].removeprefix('Value error, ')}") from None

    def checked(self, source: Manifest) -> dict:
        """All that decides the bytes of what is kept, as plain data. Raises UserError for what cannot be."""
        section, member = self.section, embeddings_field(self.name)
        check_folder("--text", section.width, section.encoder)
        (extension,) = caption(self.name, section).extensions
        if extension not in source.fields:
            raise UserError(f"{source.path} has fields {', '.join(source.fields)}, and no {extension} with captions")
        if not self.name.replace("-", "_").isidentifier():
            raise UserError(f"--name {self.name!r} is no name of a condition; take one of letters, such as text")
        if member in source.fields:
            raise UserError(f"{source.path} has {member} already; name the other condition with --name")
        return {
            "name": self.name,
            "source": source.hash,
            "encoder": fingerprint_of(section),
            "field": section.field,
            "length": section.length,
            "width": section.width,
            "precision": section.precision,
            "block": section.block,
            "dtype": self.dtype,
        }


class Captions:
    """What becomes of the captions of one shard after the other."""

    key = "embeddings"

    def __init__(self, request: CaptionRequest, device: torch.device):
        self._section, self._device, self._dtype = request.section, device, getattr(torch, request.dtype)
        self._caption = caption(request.name, self._section)
        self.member, self.reads = embeddings_field(request.name), self._caption.extensions
        self.start_shard()

    def start_shard(self) -> None:
        """A new encoder, which keeps nothing of other shards: its blocks are the same at any number of ranks."""
        self._encoder, self._counts = Frozen(self._section), dict.fromkeys(COUNTS, 0)

    def begin(self, samples: range, files: list[dict[str, bytes]], reader: ShardReader, pool: ThreadPoolExecutor):
        """Raises BadSample."""
        return samples, reader, [self._words(reader, *one) for one in zip(samples, files, strict=True)]

    def made(self, begun) -> Iterator[bytes]:
        """A file of safetensors of each sample (`data/fields/embedded.py`). Raises BadSample."""
        from safetensors.torch import save

        samples, reader, words = begun
        several = [max(1, len(one)) for one in words]
        rows = np.stack([self._caption.row(one) for own in words for one in own or [""]])
        counts = np.stack([np.minimum(rows[:, 0], self._section.length), rows[:, 0]], 1)
        encoded, at = self._encoded(torch.from_numpy(rows), counts[:, 0].tolist()), 0
        for sample, own, number in zip(samples, words, several, strict=True):
            tokens = torch.cat([next(encoded) for _ in range(number)])  # (T, E)
            if not torch.isfinite(kept := tokens.to(self._dtype)).all():
                fix = "--precision fp32" if not torch.isfinite(tokens).all() else "--dtype bfloat16"
                raise BadSample(f"{reader.name(sample, self.reads[0])}: no finite numbers are kept of it; take {fix}")
            mine = counts[at : at + number]
            self._count(len(own), mine)
            yield save({"tokens": kept, "counts": torch.from_numpy(mine.copy())})
            at += number

    def note(self) -> dict:
        """How many captions, and of which kinds, the shard has."""
        return dict(self._counts)

    def size(self, source: Manifest) -> tuple[float, str]:
        """(bytes of a sample's member, what to say of them), by a look at some captions."""
        reader, step = ShardReader(source, source.place), max(1, source.samples // LOOKED_AT)
        captions, tokens = [], []
        for sample in range(0, source.samples, step):
            words = self._words(reader, sample, reader.read(sample, self.reads))
            captions.append(max(1, len(words)))
            tokens.append(sum(min(int(self._caption.row(one)[0]), self._section.length) for one in words))
        dtype = str(self._dtype).removeprefix("torch.")
        mean = sum(tokens) / max(1, sum(captions))
        most = shown(caption_bytes(self._section, dtype))
        said = f"words ({mean:.0f} of at most {self._section.length} tokens a caption, {most})"
        return 192 + 8 * np.mean(captions) + caption_bytes(self._section, dtype, float(np.mean(tokens))), said

    def _words(self, reader: ShardReader, sample: int, files: dict[str, bytes]) -> list[str]:
        try:
            return self._caption.all_words(files[self.reads[0]])
        except KeyError:
            raise BadSample(f"{reader.name(sample)} is of a sample without {self._caption.described}") from None
        except BadSample as e:
            raise BadSample(f"{reader.name(sample, self.reads[0])} {e}") from None

    def _encoded(self, rows: torch.Tensor, kept: list[int]) -> Iterator[torch.Tensor]:
        """float32 (tokens, E) of each caption. rows: int32 (n, 1 + L); kept: tokens of each, 0 without words."""
        block = self._section.block
        for first in range(0, len(rows), block):
            tokens = rows[first : first + block, 1:].long().to(self._device)
            said = self._encoder(tokens.clamp(min=0), tokens >= 0) if any(kept[first : first + block]) else tokens
            for row, length in enumerate(kept[first : first + block]):
                yield said[row, :length].cpu() if length else torch.zeros(0, self._section.width)

    def _count(self, captions: int, counts: np.ndarray) -> None:
        found = captions, int((counts[:, 1] > counts[:, 0]).sum()), int(not captions), int(counts[:, 0].sum())
        for name, number in zip(COUNTS, found, strict=True):
            self._counts[name] += number


def merged(asked: dict, notes: Iterable[dict]) -> Embeddings:
    """Of all shards."""
    notes = list(notes)
    return Embeddings(**asked, **{name: sum(note[name] for note in notes) for name in COUNTS})
