"""A checkpoint's weights opened to draw from; `dtrain sample` needs no more, and none of the metrics."""

from dataclasses import dataclass

import torch

from dtrain import distributed
from dtrain.checkpoint.directory import manifest_hash
from dtrain.checkpoint.export import load_weights, open_checkpoint
from dtrain.config import Config, Eval
from dtrain.errors import UserError
from dtrain.evaluation.generate import Generator
from dtrain.first_stage.build import of_checkpoint
from dtrain.models.build import allocate
from dtrain.objectives.build import build as build_objective
from dtrain.run import RunDirectory


def weights_name(e: Eval) -> str:
    """Which weights are evaluated, as it is written in the journal and MLflow."""
    return "raw" if e.ema is None else f"ema_{e.ema}"


@dataclass(frozen=True)
class Opened:
    """A checkpoint's weights, ready to be evaluated, and which they are."""

    generator: Generator
    step: int
    images: int
    checkpoint: str  # its hash


def newest_step(run: RunDirectory) -> int:
    """The step of the newest complete checkpoint. Collective: ranks that each list the folder may differ."""
    return distributed.on_rank_0(lambda: open_checkpoint(run).meta["step"])


def open_generator(
    run: RunDirectory, config: Config, weights: str, device: torch.device, step: int | None = None
) -> Opened:
    """The weights of a run's checkpoint of `step`, by default its newest. A collective; raises UserError."""
    step = newest_step(run) if step is None else step

    def opened() -> Opened:
        checkpoint = open_checkpoint(run, step)
        try:
            name = manifest_hash(checkpoint.path)
        except OSError as e:  # the training keeps only so many
            raise UserError(f"{checkpoint.path} cannot be read: {e.strerror}") from None
        model = load_weights(checkpoint, allocate(config), "fp32" if weights == "raw" else weights).to(device)
        first_stage = of_checkpoint(config, checkpoint.meta.get("first_stage"), device)
        generator = Generator.of(model, build_objective(config).process, config, device, first_stage)
        return Opened(generator, checkpoint.meta["step"], checkpoint.meta["images"], name)

    return distributed.agree(opened)
