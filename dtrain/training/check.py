"""Would this run start? `dtrain train --check` and job submission ask, without torch, NumPy and ranks."""

import os
from pathlib import Path

from dtrain.checkpoint.directory import LARGEST, complete
from dtrain.conditions.requirements import check as check_words
from dtrain.config import Config, Data, architecture, with_earlier_values
from dtrain.config.encoders import check as check_encoder
from dtrain.data.declared import caption
from dtrain.data.fields.captions import look
from dtrain.data.fields.check import LOOKED_AT, check_fields, check_training
from dtrain.data.fields.survey import named, survey
from dtrain.data.shards import manifest as manifests
from dtrain.data.shards.sample_files import LABEL_FIELD
from dtrain.errors import UserError, from_where
from dtrain.evaluation.requirements import about_names, about_prior, check_best, check_evaluation
from dtrain.files import read_json
from dtrain.first_stage.requirements import about as about_first_stage
from dtrain.first_stage.requirements import check as check_first_stage
from dtrain.run import RunDirectory
from dtrain.tracking.history import History
from dtrain.training.division import rows_per_rank
from dtrain.training.identity import has_trained, reconcile, resolved
from dtrain.training.safety.stopping import deadline

SHORTEST = 100  # steps of a run that is meant to be evaluated
MOST_OF_THE_START = 0.03  # of an average may be left of the initial weights at the end without a warning
PUBLISHED = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")  # files that run.init_from takes besides checkpoints


def check_start(config: Config, ranks: int) -> str:
    """What would run on `ranks` ranks, and on which pictures: lines. Raises the UserError that a start would."""
    rows, micro_batch = rows_per_rank(config.data.batch_size, config.train.micro_batch, ranks)
    manifest = manifests.load_all(config.data)
    run = RunDirectory(config.run.path)
    config = resolved(run, config, manifest)
    lacking = check_inputs(config, manifest)
    deadline(config.train.deadline, 0.0)
    reconcile(run, config)
    check_data(run, manifest, History.read(run.journal_file))
    verb = "goes on" if complete(run.checkpoints) else "starts"
    ours, size = config.deepspeed, config.data.batch_size
    lines = [
        f"{run.path} {verb}: {config.train.steps:,} steps of {size} images from {manifest.samples:,}; each rank has "
        f"{rows} of them in micro-batches of {micro_batch}, at ZeRO stage {ours.zero_stage} in {ours.precision}",
        *lacking,
        *about_first_stage(config, manifest),
        *about_captions(config, manifest),
        *(about_pictures(config.data, config.model.num_classes, manifest) if config.reads_pictures else []),
        *warnings(config),
    ]
    return "\n".join(lines)


def warnings(config: Config) -> list[str]:
    """What may be meant but seldom is, a line each."""
    steps, lines = config.train.steps, []
    for number, profile in enumerate(config.ema):
        average = profile.sigma_rel is None and steps >= SHORTEST
        if average and (left := profile.decay**steps) > MOST_OF_THE_START:
            lines.append(
                f"ema.{number}.decay {profile.decay} after {steps:,} steps is still {left:.0%} the untrained weights; "
                f"{round(1 - 10 / steps, 4)} would average the last tenth of the run"
            )
    if line := about_prior(config):
        lines.append(line)
    if config.objective.kind == "distillation":
        lines += about_distillation(config)
    end, images = config.optim.decay_end, steps * config.data.batch_size
    if end is not None and images > end:
        lines.append(
            f"optim.decay_end {end:,}: the learning rate is 0 from there on, and the run sees {images:,} images "
            "(train.steps × data.batch_size)"
        )
    return [*lines, *about_names(config)] if config.eval.every else lines


def about_distillation(config: Config) -> list[str]:
    """What a student is seldom meant to be."""
    lines, taught, e = [], config.objective.steps, config.eval
    if not config.run.init_from:
        lines.append(
            f"run.init_from is not set: the network begins with random weights, where run.init_from="
            f"{config.objective.teacher} begins as its teacher"
        )
    if e.every and e.steps != taught:
        lines.append(f"eval.steps {e.steps}: the network is taught a walk of {taught} steps (objective.steps)")
    return lines


def about_pictures(data: Data, num_classes: int, manifest: manifests.Manifest) -> list[str]:
    """What becomes of the pictures, as far as the headers of a few say, and what the classes are called."""
    lines, found = [], survey(manifest, data.shards)
    if scaling := found.scaling(data.image_size):
        lines.append(scaling)
    if turned := found.turned:
        which = f"{turned} of {len(found.headers)} images looked at"
        lines.append(
            f"{which}: turned as their EXIF orientation says"
            if data.upright
            else f"{which}: not turned as their EXIF orientation says, because data.exif is ignore"
        )
    if found.headers and found.grey != (data.channels == 1):
        lines.append("they have no colours, and data.channels is 3" if found.grey else "their colours become grey")
    if num_classes and manifest.classes:
        lines.append(named(manifest.classes))
    elif num_classes:
        lines.append(f"{num_classes:,} classes, which {manifest.path} does not name")
    elif LABEL_FIELD in manifest.fields:
        lines.append("model.num_classes is 0: the images' labels are not read")
    return lines


def about_captions(config: Config, manifest: manifests.Manifest) -> list[str]:
    """What a look at some captions says, a line for each condition of words; of cached ones, what all of them are."""
    found = [
        look(manifest, config.data.shards, caption(*one), LOOKED_AT)
        for one in config.texts.items()
        if not one[1].cached
    ]
    cached = {made.name: made for made in manifest.embeddings}
    lines = [cached[name].about for name, section in config.texts.items() if section.cached]
    return [*(str(one) for one in found if one.looked_at), *lines]


def check_inputs(config: Config, manifest: manifests.Manifest) -> list[str]:
    """Lines about samples that will be replaced.

    Raises UserError where what the run reads is not there or does not fit the config.
    A start asks this before it takes the run directory; what stands in that directory it judges once it has it.
    """
    if config.model.num_classes and config.diffusion.label_dropout == 1:
        raise UserError(
            "diffusion.label_dropout 1 never shows the model a label; set model.num_classes to 0, or take a dropout "
            "such as 0.1"
        )
    manifests.check_all(manifest, config.data)
    check_first_stage(config, manifest)
    check_words(config, manifest)
    for name, section in config.texts.items():
        if not section.trained:
            check_encoder(f"conditions.{name}.width", section.width, section.encoder)
    if config.base_source:
        check_base(config)
    if config.objective.kind == "distillation":
        from dtrain.checkpoint.teacher import check_teacher  # it needs torch

        check_teacher(config)
    check_fields(config, manifest)
    for key, weights in config.weight_files.items():
        if not os.path.isfile(weights):
            raise UserError(f"{key} names {weights}{from_where(weights)}, which is no file")
    lacking = check_training(config, manifest)
    if config.eval.every:
        if isinstance(config.eval.ema, dict):
            raise UserError(
                "eval.ema sigma_rel is an average made of snapshots after the training, and eval.every evaluates while "
                "it goes on; take the number of a profile of ema, and `dtrain evaluate --sigma` later"
            )
        check_evaluation(config)
        if not complete(RunDirectory(config.run.path).checkpoints):  # one that has begun goes on, and says so
            check_best(config)
    if config.run.init_from and not complete(RunDirectory(config.run.path).checkpoints):
        check_source(config)
    return lacking


def check_data(run: RunDirectory, manifest: manifests.Manifest, history: History) -> None:
    """Raises UserError where the run's last attempt was trained on other data."""
    attempts = history.counting("attempt")
    if attempts and attempts[-1]["context"].get("data") != manifest.hash and has_trained(run):
        raise UserError(
            f"{run.path} was trained on another data set than {manifest.path} (the manifests' hashes differ); "
            f"give this run a new run.name, or the old data"
        )


def check_source(config: Config) -> None:
    """Raises UserError where the weights to begin with are not there, or are another model's."""
    source = config.run.init_from
    if is_weight_file(source):
        check_published(config)
        return
    path = checkpoint_at(source)
    try:
        manifest = read_json(path / "manifest.json", LARGEST)
        theirs = architecture(Config(**with_earlier_values(manifest["meta"]["config"])))
        averaged = any(name.endswith(":ema_0") for name in manifest["tensors"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return  # whoever loads it says more than a glance can
    if config.run.init_weights == "ema" and not averaged:
        raise UserError(f"run.init_weights=ema: {path} holds no averaged weights; leave it out for the raw ones")
    ours = architecture(config)
    key = next((k for k in ours if k in theirs and theirs[k] != ours[k]), None)
    if key is not None:
        raise UserError(
            f"run.init_from={source}: {path} is of another model: {key} is {theirs[key]} there, {ours[key]} here"
        )


def is_weight_file(place: str) -> bool:
    """Whether run.init_from names a file of weights, not a run or a checkpoint."""
    return place.endswith(PUBLISHED) and not Path(place).is_dir()


def check_published(config: Config) -> None:
    """Raises UserError where run.init_from names no file, or one whose weights are not this model's.

    The only check that needs torch, which reads the names and shapes.
    """
    source = config.run.init_from
    if not Path(source).is_file():
        raise UserError(f"run.init_from={source}: there is no such file{from_where(source)}")
    import torch

    from dtrain.models.build import allocate
    from dtrain.models.published import published

    with torch.device("meta"):
        model = allocate(config)
    published(model, source, config.run.init_weights, config.diffusion.data_at_one)


def check_base(config: Config) -> None:
    """Raises UserError where the frozen weights are not there, or is another model's. Needs torch."""
    from dtrain.checkpoint.frozen_base import check_source

    check_source(config.base_source, config.base)


def checkpoint_at(place: str) -> Path:
    """A checkpoint's own folder, or the newest complete checkpoint of a run. Raises UserError."""
    if (Path(place) / "manifest.json").is_file():
        return Path(place).resolve() if Path(place).is_symlink() else Path(place)  # a link of the user's own
    if Path(place).is_file():
        raise UserError(f"run.init_from={place}: a file of weights is {', '.join(PUBLISHED[:-1])} or {PUBLISHED[-1]}")
    if Path(place).is_dir() and not (Path(place) / "config.yaml").is_file():
        files = sorted(name for name in os.listdir(place) if name.endswith(PUBLISHED))
        if files:
            raise UserError(f"run.init_from={place} is no run; for the weights in it say {Path(place) / files[0]}")
    run = RunDirectory.find(place)
    found = complete(run.checkpoints)
    if not found:
        raise UserError(f"{run.path} has no complete checkpoint")
    return found[-1]
