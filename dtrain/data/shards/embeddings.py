"""What cached words were made of, as the manifest says: whoever trains on them compares each part with what it has."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from dtrain.data.shards.sample_files import embeddings_field

Positive = Annotated[int, Field(gt=0, lt=1 << 63)]
NonNegative = Annotated[int, Field(ge=0, lt=1 << 63)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Embeddings(BaseModel):
    """The captions, the encoder and how it was used; and how many captions there were, over all samples."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=r"^[\w-]+$")]
    """of the condition that reads them"""
    source: Sha256
    """hash of the manifest of the captions"""
    encoder: Sha256
    """of its folder's files, its precision and its block: the fingerprint of a run that encodes in each step"""
    field: str
    """where the captions are, as `conditions.NAME.field`"""
    length: Positive
    """tokens at which the encoder ran; fewer are kept of a shorter caption"""
    width: Positive
    precision: Literal["fp32", "bf16"]
    block: Positive
    dtype: Literal["float16", "bfloat16", "float32"]
    captions: NonNegative
    truncated: NonNegative
    """of the captions, longer than `length`"""
    wordless: NonNegative
    """samples without a caption"""
    tokens: NonNegative
    """that are kept of all captions"""

    @property
    def member(self) -> str:
        return embeddings_field(self.name)

    @property
    def about(self) -> str:
        """A line about them."""
        mean = self.tokens / max(1, self.captions)
        parts = [
            f"{self.captions:,} captions of {self.field} are cached for conditions.{self.name}, {mean:.1f} tokens each"
        ]
        parts += [f"{self.truncated:,} longer than {self.length}, cut"] if self.truncated else []
        parts += [f"{self.wordless:,} samples without words, told nothing"] if self.wordless else []
        return "; ".join(parts)
