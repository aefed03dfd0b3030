"""A trained model in a program of one's own. `dtrain.load("runs/x").sample(labels=[3] * 8, steps=50, guidance=2)`."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from dtrain import config as configuration
from dtrain import distributed
from dtrain.checkpoint.export import class_names_of, open_weights
from dtrain.checkpoint.frozen_base import allocate_whole, load_whole, open_base
from dtrain.checkpoint.parameters import BACKBONE, split_name
from dtrain.checkpoint.process_networks import objective_in, objective_with
from dtrain.conditions.build import build as build_conditions
from dtrain.config import Config
from dtrain.config.guidance import chosen_over
from dtrain.diffusion.process import Process
from dtrain.errors import UserError
from dtrain.evaluation.control import in_turn, of_files
from dtrain.evaluation.generate import Generator
from dtrain.evaluation.invert import (
    Inversion,
    invert_blocks,
    settings_of_inversion,
    without_class,
)
from dtrain.evaluation.opened import generator_of
from dtrain.evaluation.pictures import as_pictures, picture_files, read_pictures
from dtrain.evaluation.prior import Prior
from dtrain.evaluation.requirements import check_generates, check_guidance, check_walks
from dtrain.evaluation.sample import draw, labels_in_turn, prompts_in_turn, together
from dtrain.evaluation.start import of_files as start_of_files
from dtrain.files import read_json
from dtrain.first_stage.build import of_checkpoint
from dtrain.first_stage.pixels import FirstStage
from dtrain.run import RunDirectory

WEIGHTS = "model.safetensors"  # an exported folder has this and config.json


@dataclass(frozen=True)
class Trained:
    """What `load` gives."""

    model: torch.nn.Module  # a DiT or a UNet in eval mode, float32: model(x_t, t, labels); or an autoencoder
    process: Process | None  # levels, targets, and what an output says about x_0 and ε
    config: Config  # of the run; `config.eval` has the defaults of `sample`
    step: int  # optimizer steps that the weights are of
    images: int  # images seen until then
    class_names: list[str] | None  # by number, where the data's manifest names them and is at hand
    device: torch.device
    first_stage: FirstStage  # between what the model sees and pixels

    def sample(
        self,
        n: int | None = None,
        labels: int | str | Iterable[int | str] | None = None,
        *,
        prompts: str | Iterable[str] | None = None,
        negative_prompt: str | None = None,
        pictures: str | Path | Iterable[str | Path] | None = None,
        as_is: bool = False,
        begin: str | Path | Iterable[str | Path] | None = None,
        strength: float | None = None,
        mask: str | Path | Iterable[str | Path] | None = None,
        repeats: int | None = None,
        control_scale: float | dict[str, float] | None = None,
        guess_mode: bool | None = None,
        guidance: float | str | Mapping[str, float] | None = None,
        steps: int | None = None,
        seed: int | None = None,
        sampler: str | None = None,
        eta: float | str | None = None,
        spacing: str | list[int] | None = None,
        clip: bool | None = None,
        guidance_interval: tuple[float, float] | None = None,
        guidance_rescale: float | None = None,
        guidance_orthogonal: float | None = None,
        guidance_norm: float | None = None,
        guidance_momentum: float | None = None,
        guidance_renoise: Literal["guided", "away"] | None = None,
        guide_with: str | None = None,
        precision: Literal["fp32", "bf16"] | None = None,
        batch_size: int | None = None,
        images: Literal["reconstructions", "prior"] | None = None,
    ) -> np.ndarray:
        """uint8 (n, H, W, C): what `dtrain sample` draws with the same settings on the same machine, bit for bit.

        n: how many, by default one a label, or 1. labels: of each image, or one for all, as numbers or class names; by
        default all classes in turn. prompts: in turn, of a model that is told in words; by default it is told nothing,
        and n is their number. pictures: files or folders that control the images, in turn, as `dtrain sample --picture`
        takes them; as_is: they are edges, masks and so on themselves. control_scale: of all pictures, or by condition.
        begin, strength, mask, repeats: files or folders that the images begin at, as `dtrain sample --from` takes them.
        The other settings are keys of the config's `eval` section, which has their defaults; image i is a function of
        them, its label and (seed, i). Raises UserError for what cannot be.
        """
        chosen = {
            "guidance": guidance,
            "negative_prompt": negative_prompt,
            "guess_mode": guess_mode,
            "control_scale": (
                control_scale
                if control_scale is None or isinstance(control_scale, dict)
                else dict.fromkeys(self.config.pictures, control_scale)
            ),
            "steps": steps,
            "seed": seed,
            "sampler": sampler,
            "eta": eta,
            "spacing": spacing,
            "clip": clip,
            "guidance_interval": guidance_interval,
            "guidance_rescale": guidance_rescale,
            "guidance_orthogonal": guidance_orthogonal,
            "guidance_norm": guidance_norm,
            "guidance_momentum": guidance_momentum,
            "guidance_renoise": guidance_renoise,
            "guide_with": guide_with,
            "precision": precision,
            "batch_size": batch_size,
            "images": images,
        }
        config = self._with_eval(chosen, "the settings of sample")
        check_guidance(config)
        asked = [prompts] if isinstance(prompts, str) else list(prompts or [])
        places, begins, masks = map(_listed, (pictures, begin, mask))
        shown = of_files(places, config, as_is) if places else {}
        start = start_of_files(begins, strength, masks, repeats, config.data)
        if start is not None:
            check_walks(config, self.config.run.name)
        several = max([len(asked), len(start.images) if start else 0, *map(len, shown.values())])
        numbers = self._labels(several if several and n is None and labels is None else n, labels)
        ready = self._generator(config)
        said = ready.conditions.saying(prompts_in_turn(asked, len(numbers))) if asked else {}
        said = {**said, **in_turn(shown, len(numbers))}
        return together(draw(ready, numbers, config.eval, said=said, start=start), len(numbers))

    def invert(
        self,
        pictures: np.ndarray | str | Path | Iterable[str | Path],
        labels: int | str | Iterable[int | str] | None = None,
        *,
        steps: int | None = None,
        spacing: str | list[int] | None = None,
        precision: Literal["fp32", "bf16"] | None = None,
        batch_size: int | None = None,
    ) -> Inversion:
        """The noise x_T that the model turns into these pictures, and what it draws from it: as `dtrain invert` gives.

        pictures: files, folders of them, or one of either; or uint8 (n, H, W, C). They are scaled and cropped as the
        run's held-out pictures. labels: of each picture, or one for all, as numbers or class names; by default none,
        the null class. The other settings are keys of the config's `eval` section. Deterministic DDIM (Song et al.
        2021, section 4.3), or Euler's method for a flow, without guidance. Raises UserError for what cannot be.
        """
        chosen = {"steps": steps, "spacing": spacing, "precision": precision, "batch_size": batch_size}
        config = self._with_eval(chosen | settings_of_inversion(self.config.diffusion), "the settings of invert")
        if isinstance(pictures, np.ndarray):
            images, names = as_pictures(pictures, config.data), [f"number {i}" for i in range(len(pictures))]
        else:
            files = picture_files([pictures] if isinstance(pictures, str | Path) else pictures)
            images, names = read_pictures(files, config.data), list(map(str, files))
        check_walks(config, self.config.run.name)
        n = len(images)
        if labels is None:
            numbers = without_class(n, config.model.num_classes, config.diffusion.label_dropout)
        else:
            numbers = self._labels(n, labels)
        ready = self._generator(config)
        blocks = dict(zip(range(0, n, config.eval.batch_size), images.split(config.eval.batch_size), strict=True))
        return Inversion.joined(invert_blocks(ready, blocks, numbers, config.eval, names).values())

    def _generator(self, config: Config) -> Generator | Prior:
        check_generates(config, self.config.run.name)
        return generator_of(self.model, self.process, config, self.device, self.first_stage)

    def _with_eval(self, chosen: dict, where: str) -> Config:
        """The config with other `eval` settings, None leaving one as it is. where: they come from, for a UserError."""
        tree = self.config.model_dump(mode="json")
        tree["eval"] = chosen_over(tree["eval"], {key: value for key, value in chosen.items() if value is not None})
        return configuration.validate(tree, where)

    def _labels(self, n: int | None, labels: int | str | Iterable[int | str] | None) -> torch.Tensor:
        """int64 (n,)."""
        classes = self.config.model.num_classes
        if n is not None and n < 1:
            raise UserError(f"n is {n}; take at least 1")
        if labels is None:
            return labels_in_turn(1 if n is None else n, classes)
        if not classes:
            raise UserError("this model has no classes; leave `labels` out")
        listed = [labels] * (1 if n is None else n) if isinstance(labels, int | str) else list(labels)
        if not listed or (n is not None and n != len(listed)):
            raise UserError(f"there are {len(listed)} labels for {n or 'no'} images; give each image one")
        return torch.tensor([self._number(label) for label in listed])

    def _number(self, label: int | str) -> int:
        names, classes = self.class_names or [], self.config.model.num_classes
        number = names.index(label) if label in names else label
        if isinstance(number, str):
            known = f"known are {', '.join(names)}" if names else "their names are not known here, so give numbers"
            raise UserError(f"there is no class {number!r}; {known}")
        if not 0 <= number < classes:
            raise UserError(f"there is no class {number}; the model has {classes}, counted from 0")
        return int(number)


def load(
    run: str | Path,
    ema: int | dict[str, float] | None = 0,
    step: int | None = None,
    device: torch.device | str | None = None,
) -> Trained:
    """A run's trained model: `run` is its directory, a name under runs/, or a folder of `dtrain checkpoints export`.

    ema: which profile; None for the raw weights; {"sigma_rel": 0.13} for an average made of snapshots. step: of which
    checkpoint; by default the newest complete one. An exported folder has but one set of weights. device: by default a
    GPU where there is one. The run may be training. Raises UserError.
    """
    where = torch.device(device) if device is not None else distributed.device()
    if (Path(run) / WEIGHTS).is_file():
        return _exported(Path(run), ema, step, where)
    directory = RunDirectory.find(run)
    config = directory.config()
    checkpoint, key = open_weights(directory, config, ema, step)
    model = load_whole(checkpoint, config, key, where)
    process = objective_in(checkpoint, config, key).process
    meta = checkpoint.meta
    names = class_names_of(config.data, config.model.num_classes)
    first_stage = of_checkpoint(config, meta.get("first_stage"), where)
    build_conditions(config).check(meta.get("text_encoders"))
    about = meta["step"], meta["images"], names
    return Trained(model.to(where).eval(), process, config, *about, where, first_stage)


def _exported(folder: Path, ema: int | None, step: int | None, device: torch.device) -> Trained:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tree = read_json(folder / "config.json")
        state = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as e:
        raise UserError(f"{folder} cannot be read as an exported folder: {e}") from None
    if not isinstance(tree, dict) or "train" not in tree:
        raise UserError(f"{folder}/config.json lacks sections that sampling needs; export the checkpoint again")
    source = {
        key: tree.pop(key, None) for key in ("run", "step", "images", "weights", "class_names", "trained_with", "base")
    }
    generator = {"generator": tree.pop("generator")} if "generator" in tree else {}
    names = source["class_names"]
    complete = all(type(source[key]) is int for key in ("step", "images"))
    complete &= bool(re.fullmatch(r"fp32|ema_[0-9]{1,3}|sigma_0[.][0-9]{1,20}", str(source["weights"])))
    complete &= names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))
    if not complete:
        raise UserError(f"{folder}/config.json does not tell what its weights are; export the checkpoint again")
    if step not in (None, source["step"]) or ema not in (0, _profile(source["weights"])):
        asked = f"ema {ema}" if step is None else f"ema {ema} of step {step}"
        raise UserError(f"{folder} holds {source['weights']} of step {source['step']} alone, not {asked}")
    tree = configuration.with_earlier_values(tree | {"run": {"name": source["run"], **generator}})
    config = configuration.validate(tree, f"{folder}/config.json")
    model = allocate_whole(config, device)
    if (base := open_base(config, device)) is not None:
        base.check_of_checkpoint({"base": source["base"]})
    beside = {name: state.pop(name) for name in list(state) if split_name(name)[0] != BACKBONE}
    process = objective_with(beside, config, f"{folder}/{WEIGHTS}").process
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise UserError(f"{folder}/{WEIGHTS} is of another model than config.json: {str(e).splitlines()[-1]}") from None
    first_stage = of_checkpoint(config, source["trained_with"], device)
    about = source["step"], source["images"], names
    return Trained(model.to(device).eval(), process, config, *about, device, first_stage)


def _listed(places: str | Path | Iterable[str | Path] | None) -> list[str | Path]:
    return [places] if isinstance(places, str | Path) else list(places or [])


def _profile(weights: str) -> int | None:
    return None if weights == "fp32" else int(weights.removeprefix("ema_")) if weights.startswith("ema_") else 0
