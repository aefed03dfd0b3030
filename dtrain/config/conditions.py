"""The sections of conditions, `conditions.NAME`: of words and of pictures. Plug-ins bring further kinds."""

import os
from typing import Any, Literal

from pydantic import Field, model_validator

from dtrain.config.encoders import described
from dtrain.config.sections import NonNegativeFloat, PartSection, Place, Positive, Probability

BYTES = "bytes"
BEGIN = 256  # before the bytes, so that an empty caption is a token too
VOCABULARY = 257  # of that encoder
OWN_WIDTH = 128


class Text(PartSection):
    kind: Literal["text"] = "text"
    """the network is told in words, which it attends to; a section called `text` needs no `kind`"""
    field: str = Field("txt", pattern=r"^(txt|([\w-]+\.)*json:[^.:\s]+(\.[^.:\s]+)*)$")
    """where a sample's caption is: txt, or a path into json such as json:caption; of a list there, one by chance"""
    encoder: Place = BYTES
    """bytes: a small transformer over UTF-8, trained along; else a folder of transformers, frozen: CLIP, T5 or BERT"""
    length: Positive = 64
    """tokens that are told; a longer caption is cut, and counted"""
    width: Positive | None = None
    """channels of the encoder's tokens; null: 128 of bytes, else as the folder's config.json says; a run keeps it"""
    depth: Positive = 2
    """transformer blocks of encoder bytes"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of a frozen encoder, whatever deepspeed.precision is"""
    block: Positive = 1
    """captions that a frozen encoder takes together; larger blocks are faster and differ by 1e-6"""
    cached: Literal["float16", "bfloat16", "float32"] | None = None
    """dtype in which the shards hold what a frozen encoder says (`dtrain encode --text`); null: encoded in each step"""
    null: Literal["learned", "zeros", "empty"] = "learned"
    """what stands for no words: a token that is trained, one of zeros, or what the encoder says of an empty caption"""
    dropout: Probability = 0.1
    """share of images told nothing, so that guidance works; 0: guidance is refused"""

    @model_validator(mode="before")
    @classmethod
    def _width_of_encoder(cls, tree: Any) -> Any:
        """What the network's shape follows from is kept with the run, which is read back where `encoder` is not."""
        if not isinstance(tree, dict):
            return tree
        tree = {"null" if key is None else key: value for key, value in tree.items()}  # YAML's `null:` is no text
        if tree.get("width") is not None:
            return tree
        encoder = tree.get("encoder", BYTES)
        if encoder == BYTES:
            return tree | {"width": OWN_WIDTH}
        return tree | {"width": described(os.path.expanduser(encoder)).width} if isinstance(encoder, str) else tree

    @model_validator(mode="after")
    def _consistent(self):
        if self.trained and self.width % 32:
            raise ValueError(f"width {self.width} of encoder bytes must be a multiple of 32, the width of its heads")
        if self.trained and self.cached:
            raise ValueError(f"cached {self.cached}: encoder bytes is trained and has no cache; take a folder, or null")
        if self.length < 2:
            raise ValueError(f"length {self.length} leaves no room for words beside the token that begins them")
        return self

    @property
    def trained(self) -> bool:
        """Whether the encoder is a part of the network, and not a folder's."""
        return self.encoder == BYTES

    def identity_keys(self) -> list[str]:
        """Where a frozen encoder lies may change; what it is is held by its fingerprint."""
        return [key for key in super().identity_keys() if self.trained or key != "encoder"]


# Operator → the range of its amount, where it has one: edges and mask a threshold, blur a deviation in pixels.
AMOUNTS = {"edges": (0.1, 0.1), "mask": (0.5, 0.5), "blur": (1.0, 2.0)}
IN_CELLS = ("mask", "low_resolution")


class Picture(PartSection):
    kind: Literal["picture"] = "picture"
    """the network is told a picture, which a trained copy of model.control_of takes in (ControlNet)"""
    operator: Literal["edges", "blur", "mask", "low_resolution"] | None = None
    """the picture is computed from the image itself, as it is cropped and mirrored"""
    field: str | None = Field(None, pattern=r"^[\w-]+(\.[\w-]+)*$")
    """or it is a file of each sample, by its extension such as depth.png, cropped and mirrored as the image"""
    grid: Positive | None = None
    """cells of a side: of operator mask, whether a cell is bright; of low_resolution, its mean"""
    amount: tuple[NonNegativeFloat, NonNegativeFloat] | None = None
    """drawn for each image between: edges, threshold of the slope; mask, of brightness; blur, deviation in pixels"""
    dropout: Probability = 0.0
    """share of images told nothing, which is the base alone: it trains others beside to do without this one"""

    @model_validator(mode="before")
    @classmethod
    def _amount_of_operator(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and tree.get("amount") is None and tree.get("operator") in AMOUNTS:
            return tree | {"amount": AMOUNTS[tree["operator"]]}
        return tree

    @model_validator(mode="after")
    def _consistent(self):
        if (self.operator is None) == (self.field is None):
            raise ValueError("a picture is either computed, by `operator`, or a file of each sample, by `field`")
        if (self.grid is not None) != (self.operator in IN_CELLS):
            taken = f"operator {self.operator} has no cells" if self.grid else f"operator {self.operator} needs `grid`"
            raise ValueError(f"{taken}; {'leave grid out' if self.grid else 'such as 4'}")
        if self.amount is not None and self.operator not in AMOUNTS:
            raise ValueError(f"amount has no effect on operator {self.operator}; leave it out")
        if self.amount is not None and self.amount[0] > self.amount[1]:
            raise ValueError(f"amount {list(self.amount)} must rise")
        if self.operator == "blur" and self.amount[0] == 0:
            raise ValueError("amount of blur begins at 0, which blurs nothing; take 0.5")
        return self

    def channels(self, of_image: int) -> int:
        """How many the picture that is told has."""
        return 1 if self.operator in ("edges", "mask") else of_image
