"""The run's configuration: one pydantic tree, read from a YAML file and `key.sub=value` overrides.

    config = load("configs/digits-dit.yaml", ["optim.lr=1e-3"])

Unknown keys are refused with the nearest known one. `${NAME}` in a string is the environment variable NAME.
"""

import difflib
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    field_validator,
    model_validator,
)

from dtrain.errors import UserError

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Probability = Annotated[float, Field(ge=0, le=1)]


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


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, strict=False)


class Run(Section):
    init_from: str | None = None  # begin with the weights of another run: its directory, name, or one checkpoint
    name: str | None = Field(None, pattern=r"^[\w.\-]+$")  # default: the config file's stem
    dir: str = "runs"
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @property
    def path(self) -> Path:
        return Path(self.dir) / self.name


class Source(Section):
    """A further data set to mix in."""

    name: str = Field(pattern=r"^[\w.\-]+$")  # as the journal counts it
    shards: str
    manifest: str | None = None
    weight: Annotated[float, Field(gt=0)]

    @property
    def manifest_path(self) -> Path:
        return Path(self.manifest) if self.manifest else Path(self.shards) / "manifest.json"


class ArrayField(Section):
    """A .npy field that comes with every image, such as a latent or a text embedding."""

    field: str = Field(pattern=r"^(.*\.)?npy$")  # the extension in the shards, such as latent.npy
    shape: list[Positive]
    dtype: Literal["float16", "float32", "float64", "uint8", "int32", "int64"] = "float32"


class Data(Section):
    shards: str  # the folder that holds the shards, or its URL: s3://, gs://, http(s)://
    manifest: str | None = None  # default: manifest.json beside the shards
    weight: Annotated[float, Field(gt=0)] = 1.0  # of these shards, where others are mixed in
    mix: list[Source] = []  # data sets to mix in, by weight
    arrays: dict[str, ArrayField] = {}  # name in the batch → .npy field
    holdout: str | None = None  # the manifest of the reference split, its shards beside it
    image_size: Positive
    channels: Literal[1, 3] = 3
    batch_size: Positive  # global: images per optimizer step over all ranks
    streams: Positive | None = None  # V; default min(64, one per 1,024 samples); stays for the life of the run
    shuffle_window: Positive = 4096  # W, in samples of one stream
    workers: NonNegative = 1  # loader processes a rank
    crop: Literal["centre", "random"] = "centre"  # random: scaled by up to 5/4 and cut anywhere, as ADM does
    flip: bool = False  # mirror each image with probability 1/2
    on_error: Literal["raise", "replace"] = "raise"  # replace: a damaged sample gives way to another of its stream
    max_bad_fraction: Probability = 0.001  # of the images since the start, at least an epoch's; more end the run
    allow_pipe: bool = False  # let `pipe:` shards run their command in a shell
    cache_dir: str | None = None  # blocks of remote shards, shared by the ranks of a node; default: ~/.cache/dtrain
    cache_bytes: Annotated[int, Field(ge=1 << 20)] = 16 << 30

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
        taken = {"k", "image", "label", "time", "noise", "drop"} & set(self.arrays)
        if taken:
            raise ValueError(f"arrays: {min(taken)!r} is what a batch calls something else; choose another name")
        return self

    @property
    def manifest_path(self) -> Path:
        return Path(self.manifest) if self.manifest else Path(self.shards) / "manifest.json"


class DiT(Section):
    name: Literal["dit"]
    size: str | None = Field(None, pattern=r"^(S|B|L|XL)/[248]$")  # a row of the paper's table; keys below override it
    depth: Positive | None = None
    width: Positive | None = None
    heads: Positive | None = None
    patch: Positive | None = None
    qk_norm: bool = False  # RMS-normalise queries and keys: steadier at high learning rates, unlike published weights
    frequency_shift: Literal[0, 1] = 0  # of the time frequencies; 1 as in diffusers' DiT, to be exported to it
    num_classes: NonNegative = 0  # 0: unconditional

    @model_validator(mode="after")
    def _complete(self):
        if self.size is None:
            missing = [k for k in ("depth", "width", "heads", "patch") if getattr(self, k) is None]
            if missing:
                raise ValueError(f"needs `{missing[0]}`, or a `size` such as S/2")
        if self.width and self.heads and (self.width % self.heads or (self.width // self.heads) % 2):
            raise ValueError(f"width {self.width} must be an even multiple of heads {self.heads}")
        if self.width and self.width % 4:
            raise ValueError(f"width {self.width} must be a multiple of 4 for 2-D positions")
        return self


class UNet(Section):
    name: Literal["unet"]
    width: Positive  # channels at full resolution
    # of the width, level by level; each halves the side
    multipliers: list[Positive] = Field([1, 2, 2, 2], min_length=1)
    res_blocks: Positive = 2  # of each level on the way down; one more on the way up
    attention: list[Positive] = [16]  # sides of the images that get attention
    head_width: Positive | None = None  # channels of one attention head; default: a single head
    scale_shift: bool = False  # the time scales and shifts after the norm (ADM), or is added before it (DDPM)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    num_classes: NonNegative = 0  # 0: unconditional

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


class _Process(Section):
    """What all diffusion processes have in common."""

    label_dropout: Probability = 0.1
    stratified: bool = False  # spread the times of a global batch evenly
    logit_normal_mean: float = 0.0
    logit_normal_std: Annotated[float, Field(gt=0)] = 1.0


class Gaussian(_Process):
    process: Literal["gaussian"] = "gaussian"
    schedule: Literal["linear", "scaled_linear", "cosine", "sigmoid"] = "linear"
    zero_terminal_snr: bool = False  # stretch the schedule until the last timestep holds no signal
    timesteps: Annotated[int, Field(ge=2)] = 1000
    prediction: Literal["eps", "x0", "v"] = "eps"
    variance: Literal["fixed_small", "fixed_large", "learned_range"] = "fixed_small"  # of ancestral steps and the bound
    loss: Literal["simple", "hybrid", "vlb"] = "simple"
    weighting: Literal["none", "min_snr"] = "none"
    min_snr_gamma: Annotated[float, Field(gt=0)] = 5.0
    times: Literal["uniform", "logit_normal", "importance"] = "uniform"

    @model_validator(mode="after")
    def _possible(self):
        learned, least = self.variance == "learned_range", {"linear": 21, "scaled_linear": 13}.get(self.schedule, 2)
        problems = [
            (
                self.timesteps < least,
                f"a {self.schedule} schedule of {self.timesteps} timesteps would have β ≥ 1; take at least {least}",
            ),
            (
                self.zero_terminal_snr and self.prediction == "eps",
                "prediction eps cannot go with zero_terminal_snr: at the last timestep x_t is ε itself and "
                "x0 = (x_t − σ ε)/0; take prediction v",
            ),
            (
                self.zero_terminal_snr and self.weighting == "min_snr",
                "weighting min_snr cannot go with zero_terminal_snr: the timestep that sampling starts from would have "
                "weight 0; take weighting none",
            ),
            (
                self.loss == "simple" and learned,
                "loss simple does not train the variance that learned_range asks the model for; take loss hybrid",
            ),
            (
                self.loss == "hybrid" and not learned,
                f"loss hybrid has nothing to train with variance {self.variance}; take variance learned_range",
            ),
            (
                self.loss == "vlb" and self.weighting != "none",
                "weighting min_snr cannot go with loss vlb: the bound has weights of its own; take weighting none",
            ),
            (
                self.loss == "vlb" and self.times == "logit_normal",
                "times logit_normal cannot go with loss vlb: the sum would no longer be the bound; "
                "take times importance, which corrects for what it does",
            ),
        ]
        for wrong, message in problems:
            if wrong:
                raise ValueError(message)
        return self


class Flow(_Process):
    process: Literal["flow"]
    times: Literal["uniform", "logit_normal"] = "uniform"


class Optim(Section):
    lr: Annotated[float, Field(gt=0)] = 1e-4
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    warmup_steps: NonNegative = 0  # linear from 0; constant afterwards
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0  # global L2 norm; 0: none


class EMAProfile(Section):
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999


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
    precision: Literal["fp32", "bf16", "bf16_autocast"] = "fp32"  # bf16: weights too, with fp32 masters, stages 1–3
    offload: Literal["none", "optimizer", "all"] = "none"  # to the host's memory; all: the parameters too, stage 3
    extra: dict[str, Any] = {}  # raw DeepSpeed options, merged last

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
    micro_batch: Positive | None = None  # rows of one rank per forward; default: all of the rank's rows at once
    activation_checkpointing: bool = False  # recompute each block in backward: less memory, a third more time
    compile: bool = False  # torch.compile: a slow first step, faster ones after
    log_every: Positive = 10
    checkpoint_every: Positive = 1000
    keep_last: Positive = 3  # complete checkpoints kept
    keep_every: Positive | None = None  # also kept: those of every so many steps
    keep_best: str | None = None  # also kept: the one with the lowest value of this metric, such as fd_pixels
    deadline: str | None = None  # [D-]HH:MM:SS from the start, or an ISO 8601 time; default: the SLURM job's end


# bpd: the bound on held-out images, in bits/dim
Metric = Literal["fd", "fd_infinity", "kid", "precision", "recall", "is", "bpd"]


class Eval(Section):
    every: NonNegative = 0  # steps between evaluations; 0: never during training
    num_samples: Positive = 2000
    batch_size: Positive = 250  # block of sample ids drawn together; part of the result's identity
    metrics: Annotated[list[Metric], Field(min_length=1)] = ["fd"]
    validation_images: Positive = 256  # the first held-out images, for bpd and the loss by noise level
    features: str = "auto"  # inception | effnet_lite0 | pixels | a TorchScript file; auto: the first that is here
    weights: str | None = None  # Inception's file or its folder; default: DTRAIN_WEIGHTS, then ~/.cache/dtrain
    reference: str | None = None  # an .npz of mu and sigma to compare with; default: computed from data.holdout
    labels: Literal["data", "uniform"] = "data"  # of the samples: as in the held-out split, or all classes in turn
    bootstrap: NonNegative = 0  # resamplings behind an interval of fd; 0: none
    sampler: Literal["ddim", "ancestral", "dpmpp_2m", "heun", "euler"] = "ddim"  # default of a flow: euler
    steps: Positive = 50
    eta: Annotated[float, Field(ge=0, le=1)] | Literal["sigma_hat"] = 0.0  # ddim's noise; sigma_hat: DDPM's larger one
    # or the timesteps themselves, falling
    spacing: Literal["trailing", "leading", "linspace", "quad"] | list[NonNegative] = "trailing"
    clip: bool = False  # hold every estimate of x_0 within [−1, 1]
    guidance: Annotated[float, Field(ge=0)] = 1.0  # s in uncond + s·(cond − uncond); 1: none
    guidance_interval: tuple[Probability, Probability] = (0.0, 1.0)  # shares of the process, 0 is clean data
    guidance_rescale: Probability = 0.0  # how far the contrast is brought back to the conditional one's
    guidance_channels: Literal["all", "first_3"] = "all"  # first_3 only to repeat published DiT results
    ema: NonNegative | None = 0  # which profile; null: the raw weights
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @field_validator("features")
    @classmethod
    def _known_features(cls, value: str) -> str:
        if value not in ("auto", "inception", "effnet_lite0", "pixels") and not value.endswith((".pt", ".pth", ".ts")):
            raise ValueError(
                f"{value!r} is none of auto, inception, effnet_lite0, pixels, and no TorchScript file (.pt, .pth, .ts)"
            )
        return value


class Tracking(Section):
    enabled: bool = True  # false: only the journal is written; `dtrain sync` sends it later, from where MLflow is
    uri: str | None = None  # default: SQLite beside the runs
    experiment: str = "dtrain"


def _process_of(diffusion: Any) -> str:
    """Which section describes the process: gaussian unless it says otherwise."""
    if isinstance(diffusion, dict):
        return diffusion.get("process", "gaussian")
    return getattr(diffusion, "process", "gaussian")


class Config(Section):
    run: Run = Run()
    data: Data
    model: Annotated[DiT | UNet, Field(discriminator="name")]
    diffusion: Annotated[
        Annotated[Gaussian, Tag("gaussian")] | Annotated[Flow, Tag("flow")], Discriminator(_process_of)
    ] = Gaussian()
    optim: Optim = Optim()
    ema: list[EMAProfile] = [EMAProfile()]
    deepspeed: DeepSpeed = DeepSpeed()
    train: Train
    eval: Eval = Eval()
    tracking: Tracking = Tracking()

    @model_validator(mode="before")
    @classmethod
    def _sampler_of_a_flow(cls, tree: Any) -> Any:
        """The default sampler is the process' own, so that `diffusion.process: flow` alone is a whole choice."""
        if (
            isinstance(tree, dict)
            and isinstance(tree.get("diffusion"), dict)
            and _process_of(tree["diffusion"]) == "flow"
        ):
            sampling = tree.get("eval") or {}
            if isinstance(sampling, dict):
                return tree | {"eval": {"sampler": "euler"} | sampling}
        return tree

    @model_validator(mode="after")
    def _consistent(self):
        if self.eval.ema is not None and self.eval.ema >= len(self.ema):
            raise ValueError(
                f"eval.ema is {self.eval.ema}, but there are {len(self.ema)} EMA profiles (counted from 0)"
            )
        if self.eval.every and not self.data.holdout:
            raise ValueError("eval.every needs data.holdout, the manifest of the split to compare with")
        self._sampler_fits()
        if self.model.name == "unet":
            self._levels_fit()
        if self.model.name == "dit" and self.model.patch and self.data.image_size % self.model.patch:
            size, patch = self.data.image_size, self.model.patch
            raise ValueError(f"data.image_size {size} does not divide into patches of {patch} (model.patch)")
        return self

    def _levels_fit(self) -> None:
        halvings = len(self.model.multipliers) - 1
        if self.data.image_size % 2**halvings:
            raise ValueError(
                f"data.image_size {self.data.image_size} does not halve {halvings} times (model.multipliers); "
                f"take a multiple of {2**halvings}"
            )
        sides = [self.data.image_size >> i for i in range(halvings + 1)]
        for side in self.model.attention:
            if side not in sides:
                known = ", ".join(str(s) for s in sides)
                raise ValueError(f"model.attention {side} is the side of no level; the levels have {known}")

    def _sampler_fits(self) -> None:
        e, flow = self.eval, self.diffusion.process == "flow"
        walks = ("euler", "heun") if flow else ("ddim", "ancestral", "dpmpp_2m", "heun")
        if e.sampler not in walks:
            raise ValueError(
                f"eval.sampler {e.sampler} does not walk a {self.diffusion.process} process; take {' or '.join(walks)}"
            )
        if e.eta != 0 and e.sampler != "ddim":
            raise ValueError(f"eval.eta {e.eta} has no effect on sampler {e.sampler}; take sampler ddim, or eta 0")
        if flow and e.spacing != "trailing":
            raise ValueError(f"eval.spacing {e.spacing} has no effect on a flow, whose steps are equal; leave it out")
        if not flow and e.steps > self.diffusion.timesteps:
            raise ValueError(f"eval.steps {e.steps} exceeds diffusion.timesteps {self.diffusion.timesteps}")
        if isinstance(e.spacing, list):
            if len(e.spacing) != e.steps:
                raise ValueError(f"eval.spacing lists {len(e.spacing)} timesteps, but eval.steps is {e.steps}")
            if e.spacing != sorted(set(e.spacing), reverse=True) or e.spacing[0] >= self.diffusion.timesteps:
                raise ValueError(
                    "eval.spacing must list timesteps that fall, "
                    f"from at most {self.diffusion.timesteps - 1} to at least 0"
                )
        if "bpd" in e.metrics and flow:
            raise ValueError("eval.metrics bpd is the bound of a gaussian process, and diffusion.process is flow")
        if e.guidance != 1 and not self.model.num_classes:
            raise ValueError(f"eval.guidance {e.guidance} needs a model with classes, but model.num_classes is 0")
        if e.guidance_interval[0] >= e.guidance_interval[1]:
            raise ValueError("eval.guidance_interval must be [low, high] with low < high, shares of the process")

    def dump(self) -> str:
        """The whole tree as YAML, defaults filled in; `load` reads it back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


# What a resumed run may not change (design, Configuration). The data set itself is held by its manifest's hash.
IDENTITY = ("run.seed", "data.streams", "data.shuffle_window", "data.image_size", "data.channels", "data.crop")
IDENTITY += ("data.flip", "data.weight", "data.arrays")
IDENTITY_SECTIONS = ("model", "diffusion")


def identity(config: Config) -> dict[str, Any]:
    """Dotted key → value of everything that makes this run the run it is."""
    tree = config.model_dump(mode="json")
    keys = {k: tree[k.split(".")[0]][k.split(".")[1]] for k in IDENTITY}
    keys["data.mix"] = [[s.name, s.weight] for s in config.data.mix]  # where they lie may change
    return keys | {f"{s}.{k}": v for s in IDENTITY_SECTIONS for k, v in tree[s].items()}


def load(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML file, apply `key.sub=value` overrides (values are YAML), validate.

    Raises UserError, one line, for a missing file, bad YAML, an unknown key or a wrong value.
    """
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as e:
        raise UserError(f"cannot read the config {path}: {e.strerror}") from None
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise UserError(f"{where} is not valid YAML: {getattr(e, 'problem', None) or e}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path} must be a mapping of sections such as `data:` and `model:`")
    overridden = [_override(tree, item) for item in overrides]
    tree = _expand(tree, str(path))
    run = tree.get("run") or {}
    if isinstance(run, dict) and run.get("name") is None:
        tree["run"] = run | {"name": path.stem}
    return validate(tree, str(path), overridden)


def validate(tree: dict, source: str, overridden: list[str] = ()) -> Config:
    """A Config from plain data; errors name `source`, or the command line for keys in `overridden`."""
    try:
        return Config.model_validate(tree)
    except ValidationError as e:
        raise UserError(_explain(e, source, overridden)) from None


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-4 as a string; everybody who writes a learning rate means a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _override(tree: dict, item: str) -> str:
    key, eq, value = item.partition("=")
    if not eq or not all(key.split(".")):
        hint = " (options come before the config)" if item.startswith("-") else ""
        raise UserError(f"override {item!r} is not of the form key.sub=value{hint}")
    try:
        value = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError:
        raise UserError(f"override {item!r}: the value is not valid YAML") from None
    *path, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate([*path, last]):
        if isinstance(node, list):
            if not part.isdigit() or int(part) >= len(node):
                where = ".".join(key.split(".")[:depth])
                raise UserError(f"override {item!r}: `{where}` is a list of {len(node)}; use an index below that")
            part = int(part)
        elif not isinstance(node, dict):
            raise UserError(f"override {item!r}: `{'.'.join(key.split('.')[:depth])}` has no keys below it")
        if depth == len(path):
            node[part] = value
        else:
            if isinstance(node, dict) and node.get(part) is None:
                node[part] = {}
            node = node[part]
    return key


def _expand(node: Any, source: str) -> Any:
    if isinstance(node, dict):
        return {k: _expand(v, source) for k, v in node.items()}
    if isinstance(node, list):
        return [_expand(v, source) for v in node]
    if not isinstance(node, str):
        return node

    def value(match: re.Match) -> str:
        if match[1] not in os.environ:
            raise UserError(f"{source} uses ${{{match[1]}}}, but the environment variable {match[1]} is not set")
        return os.environ[match[1]]

    return re.sub(r"\$\{(\w+)\}", value, node)


def _sections(annotation: Any) -> dict[str | None, type[BaseModel]]:
    """The sections a field may hold, by the tag of its union; None where there is but one."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        tag = next((f for name in ("name", "process") if (f := annotation.model_fields.get(name))), None)
        literal = get_args(tag.annotation) if tag is not None else ()
        return {literal[0] if literal and isinstance(literal[0], str) else None: annotation}
    found: dict[str | None, type[BaseModel]] = {}
    for part in get_args(annotation):
        found |= _sections(part)
    return found


def _walk(location: list[str]) -> tuple[list[str], list[str]]:
    """(the location without the tags of unions, the keys allowed there; none where there is no section)."""
    key, choices, keys = [], {None: Config}, []
    for part in location:
        section = choices.get(part) if part in choices and len(choices) > 1 else None
        if section is not None:  # a union's tag, which nobody wrote
            choices = {None: section}
            continue
        if part.isdigit():
            key.append(part)
            continue
        if not choices:  # inside a value: a branch of its type, which nobody wrote either
            continue
        key.append(part)
        section = next(iter(choices.values()), None)
        field = section.model_fields.get(part) if section is not None else None
        choices = _sections(field.annotation) if field is not None else {}
    if len(choices) == 1:
        keys = list(next(iter(choices.values())).model_fields)
    return key, keys


def _explain(error: ValidationError, source: str, overridden: list[str]) -> str:
    """The first problem as one sentence: the key, where it came from, what is wrong, the nearest fix."""
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")  # a typo also makes its key missing
    location, _ = _walk([str(part) for part in first["loc"]])
    _, known = _walk([str(part) for part in first["loc"][:-1]])
    key = ".".join(location)
    given = any(o == key or key.startswith(o + ".") or o.startswith(key + ".") for o in overridden)
    origin = "on the command line" if given else f"in {source}"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(location[-1], known, n=1)
        if near:
            return f"unknown key `{key}` {origin}; did you mean `{'.'.join([*location[:-1], near[0]])}`?"
        return f"unknown key `{key}` {origin}" + (f"; known here: {', '.join(known)}" if known else "")
    if first["type"].startswith("union_tag"):
        kinds = {"model": "dit or unet", "diffusion": "gaussian or flow"}[key]
        tag = {"model": "name", "diffusion": "process"}[key]
        if isinstance(first["input"], dict) and tag in first["input"]:
            return f"`{key}.{tag}` {origin} is {first['input'][tag]!r}: take {kinds}"
        return f"`{key}.{tag}` is missing {origin}: take {kinds}"
    if first["type"] == "missing":
        return f"`{key}` is missing {origin}"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return f"{source}: {message}"
    if first["type"] == "value_error":
        return f"`{key}` {origin}: {message}"
    message = message[0].lower() + message[1:]
    return f"`{key}` {origin} is {first['input']!r}: {message}"
