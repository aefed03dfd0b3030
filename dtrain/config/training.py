"""The sections `optim`, `deepspeed` and `train`."""

from typing import Annotated, Any, Literal

from pydantic import Field, field_serializer, model_validator

from dtrain.config.sections import NonNegative, Positive, Section, flat
from dtrain.credentials import masked

# Schedule of the learning rate → the keys that it needs, and those that it takes.
SCHEDULES = {
    "constant": ((), ()),
    "cosine": (("decay_end",), ("decay_start", "decay_end")),
    "linear": (("decay_end",), ("decay_start", "decay_end")),
    "inverse_sqrt": (("decay_start",), ("decay_start",)),
    "trapezoid": (("decay_end", "decay_share"), ("decay_end", "decay_share")),
}


class Optim(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """muon: matrices of transformer blocks move by momentum made orthogonal, all else by AdamW at the same rate"""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """of muon"""
    lr: Annotated[float, Field(gt=0)] = 1e-4
    """learning rate after the warm-up, where `schedule` begins"""
    schedule: Literal["constant", "cosine", "linear", "inverse_sqrt", "trapezoid"] = "constant"
    """what the rate does with images seen: cosine and linear fall to 0, trapezoid at its end only"""
    decay_start: NonNegative | None = None
    """images seen where cosine and linear begin to fall (null: 0), or inverse_sqrt (its t_ref)"""
    decay_end: Positive | None = None
    """images seen where cosine, linear and trapezoid reach 0"""
    decay_share: Annotated[float, Field(gt=0, le=1)] | None = None
    """trapezoid: the last share of `decay_end`, in which the rate falls"""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    """Adam's"""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's, decoupled from the gradient"""
    fused: bool = True
    """one pass over memory an update; false: PyTorch's default, which rounds otherwise"""
    warmup_steps: NonNegative = 0
    """linear from 0, times what `schedule` says"""
    gradient_clip: Annotated[float, Field(ge=0)] = 1.0
    """global L2 norm; 0: none"""

    def identity_keys(self) -> list[str]:
        """What the moments in a checkpoint are."""
        return ["name"]

    @model_validator(mode="after")
    def _schedule_is_whole(self):
        if self.name == "adamw" and self.momentum != 0.95:
            raise ValueError(f"momentum {self.momentum} is muon's, and name is adamw; set betas, or leave it out")
        needed, taken = SCHEDULES[self.schedule]
        for key in ("decay_start", "decay_end", "decay_share"):
            given = getattr(self, key)
            if key in needed and not given:
                raise ValueError(f"schedule {self.schedule} needs {key}{'' if given is None else f', not {given}'}")
            if given is not None and key not in taken:
                raise ValueError(f"{key} {given} has no effect on schedule {self.schedule}; leave it out")
        if self.decay_end is not None and (self.decay_start or 0) >= self.decay_end:
            raise ValueError(f"decay_start {self.decay_start} is not before decay_end {self.decay_end}")
        return self


# Raw DeepSpeed options that would undo what dtrain relies on, and the key that is meant instead.
OWN_OPTIONS = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.micro_batch",
    "gradient_clipping": "optim.gradient_clip",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
    "bf16": "deepspeed.precision",
    "fp16": "deepspeed.precision",
    "torch_autocast": "deepspeed.precision",
    "data_types": "deepspeed.precision",
    "zero_optimization.stage": "deepspeed.zero_stage",
    "zero_optimization.offload_optimizer": "deepspeed.offload",
    "zero_optimization.offload_param": "deepspeed.offload",
}


LARGEST_BUCKET = 500_000_000  # elements
SMALLEST_BUCKET = 8_000_000  # 32 MB in fp32: below it a reduction costs what its call costs
BUCKETS = 16  # of a model at stages 1 and 2: while one is reduced, the backward pass fills the next


class DeepSpeed(Section):
    zero_stage: Literal[0, 1, 2, 3] = 2
    """what ranks share out: 1 the optimizer's state, 2 gradients too, 3 weights too; 0 nothing"""
    precision: Literal["fp32", "bf16", "bf16_autocast"] = "fp32"
    """bf16: weights too, with fp32 masters, stages 1 to 3; bf16_autocast: products only"""
    offload: Literal["none", "optimizer", "all"] = "none"
    """to the host's memory: masters, moments and averages; all: the weights too, stage 3"""
    extra: dict[str, Any] = Field({})
    """raw DeepSpeed options, merged last"""

    @field_serializer("extra", when_used="json")
    def _extra_as_kept(self, extra: dict[str, Any]) -> dict[str, Any]:
        return masked(extra)

    def bucket(self, parameters: int, stage: int) -> int:
        """Elements that are reduced at once, of a model of so many trainable ones: DeepSpeed allocates them whole."""
        own = self.extra.get("zero_optimization", {}).get("reduce_bucket_size")
        share = max(SMALLEST_BUCKET, -(-parameters // BUCKETS)) if stage in (1, 2) else LARGEST_BUCKET
        return own or max(1, min(parameters, share, LARGEST_BUCKET))

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


SNAPSHOTS = 16  # of a run, where it does not say how many: enough for any width between two that are tracked


class Train(Section):
    steps: Positive
    """optimizer steps of the whole run"""
    micro_batch: Positive | None = None
    """rows of one rank per forward; null: all of the rank's rows at once"""
    activation_checkpointing: bool = False
    """recompute each block in backward: less memory, a third more time"""
    compile: bool | Literal["blocks"] = False
    """torch.compile: a slow first step, faster ones after; blocks: each block by itself, which compiles sooner"""
    tf32: Literal["none", "convolutions", "all"] = "convolutions"
    """fp32 products that a GPU computes with TF32's 10 bits: those of convolutions are PyTorch's own default"""
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
    snapshot_every: Positive | None = None
    """steps between two snapshots of the power-function averages of `ema`; null: a sixteenth of the run"""
    keep_snapshots: Positive | None = None
    """newest snapshots kept of the averages alone; null: all"""
    ema_new: Literal["refuse", "begin"] = "refuse"
    """begin: a power-function average that the checkpoint lacks starts there, and others cannot be made of it"""
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

    @property
    def steps_between_snapshots(self) -> int:
        return self.snapshot_every or -(-self.steps // SNAPSHOTS)
