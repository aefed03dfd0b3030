"""The `data` section: what is trained on, in which order, and how a picture is cut."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from dtrain.config.chosen import Chosen
from dtrain.config.sections import NonNegative, Place, Positive, Probability, Section

# What a batch calls its own.
RESERVED = {"k", "image", "label", "time", "noise", "drop", "dropout"}


class Source(Section):
    """A further data set to mix in."""

    name: str = Field(pattern=r"^[\w.\-]+$")
    """as the journal counts it"""
    shards: Place
    """the folder that holds its shards, or its URL"""
    manifest: Place | None = None
    """null: manifest.json beside its shards"""
    weight: Annotated[float, Field(gt=0)]
    """how often its images come, against data.weight and the other sources"""

    @property
    def manifest_path(self) -> Path:
        return Path(self.manifest) if self.manifest else Path(self.shards) / "manifest.json"


class ArrayField(Section):
    """A .npy field that comes with every image, such as a latent or a text embedding."""

    field: str = Field(pattern=r"^(.*\.)?npy$")
    """the extension in the shards, such as latent.npy"""
    shape: list[Positive]
    """of one sample's array; the longest, where the first axis is ragged"""
    dtype: Literal["float16", "float32", "float64", "uint8", "int32", "int64"] = "float32"
    """of the array, as the file has it"""
    ragged: bool = False
    """samples may be shorter along the first axis: zeros follow, and NAME_mask in the batch says what there is"""


class Data(Section):
    shards: Place
    """the folder that holds the shards, or its URL: s3://, gs://, http(s)://"""
    manifest: Place | None = None
    """null: manifest.json beside the shards"""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """of these shards, where others are mixed in"""
    mix: list[Source] = Field([])
    """data sets to mix in, by weight: a list of name, shards, manifest, weight"""
    arrays: dict[str, ArrayField] = Field({})
    """name in the batch → .npy field that comes with each image: field, shape, dtype"""
    fields: Annotated[dict[str, Section], Chosen("field", {}, by_name=True)] = Field({})
    """name in the batch → another file that comes with each image: kind, and what that kind takes, of plug-ins"""
    holdout: Place | None = None
    """the manifest of the split that samples are compared with, a local file; not trained on"""
    holdout_shards: Place | None = None
    """the folder or URL of its shards; null: beside its manifest"""
    image_size: Positive
    """side in pixels: shorter sides are scaled to it, longer ones cut to it"""
    channels: Literal[1, 3] = 3
    """1 is grey, 3 are red, green and blue"""
    batch_size: Positive
    """global: images per optimizer step over all ranks"""
    streams: Positive | None = None
    """places read at once; null: one per 1,024 samples, at most 256; stays for the life of the run"""
    shuffle_window: Positive = 4096
    """samples of one stream that are shuffled among each other"""
    workers: NonNegative | None = None
    """loader processes a rank; null: its share of the node's cores but one, at least 1 and at most 8"""
    crop: Literal["centre", "random"] = "centre"
    """random: scaled by up to 5/4 and cut anywhere, as ADM does"""
    scaling: Literal["bicubic", "adm"] = "bicubic"
    """bicubic: cut, then scaled in one antialiased step; adm: halved by averaging, then bicubic by Pillow, then cut"""
    flip: bool = False
    """mirror each image with probability 1/2"""
    exif: Literal["apply", "ignore"] = "apply"
    """apply: turn each picture as its EXIF orientation says, as viewers do; ignore: its pixels as they are stored"""
    on_error: Literal["raise", "replace"] = "raise"
    """replace: a damaged sample gives way to another of its stream; raise: it ends the run"""
    max_bad_fraction: Probability = 0.001
    """of the images since the start, at least an epoch's; more damaged ones end the run"""
    allow_pipe: bool = False
    """let `pipe:` shards run their command in a shell"""
    cache_dir: Place | None = None
    """blocks of remote shards, shared by the ranks of a node; null: ~/.cache/dtrain"""
    cache_bytes: Annotated[int, Field(ge=1 << 20)] = 16 << 30
    """the most that cache holds"""

    def identity_keys(self) -> list[str]:
        order = ["streams", "shuffle_window", "weight"]
        return [*order, "image_size", "channels", "crop", "scaling", "flip", "exif", "arrays", "fields"]

    @model_validator(mode="after")
    def _sources(self):
        names = [s.name for s in self.mix]
        if "main" in names or len(set(names)) < len(names):
            raise ValueError("mix: every source needs a name of its own; `main` is data.shards itself")
        for source in (self, *self.mix):
            if source.shards.startswith("pipe:") and not self.allow_pipe:
                raise ValueError(f"shards {source.shards!r} would run a command; say allow_pipe: true to let it")
            if ("://" in source.shards or source.shards.startswith("pipe:")) and not source.manifest:
                raise ValueError(f"shards {source.shards!r} are remote; name their `manifest`, a local file")
        if self.holdout and "://" in self.holdout:
            raise ValueError(f"holdout {self.holdout!r} is a URL; name a local manifest, its shards in holdout_shards")
        if self.holdout_shards and not self.holdout:
            raise ValueError("holdout_shards needs holdout, the manifest of these shards")
        if (self.holdout_shards or "").startswith("pipe:") and not self.allow_pipe:
            raise ValueError(
                f"holdout_shards {self.holdout_shards!r} would run a command; say allow_pipe: true to let it"
            )
        masks = {f"{name}_mask" for name, array in self.arrays.items() if array.ragged}
        taken = RESERVED & {*self.arrays, *self.fields} | (self.arrays.keys() | masks) & self.fields.keys()
        taken |= masks & self.arrays.keys()
        if taken:
            raise ValueError(f"arrays: {min(taken)!r} is what a batch calls something else; choose another name")
        return self

    @property
    def manifest_path(self) -> Path:
        return Path(self.manifest) if self.manifest else Path(self.shards) / "manifest.json"

    @property
    def upright(self) -> bool:
        """Whether pictures are turned as their EXIF orientation says."""
        return self.exif == "apply"
