"""The `model` section: a DiT, an MMDiT, a UNet or an autoencoder. `dtrain config` prints the string below a key."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from dtrain.config.sections import IdentitySection, NonNegative, Place, Positive
from dtrain.draws import Draw, Purpose

# The DiT paper's table 1 at each of its patch sizes, for latents of 32 × 32: S/2 … XL/8.
DIT_SIZES: dict[str, dict[str, int]] = {
    f"{letter}/{patch}": {"depth": depth, "width": width, "heads": heads, "patch": patch}
    for letter, depth, width, heads in [
        ("S", 12, 384, 6),
        ("B", 12, 768, 12),
        ("L", 24, 1024, 16),
        ("XL", 28, 1152, 16),
    ]
    for patch in (2, 4, 8)
}


def _all_different(octaves: list[int]) -> list[int]:
    if len(set(octaves)) < len(octaves):
        raise ValueError(f"{octaves} names an octave twice; name each once")
    return octaves


Octaves = Annotated[list[Annotated[int, Field(ge=0, le=10)]], AfterValidator(_all_different)]


class Adapt(IdentitySection):
    of: Place
    """the run or file whose frozen weights are adapted; all other keys of the model are that one's"""
    rank: Positive = 8
    """numbers between the two trained matrices of a layer"""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """their product is multiplied with alpha / rank; null: the rank"""

    def identity_keys(self) -> list[str]:
        """Where a base lies may change; what it is is held by its fingerprint."""
        return [key for key in super().identity_keys() if key != "of"]


class Transformer(IdentitySection):
    """What transformers over image patches have in common."""

    name: str
    size: str | None = Field(None, pattern=r"^(S|B|L|XL)/[248]$")
    """a row of the DiT paper's table, such as S/2: letter and patch; the four keys below override it"""
    depth: Positive | None = None
    """blocks"""
    width: Positive | None = None
    """channels of a token; an even multiple of heads, and of 4"""
    heads: Positive | None = None
    """attention heads of a block"""
    patch: Positive | None = None
    """side of a square of pixels that is one token; must divide data.image_size"""

    @model_validator(mode="after")
    def _complete(self):
        if self.size is None:
            missing = [k for k in ("depth", "width", "heads", "patch") if getattr(self, k) is None]
            if missing:
                raise ValueError(f"needs `{missing[0]}`, or a `size` such as S/2")
        width, heads = self.sizes["width"], self.sizes["heads"]
        if width % heads or (width // heads) % 2:
            raise ValueError(f"width {width} must be an even multiple of heads {heads}")
        if width % 4:
            raise ValueError(f"width {width} must be a multiple of 4 for 2-D positions")
        return self

    @property
    def sizes(self) -> dict[str, int]:
        """depth, width, heads and patch, each its own key's or the table's."""
        table = DIT_SIZES[self.size] if self.size else {}
        own = {"depth": self.depth, "width": self.width, "heads": self.heads, "patch": self.patch}
        return table | {key: size for key, size in own.items() if size is not None}

    def draws(self) -> dict[str, Draw]:
        """Argument of the network in training → the random number of each row that it is."""
        return {}


class DiT(Transformer):
    name: Literal["dit"]
    """a transformer over image patches (Peebles & Xie 2023)"""
    qk_norm: bool = False
    """RMS-normalise queries and keys: steadier at high learning rates, unlike published weights"""
    frequency_shift: Literal[0, 1] = 0
    """of the time frequencies; 1 as in diffusers' DiT, to be exported to it"""
    norm: Literal["layer", "rms"] = "layer"
    """of the tokens: LayerNorm without parameters, or RMSNorm with a scale for each channel (JiT)"""
    mlp: Literal["gelu", "swiglu"] = "gelu"
    """a block's perceptron; swiglu is gated, with 8/3 instead of 4 widths of hidden channels (JiT)"""
    positions: Literal["sincos", "rotary"] = "sincos"
    """where a patch lies: sines and cosines are added; rotary: and queries and keys are turned, as JiT has both"""
    patch_bottleneck: Positive | None = None
    """channels that a patch goes through before its token, for large patches of pixels; JiT 128; null: none"""
    context_tokens: NonNegative = 0
    """tokens made of the class, which stand in front of the picture's, beside adaLN; JiT 32"""
    context_from: NonNegative | None = None
    """the block from which on they do, counted from 0; null: a third of the depth, as JiT"""
    fourier: Octaves = Field([])
    """octaves n of sin and cos 2ⁿ π x beside each channel, to see less than a grey level of noise: [7, 8]; none: []"""
    num_classes: NonNegative = 0
    """labels go from 0 to this minus 1; 0: unconditional, labels are not read"""
    control_of: Place | None = None
    """the run or file whose weights a picture of `conditions` controls; all other keys of the model are that one's"""
    adapt: Adapt | None = None
    """low-rank adapters of attention and perceptrons are trained (LoRA), and nothing else"""

    @model_validator(mode="after")
    def _options_fit(self):
        head, depth = self.sizes["width"] // self.sizes["heads"], self.sizes["depth"]
        if self.positions == "rotary" and head % 4:
            raise ValueError(
                f"positions rotary turns pairs of channels by rows and by columns, so width/heads, which is {head}, "
                "must be a multiple of 4"
            )
        if self.context_from is not None and not self.context_tokens:
            raise ValueError(f"context_from {self.context_from} has no effect with context_tokens 0; take 32")
        if self.context_tokens and not self.num_classes:
            raise ValueError(
                f"context_tokens {self.context_tokens} are made of the class, and num_classes is 0; leave them out"
            )
        if self.context_tokens and self.first_with_context >= depth:
            raise ValueError(f"context_from {self.context_from} must be less than depth {depth}; null is {depth // 3}")
        return self

    @property
    def first_with_context(self) -> int:
        """The block from which on the class's tokens are there, if there are any."""
        return self.sizes["depth"] // 3 if self.context_from is None else self.context_from

    @property
    def unlike_published(self) -> str | None:
        """The first key, with its value, that gives the network a part which the published DiT has not."""
        plain = {"norm": "layer", "mlp": "gelu", "positions": "sincos", "patch_bottleneck": None, "context_tokens": 0}
        plain |= {"fourier": []}
        return next((f"model.{k} {getattr(self, k)}" for k, value in plain.items() if getattr(self, k) != value), None)

    def architecture(self, image_size: int) -> dict[str, object]:
        """Key → value of what decides which parameters there are, and their shapes."""
        sizes = {f"model.{k}": size for k, size in self.sizes.items() if k != "heads" or self.qk_norm}
        parts = ("qk_norm", "norm", "mlp", "patch_bottleneck", "context_tokens", "fourier")
        # Its positions are parameters that do not learn.
        return {"data.image_size": image_size, **sizes, **{f"model.{part}": getattr(self, part) for part in parts}}

    def identity_keys(self) -> list[str]:
        """Where a base lies may change; what it is is held by its fingerprint."""
        return [key for key in super().identity_keys() if key != "control_of"]


class MMDiT(Transformer):
    name: Literal["mmdit"]
    """two streams of tokens, of image patches and of words, and one attention over both (Esser et al. 2024)"""
    num_classes: NonNegative = 0
    """labels go from 0 to this minus 1; 0: no class beside the words, labels are not read"""

    def architecture(self, image_size: int) -> dict[str, object]:
        """Key → value of what decides which parameters there are, and their shapes."""
        return {"data.image_size": image_size} | {f"model.{k}": size for k, size in self.sizes.items()}


class UNet(IdentitySection):
    name: Literal["unet"]
    """convolutions at several resolutions (Ho et al. 2020), with attention at some"""
    width: Positive
    """channels at full resolution; a multiple of 4"""
    multipliers: list[Positive] = Field([1, 2, 2, 2], min_length=1)
    """channels of each level, in widths; each level after the first halves the side"""
    res_blocks: Positive = 2
    """residual blocks of each level on the way down; one more on the way up"""
    attention: list[Positive] = Field([16])
    """sides of the levels that get attention, in pixels"""
    head_width: Positive | None = None
    """channels of one attention head; null: a single head"""
    scale_shift: bool = False
    """the time scales and shifts after the norm (ADM); false: it is added before it (DDPM)"""
    resblock_updown: bool = False
    """residual blocks halve and double the side (ADM); false: a convolution does (DDPM)"""
    group_norm_eps: Annotated[float, Field(gt=0)] = 1e-6
    """of the group norms; 1e-5 in ADM"""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """share of a block's activations that are dropped in training"""
    fourier: Octaves = Field([])
    """octaves n of sin and cos 2ⁿ π x beside each channel, to see less than a grey level of noise: [7, 8]; none: []"""
    num_classes: NonNegative = 0
    """labels go from 0 to this minus 1; 0: unconditional, labels are not read"""
    control_of: Place | None = None
    """the run or file whose weights a picture of `conditions` controls; all other keys of the model are that one's"""
    adapt: Adapt | None = None
    """low-rank adapters of attention and perceptrons are trained (LoRA), and nothing else"""

    @model_validator(mode="after")
    def _consistent(self):
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 for its group norms")
        for m in self.multipliers:
            if self.head_width and self.width * m % self.head_width:
                raise ValueError(
                    f"head_width {self.head_width} must divide the {self.width * m} channels of every level"
                )
        return self

    @property
    def unlike_published(self) -> str | None:
        """The first key, with its value, that gives the network a part which the published UNet has not."""
        return f"model.fourier {self.fourier}" if self.fourier else None

    def architecture(self, image_size: int) -> dict[str, object]:
        """Key → value of what decides which parameters there are, and their shapes."""
        keys = {
            f"model.{k}": getattr(self, k)
            for k in ("width", "multipliers", "res_blocks", "scale_shift", "resblock_updown", "fourier")
        }
        levels = range(len(self.multipliers))
        return keys | {"model.attention": [i for i in levels if image_size >> i in self.attention]}

    def identity_keys(self) -> list[str]:
        """Where a base lies may change; what it is is held by its fingerprint."""
        return [key for key in super().identity_keys() if key != "control_of"]

    def draws(self) -> dict[str, Draw]:
        """Argument of the network in training → the random number of each row that it is."""
        return {"keys": Draw("dropout", Purpose.DROPOUT, "word")} if self.dropout else {}


class KLAutoencoder(IdentitySection):
    name: Literal["kl_autoencoder"]
    """pictures to latents and back (Rombach et al. 2022), trained by objective.kind autoencoding"""
    width: Positive
    """channels at full resolution; a multiple of 4"""
    multipliers: list[Positive] = Field([1, 2], min_length=1)
    """channels of each level, in widths; each level after the first halves the side"""
    res_blocks: Positive = 1
    """residual blocks of each level of the encoder; the decoder has one more"""
    attention: bool = False
    """self-attention at the lowest resolution, as published ones have"""
    latent_channels: Positive = 4
    """channels of a latent"""
    num_classes: Literal[0] = 0
    """an autoencoder is told no class"""

    @model_validator(mode="after")
    def _consistent(self):
        if self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 for its group norms")
        return self

    @property
    def downscale(self) -> int:
        """f: pixels of a side that become one of a latent."""
        return 2 ** (len(self.multipliers) - 1)

    def architecture(self, image_size: int) -> dict[str, object]:
        """Key → value of what decides which parameters there are, and their shapes."""
        keys = ("width", "multipliers", "res_blocks", "attention", "latent_channels")
        return {f"model.{key}": getattr(self, key) for key in keys}

    def draws(self) -> dict[str, Draw]:
        """Argument of the network in training → the random number of each row that it is."""
        return {}
