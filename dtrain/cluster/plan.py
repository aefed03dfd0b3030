"""What a run would need: operations, memory at every ZeRO stage, disk, hours; and which choices fit."""

from dataclasses import dataclass, field

import torch

from dtrain.cluster import memory
from dtrain.cluster.cost import (
    FirstStageCost,
    TextCost,
    activations,
    first_stage_cost,
    flops_per_image,
    sampling_bytes,
    text_cost,
)
from dtrain.cluster.energy import Energy, energy
from dtrain.cluster.memory import Sizes, State
from dtrain.config import Config, DeepSpeed
from dtrain.data import shared_memory
from dtrain.models.build import allocate
from dtrain.training.division import rows_per_rank

USABLE = 0.92  # of a device's memory; the rest goes to its context, NCCL, library workspaces and fragmentation
PEAK_TFLOPS = {"fp32": 67.0, "tf32": 494.5, "bf16": 989.0, "bf16_autocast": 989.0}  # an H100's, dense


@dataclass(frozen=True)
class Stage:
    """A rank at one ZeRO stage."""

    stage: int
    state: State
    micro_batch: int | None  # the largest that fits and divides a rank's rows; None where not even one image does
    micro_batch_checkpointing: int | None
    needed: int  # bytes at the config's own micro-batch and checkpointing


@dataclass(frozen=True)
class Plan:
    """Bytes, unless a name says otherwise."""

    parameters: int
    frozen: int
    flops_per_image: int  # forward and backward
    recomputed_per_image: int  # on top, with activation checkpointing
    gpus: int
    usable: int
    rows: int  # of a rank in a step
    stage: int
    micro_batch: int
    checkpointing: bool
    activations: int  # at their most, of the config's micro-batch
    activations_checkpointing: int
    stages: list[Stage]
    gathered: int  # the average in a plain module, for evaluation
    evaluation: int  # all that a rank holds while it samples
    first_stage: FirstStageCost
    base: int  # the frozen weights that the trained ones stand on, or learn from, in fp32
    text: TextCost
    checkpoint: int
    kept: int  # checkpoints on disk at once: train.keep_last and the one being written
    shared_memory: int  # of a node's /dev/shm, for batches made ahead
    shared_memory_here: int  # free on this machine
    hours: float
    energy: Energy
    fits: bool
    evaluation_fits: bool
    recommended: list[str] = field(default_factory=list)  # overrides that fit; none where none does


def plan(
    config: Config,
    nodes: int,
    gpus_per_node: int,
    gpu_memory: float,
    mfu: float,
    tflops: float | None,
    watts: float | None = None,
) -> Plan:
    """gpu_memory in GiB; `mfu` of `tflops` a GPU (default: PEAK_TFLOPS) is what all computing, repeated too, goes at.

    watts: of one GPU, for the energy; `energy.energy` says what is taken where nobody tells them.
    Raises UserError where the batch does not divide.
    """
    gpus = nodes * gpus_per_node
    workers = shared_memory.loader_processes(config, gpus, gpus_per_node)
    rows, micro_batch = rows_per_rank(config.data.batch_size, config.train.micro_batch, gpus)
    with torch.device("meta"):
        sizes = Sizes.of(allocate(config))
        controlled = Sizes.of(allocate(config.base)) if config.base_source else Sizes((), 0)
    taught = config.objective.kind == "distillation"  # by a network of this size, as far as a config tells
    base = 4 * (controlled.trainable + controlled.frozen + taught * (sizes.trainable + sizes.frozen))
    checkpointing, usable = config.train.activation_checkpointing, round(USABLE * gpu_memory * 2**30)
    deepspeed, averages = config.deepspeed, len(config.ema)
    first_stage, text = first_stage_cost(config), text_cost(config)
    beside = first_stage.weights + base
    encoding = 0 if config.first_stage.reads_cache else first_stage.encoding
    held = {c: ActivationBytes(config, rows, c) for c in (False, True)}

    def needed(stage: int, micro_batch: int, checkpointing: bool) -> int:
        backward = held[checkpointing](micro_batch) + memory.in_backward(deepspeed, sizes, gpus, stage)
        transient = max(backward, memory.in_step(deepspeed, sizes, gpus, stage), encoding)
        held_beside = beside + text.in_steps + transient
        return memory.state(deepspeed, averages, sizes, gpus, stage).device + held_beside

    def largest(stage: int, checkpointing: bool) -> int | None:
        fitting = [m for m in range(1, rows + 1) if rows % m == 0 and needed(stage, m, checkpointing) <= usable]
        return max(fitting, default=None)

    stages = [
        Stage(
            stage,
            memory.state(deepspeed, averages, sizes, gpus, stage),
            largest(stage, False),
            largest(stage, True),
            needed(stage, micro_batch, checkpointing),
        )
        for stage in possible_stages(deepspeed)
    ]
    own = next(s for s in stages if s.stage == deepspeed.zero_stage)
    gathered = 4 * (sizes.trainable + sizes.frozen)
    sampled = config.eval.batch_size * (1 + len(config.eval.asked.steps))
    drawn = max(sampling_bytes(config, sampled), first_stage.decoding, first_stage.encoding)
    evaluation = own.state.device - own.state.gradients + gathered + beside + text.weights + drawn
    flops = flops_per_image(config, checkpointing=False)
    repeated = flops_per_image(config, checkpointing=True) - flops
    images = config.train.steps * config.data.batch_size
    peak = PEAK_TFLOPS[deepspeed.precision]
    # The autoencoder's operations, as so many of the network's: they may be of another precision. Words' are few.
    encoded = first_stage.flops_per_image * peak / PEAK_TFLOPS[first_stage.precision] + text.flops_per_image
    speed = gpus * mfu * 1e12 * (tflops or peak)
    hours = images * (flops + checkpointing * repeated + encoded) / speed / 3600
    return Plan(
        parameters=sizes.trainable,
        frozen=sizes.frozen,
        flops_per_image=flops,
        recomputed_per_image=repeated,
        gpus=gpus,
        usable=usable,
        rows=rows,
        stage=own.stage,
        micro_batch=micro_batch,
        checkpointing=checkpointing,
        activations=held[False](micro_batch),
        activations_checkpointing=held[True](micro_batch),
        stages=stages,
        gathered=gathered,
        evaluation=evaluation,
        first_stage=first_stage,
        base=base,
        text=text,
        checkpoint=memory.checkpoint_bytes(sizes, averages),
        kept=config.train.keep_last + 1,
        shared_memory=shared_memory.of_ranks(gpus_per_node, workers, shared_memory.of_batch(config, gpus)),
        shared_memory_here=shared_memory.free(),
        hours=hours,
        energy=energy(config, gpus, hours, watts),
        fits=own.needed <= usable,
        evaluation_fits=not config.eval.every or evaluation <= usable,
        recommended=recommended(stages, gpus),
    )


def recommended(stages: list[Stage], gpus: int) -> list[str]:
    """What fits and costs least: no recomputing before recomputing, then less communication, then large micro-batches.

    Stage 1 before 0, on several GPUs: it sends as much and holds less.
    """
    order = sorted(stages, key=lambda s: (gpus > 1 and s.stage == 0, s.stage))
    for checkpointing in (False, True):
        for s in order:
            if micro_batch := s.micro_batch_checkpointing if checkpointing else s.micro_batch:
                return [
                    f"deepspeed.zero_stage={s.stage}",
                    f"train.micro_batch={micro_batch}",
                    f"train.activation_checkpointing={str(checkpointing).lower()}",
                ]
    return []


def possible_stages(deepspeed: DeepSpeed) -> list[int]:
    """Those that the section's precision and offload allow."""
    if deepspeed.offload == "all":
        return [3]
    return [1, 2, 3] if deepspeed.precision == "bf16" or deepspeed.offload == "optimizer" else [0, 1, 2, 3]


class ActivationBytes:
    """The most bytes of activations by micro-batch, without a trace for each.

    At any moment they are linear in the micro-batch, so their peak is convex in it: between two traced points the chord
    is an upper bound, and exact where the same moment is the peak at both.
    """

    def __init__(self, config: Config, rows: int, checkpointing: bool):
        self._rows = rows
        self._one, self._all = (activations(config, n, checkpointing).peak for n in (1, rows))

    def __call__(self, micro_batch: int) -> int:
        return self._one + (self._all - self._one) * (micro_batch - 1) // max(1, self._rows - 1)
