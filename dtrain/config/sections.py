"""The sections of a run's configuration, key by key; what cannot be combined within one is refused by it.

A string below a key says what the key does: `dtrain config` reads it from here (`dtrain.config.keys`).
"""

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    field_serializer,
    field_validator,
    model_serializer,
    model_validator,
)

from dtrain import addresses
from dtrain.credentials import masked, value_without_credentials

Positive = Annotated[int, Field(gt=0)]
PIN = "#sha256="  # between a TorchScript file and the hash that it must have
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
# A file, a folder or a URL. `~` is the home of whoever starts: no shell expands it in a file, or after `key=`. The
# login and the query of a URL go to whoever opens it (`dtrain.addresses`); a config does without.
Place = Annotated[str, AfterValidator(os.path.expanduser), AfterValidator(addresses.kept)]


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of a tree of plain data; lists become one line of YAML."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            out |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list):
            out[f"{prefix}{key}"] = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
        else:
            out[f"{prefix}{key}"] = value
    return out


def _name_of_a_folder(value: str | None) -> str | None:
    if value is not None and not value.strip("."):
        raise ValueError(f"{value!r} is a place and no name")
    return value


def _at_home(uri: str | None) -> str | None:
    """A SQLite file below `~` at the home of whoever starts."""
    place = (uri or "").removeprefix("sqlite:///")
    return f"sqlite:///{os.path.expanduser(place)}" if place.startswith("~") else uri


def _without_login(uri: str | None) -> str | None:
    return uri and addresses.kept(uri)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=False)

    @model_serializer(mode="wrap")
    def _as_kept(self, serialize: Any, info: Any) -> dict[str, Any]:
        """As JSON, which is what config.yaml, checkpoints and MLflow have, without the commands of `pipe:`."""
        tree = serialize(self)
        if info.mode == "json":
            return {k: value_without_credentials(v) if isinstance(v, str) else v for k, v in tree.items()}
        return tree


class Run(Section):
    init_from: Place | None = None
    """begin with the weights of another run: its directory, name, one checkpoint, or a file of weights"""
    init_weights: Literal["ema", "model"] | None = None
    """which of them: averaged or raw; null: a run's raw ones, or those of a file that holds one set"""
    name: Annotated[str | None, AfterValidator(_name_of_a_folder)] = Field(None, pattern=r"^[\w.\-]+$", max_length=255)
    """the run lies in runs/NAME; null: the config file's name without .yaml"""
    dir: Place = "runs"
    """the folder that holds the runs"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """of the initial weights, the order of the samples and all random draws"""

    @model_validator(mode="after")
    def _begins_with(self):
        if self.init_weights and not self.init_from:
            raise ValueError(
                f"init_weights {self.init_weights} chooses among the weights of init_from; name them there"
            )
        return self

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


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
    """of one sample's array"""
    dtype: Literal["float16", "float32", "float64", "uint8", "int32", "int64"] = "float32"
    """of the array, as the file has it"""


class Data(Section):
    shards: Place
    """the folder that holds the shards, or its URL: s3://, gs://, http(s)://"""
    manifest: Place | None = None
    """null: manifest.json beside the shards"""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """of these shards, where others are mixed in"""
    mix: list[Source] = []
    """data sets to mix in, by weight: a list of name, shards, manifest, weight"""
    arrays: dict[str, ArrayField] = {}
    """name in the batch → .npy field that comes with each image: field, shape, dtype"""
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
    workers: NonNegative = 1
    """loader processes a rank"""
    crop: Literal["centre", "random"] = "centre"
    """random: scaled by up to 5/4 and cut anywhere, as ADM does"""
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
        taken = {"k", "image", "label", "time", "noise", "drop"} & set(self.arrays)
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


class Optim(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """learning rate, constant after the warm-up"""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's, decoupled from the gradient"""
    warmup_steps: NonNegative = 0
    """linear from 0; constant afterwards"""
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0
    """global L2 norm; 0: none"""


class EMAProfile(Section):
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """of an average of the weights; it spans the last 1/(1 − decay) steps"""


# Raw DeepSpeed options that would undo what dtrain relies on, and the key that is meant instead.
OWN_OPTIONS = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optim.gradient_clip",
    "optimizer": "optim",
    "scheduler": "optim.warmup_steps",
    "bf16": "deepspeed.precision",
    "fp16": "deepspeed.precision",
    "torch_autocast": "deepspeed.precision",
    "data_types": "deepspeed.precision",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer": "deepspeed.offload",
    "zero_optimization.offload_param": "deepspeed.offload",
}


class DeepSpeed(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """what ranks share out: 1 the optimizer's state, 2 gradients too, 3 weights too; 0 nothing"""
    precision: Literal["fp32", "bf16", "bf16_autocast"] = "fp32"
    """bf16: weights too, with fp32 masters, stages 1 to 3; bf16_autocast: products only"""
    offload: Literal["none", "optimizer", "all"] = "none"
    """to the host's memory: masters, moments and averages; all: the weights too, stage 3"""
    extra: dict[str, Any] = {}
    """raw DeepSpeed options, merged last"""

    @field_serializer("extra", when_used="json")
    def _extra_as_kept(self, extra: dict[str, Any]) -> dict[str, Any]:
        return masked(extra)

    @model_validator(mode="after")
    def _combines(self):
        if self.precision == "bf16" and self.zero_stage == 0:
            raise ValueError("precision bf16 drifts at stage 0; take bf16_autocast, or stage 1 to 3")
        if self.offload != "none" and self.zero_stage == 0:
            raise ValueError(f"offload {self.offload} needs partitioned state; take stage 1 to 3")
        if self.offload == "all" and self.zero_stage != 3:
            raise ValueError(f"offload all moves parameters, which only stage 3 partitions, not {self.zero_stage}")
        given = flat(self.extra)
        for option, key in OWN_OPTIONS.items():
            if any(g == option or g.startswith(option + ".") for g in given):
                raise ValueError(f"extra.{option} is dtrain's to set; use `{key}`")
        return self


class Train(Section):
    steps: Positive
    """optimizer steps of the whole run"""
    micro_batch: Positive | None = None
    """rows of one rank per forward; null: all of the rank's rows at once"""
    activation_checkpointing: bool = False
    """recompute each block in backward: less memory, a third more time"""
    compile: bool = False
    """torch.compile: a slow first step, faster ones after"""
    log_every: Positive = 10
    """steps between two lines of the journal"""
    checkpoint_every: Positive = 1000
    """steps between two checkpoints"""
    keep_last: Positive = 3
    """complete checkpoints kept"""
    keep_every: Positive | None = None
    """also kept: those of every so many steps"""
    keep_best: str | None = None
    """also kept: the one that this metric finds best, such as fd_pixels"""
    spike_factor: Annotated[float, Field(ge=0)] = 10.0
    """a gradient norm over so many recent ones is refused; 0: none is"""
    bad_steps: Positive = 3
    """refused in a row: the run goes back to its newest checkpoint and leaves their images out"""
    rollbacks: NonNegative = 5
    """of a run; the next one ends it and names the samples"""
    hang_limit: Annotated[float, Field(ge=0)] = 300.0
    """seconds without a step, at least, that are a hang; 0: none are"""
    start_limit: Annotated[float, Field(gt=0)] = 1800.0
    """the same of the start, the first step and a save, which no earlier step can tell"""
    deadline: str | None = None
    """[D-]HH:MM:SS from the start, or an ISO 8601 time; null: the SLURM job's end"""


# bpd: the bound on held-out images, in bits/dim
Metric = Literal["fd", "fd_infinity", "kid", "precision", "recall", "is", "bpd"]
HIGHER_IS_BETTER = {"precision", "recall", "is"}


class Eval(Section):
    every: NonNegative = 0
    """steps between evaluations; 0: never during training"""
    num_samples: Positive = 2000
    """images drawn for an evaluation"""
    batch_size: Positive = 250
    """block of sample ids drawn together; part of the result's identity"""
    metrics: Annotated[list[Metric], Field(min_length=1)] = ["fd"]
    """fd: Fréchet distance; bpd: the bound on held-out images in bits/dim; is: Inception score"""
    validation_images: Positive = 256
    """the first held-out images, for bpd and the loss by noise level"""
    features: Place = "auto"
    """inception, effnet_lite0, pixels, a TorchScript file (net.pt#sha256=… pins it), or auto: the first that is here"""
    weights: Place | None = None
    """Inception's file or its folder; null: DTRAIN_WEIGHTS, then ~/.cache/dtrain"""
    resize: Literal["clean", "tensorflow"] | None = None
    """of Inception's images, on both sides; null: clean, and another tool's reference may be otherwise: no fid"""
    reference: Place | None = None
    """an .npz of mu and sigma to compare with; null: computed from data.holdout"""
    labels: Literal["data", "uniform"] = "data"
    """of the samples: as in the held-out split, or all classes in turn"""
    bootstrap: NonNegative = 0
    """resamplings behind an interval of fd; 0: none"""
    sampler: Literal["ddim", "ancestral", "dpmpp_2m", "heun", "euler"] = "ddim"
    """how samples are drawn; a flow takes euler or heun, euler by default"""
    steps: Positive = 50
    """of the sampler for one image"""
    eta: Annotated[float, Field(ge=0, le=1)] | Literal["sigma_hat"] = 0.0
    """ddim's noise, 0 to 1; sigma_hat: DDPM's larger one"""
    spacing: Literal["trailing", "leading", "linspace", "quad"] | list[NonNegative] = "trailing"
    """which timesteps the sampler visits, or these themselves, falling"""
    clip: bool = False
    """hold every estimate of x_0 within [−1, 1] while sampling"""
    bpd_clip: bool = True
    """hold them there in bpd too, as published figures do; the bound stays one, and is tighter"""
    guidance: Annotated[float, Field(ge=0)] = 1.0
    """s in uncond + s·(cond − uncond); 1: none"""
    guidance_interval: tuple[Probability, Probability] = (0.0, 1.0)
    """shares of the process where guidance acts; 0 is clean data"""
    guidance_rescale: Probability = 0.0
    """how far the contrast is brought back to the conditional one's"""
    guidance_channels: Literal["all", "first_3"] = "all"
    """first_3 only to repeat published DiT results"""
    ema: NonNegative | None = 0
    """which average of `ema` is sampled, counted from 0; null: the raw weights"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the network while sampling; the samples' states stay fp32"""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """of the samples' noise"""

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: str) -> str:
        path, pin, sha256 = value.partition(PIN)
        if pin and not re.fullmatch(r"[0-9a-fA-F]{64}", sha256):
            raise ValueError(f"{value!r} pins no hash: after #sha256= come 64 hexadecimal digits, as sha256sum prints")
        if value not in ("auto", "inception", "effnet_lite0", "pixels") and not path.endswith((".pt", ".pth", ".ts")):
            raise ValueError(
                f"{value!r} is none of auto, inception, effnet_lite0, pixels, and no TorchScript file (.pt, .pth, .ts)"
            )
        return value


class Tracking(Section):
    enabled: bool = True
    """false: only the journal is written; `dtrain sync` sends it later, from where MLflow is"""
    uri: Annotated[str | None, AfterValidator(_at_home), AfterValidator(_without_login)] = Field(
        default_factory=lambda: os.environ.get("MLFLOW_TRACKING_URI") or None, validate_default=True
    )
    """MLflow's address; default: MLFLOW_TRACKING_URI, else SQLite beside the runs"""
    experiment: str = Field("dtrain", min_length=1, max_length=500)
    """of MLflow, where the run is listed"""
    system_every: Annotated[float, Field(ge=0)] = 30.0
    """seconds between looks at a node's CPU, memory, GPUs; 0: none"""
