"""A checkpoint's weights opened to draw from; `dtrain sample` needs no more, and none of the metrics."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dtrain import distributed
from dtrain.checkpoint.averages import Combination
from dtrain.checkpoint.directory import manifest_hash
from dtrain.checkpoint.export import open_checkpoint, open_weights
from dtrain.checkpoint.frozen_base import load_whole
from dtrain.checkpoint.process_networks import objective_in
from dtrain.conditions.build import build as build_conditions
from dtrain.config import Config, Eval
from dtrain.errors import UserError, from_where
from dtrain.evaluation.generate import Generator
from dtrain.first_stage.build import build as build_first_stage
from dtrain.first_stage.build import of_checkpoint
from dtrain.first_stage.pixels import FirstStage
from dtrain.models.build import build
from dtrain.models.weight_file import Which
from dtrain.objectives.build import build as build_objective
from dtrain.run import RunDirectory

if TYPE_CHECKING:
    from dtrain.evaluation.prior import Prior
    from dtrain.evaluation.reconstructions import Reconstructions


def weights_name(e: Eval) -> str:
    """Which weights are evaluated, as it is written in the journal and MLflow."""
    if isinstance(e.ema, dict):
        return f"sigma_{e.ema['sigma_rel']}"
    return "raw" if e.ema is None else f"ema_{e.ema}"


def generator_of(
    model: torch.nn.Module, process, config: Config, device: torch.device, first_stage: FirstStage
) -> "Generator | Reconstructions | Prior":
    """What an evaluation takes its images from. Raises UserError where held-out pictures cannot be read."""
    if config.objective.diffuses:
        return Generator.of(model, process, config, device, first_stage)
    if not config.reconstructs:
        from dtrain.evaluation.prior import Prior

        return Prior.of(model, config, device)
    from dtrain.evaluation.reconstructions import Reconstructions

    return Reconstructions.of(model, config, device)


@dataclass(frozen=True)
class Opened:
    """A checkpoint's weights, ready to be evaluated, and which they are."""

    generator: "Generator | Reconstructions | Prior"
    step: int
    images: int
    checkpoint: str  # its hash; with that of the model which guidance leads away from, where there is one


def newest_step(run: RunDirectory) -> int:
    """The step of the newest complete checkpoint. Collective: ranks that each list the folder may differ."""
    return distributed.on_rank_0(lambda: open_checkpoint(run).meta["step"])


def open_published(config: Config, file: str, which: Which | None, device: torch.device) -> Opened:
    """The weights of a file that somebody published, for the model of a config; no run is needed.

    which: of a file that holds averaged and raw weights. A collective; raises UserError.
    """
    from dtrain.data.shards.manifest import load_all
    from dtrain.models.published import load_published

    def opened() -> Opened:
        if of_process := build_objective(config).of_process:
            raise UserError(f"--init takes a backbone's weights, and the {of_process[0]} is learned too; name a run")
        if config.base_source:
            raise UserError("--init takes a whole model's weights, and this one has a frozen base beside; name a run")
        if not Path(file).is_file():
            raise UserError(f"--init {file}: there is no such file{from_where(file)}")
        model = load_published(build(config), file, which, config.diffusion.data_at_one).to(device)
        latents = config.first_stage.kind == "kl" and config.first_stage.normalise == "dataset"
        first_stage = build_first_stage(config, load_all(config.data) if latents else None, device)
        generator = generator_of(model, build_objective(config).process, config, device, first_stage)
        with open(file, "rb") as weights:
            return Opened(generator, 0, 0, hashlib.file_digest(weights, "sha256").hexdigest())

    return distributed.agree(opened)


def open_generator(run: RunDirectory, config: Config, device: torch.device, step: int | None = None) -> Opened:
    """The weights `eval.ema` of a run at `step`, by default its newest. A collective; raises UserError."""
    step = newest_step(run) if step is None else step

    def opened() -> Opened:
        checkpoint, key = open_weights(run, config, config.eval.ema, step)
        try:
            name = checkpoint.hash if isinstance(checkpoint, Combination) else manifest_hash(checkpoint.path)
        except OSError as e:  # the training keeps only so many
            raise UserError(f"{checkpoint.path} cannot be read: {e.strerror}") from None
        model = load_whole(checkpoint, config, key, device)
        first_stage = of_checkpoint(config, checkpoint.meta.get("first_stage"), device)
        process = objective_in(checkpoint, config, key).process
        generator = generator_of(model, process, config, device, first_stage)
        build_conditions(config).check(checkpoint.meta.get("text_encoders"))
        if config.eval.guide_with is not None:
            name += f"+{generator.guide.checkpoint}"
        return Opened(generator, checkpoint.meta["step"], checkpoint.meta["images"], name)

    return distributed.agree(opened)
