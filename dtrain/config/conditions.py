"""The section of a condition of words, `conditions.NAME` with kind text. Plug-ins bring further kinds."""

from typing import Literal

from pydantic import Field, model_validator

from dtrain.config.sections import PartSection, Positive, Probability

BYTES = "bytes"
BEGIN = 256  # before the bytes, so that an empty caption is a token too
VOCABULARY = 257  # of that encoder


class Text(PartSection):
    kind: Literal["text"] = "text"
    """the network is told in words, which it attends to; a section called `text` needs no `kind`"""
    field: str = Field("txt", pattern=r"^(txt|([\w-]+\.)*json:[^.:\s]+(\.[^.:\s]+)*)$")
    """where a sample's caption is: txt, or a path into json such as json:caption; of a list there, one by chance"""
    encoder: Literal["bytes"] = BYTES
    """bytes: a small transformer over UTF-8, trained with the network"""
    length: Positive = 64
    """tokens that are told; a longer caption is cut, and counted"""
    width: Positive = 128
    """channels of the encoder's tokens; a multiple of 32"""
    depth: Positive = 2
    """transformer blocks of the encoder"""
    null: Literal["learned", "zeros", "empty"] = "learned"
    """what stands for no words: a token that is trained, one of zeros, or what the encoder says of an empty caption"""
    dropout: Probability = 0.1
    """share of images told nothing, so that guidance works; 0: guidance is refused"""

    @model_validator(mode="after")
    def _consistent(self):
        if self.width % 32:
            raise ValueError(f"width {self.width} of encoder bytes must be a multiple of 32, the width of its heads")
        if self.length < 2:
            raise ValueError(f"length {self.length} leaves no room for words beside the token that begins them")
        return self
