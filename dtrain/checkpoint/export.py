"""Weights out of a checkpoint, on one process, without DeepSpeed: into a plain module, or a folder for others."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType

import torch

from dtrain.checkpoint import readme
from dtrain.checkpoint.averages import KEY as AVERAGE
from dtrain.checkpoint.averages import Combination, combination
from dtrain.checkpoint.directory import complete, step_of, step_path
from dtrain.checkpoint.format import Checkpoint, Damaged
from dtrain.checkpoint.parameters import BACKBONE, full_name
from dtrain.config import Config, Data, EMAProfile
from dtrain.errors import UserError
from dtrain.files import replacing
from dtrain.models.weight_file import PROGRAM, WRITTEN_BY
from dtrain.run import RunDirectory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_checkpoint(run: RunDirectory, step: int | None = None) -> Checkpoint:
    """A run's newest complete checkpoint, or the one of `step`. Raises UserError for none, or a damaged one."""
    found = complete(run.checkpoints)
    if not found:
        raise UserError(f"{run.path} has no complete checkpoint yet")
    path = found[-1] if step is None else step_path(run.checkpoints, step)
    if path not in found:
        steps = ", ".join(str(step_of(p)) for p in found)
        raise UserError(f"{run.path} has no checkpoint of step {step}; there are: {steps}")
    try:
        checkpoint = Checkpoint.open(path)
    except Damaged as e:
        raise UserError(f"the checkpoint is damaged: {e}") from None
    if not {"step", "images"} <= checkpoint.meta.keys():
        raise UserError(f"{path} does not tell its step and images; it is no checkpoint of a run")
    return checkpoint


@torch.no_grad()
def load_weights(
    checkpoint: Checkpoint | Combination, module: torch.nn.Module, key: str, network: str = BACKBONE
) -> torch.nn.Module:
    """Fill a module with a checkpoint's "fp32" weights or one of its EMAs ("ema_0"); frozen parameters have only fp32.

    network: which of the checkpoint's it is. Raises UserError when the checkpoint is damaged or holds no such weights.
    """
    values = {}
    for local, p in module.named_parameters():
        name = full_name(network, local)
        tensor = f"{name}:{key if p.requires_grad else 'fp32'}"
        values[tensor] = p, torch.empty(p.shape, dtype=torch.float32)
        if checkpoint.tensors.get(tensor, p.numel()) != p.numel():
            raise UserError(
                f"{checkpoint.path} is of another model: {name} has {checkpoint.tensors[tensor]:,} elements there, "
                f"{p.numel():,} here"
            )
    try:
        # All at once: a file that holds pieces of many tensors is read once.
        checkpoint.read_into((name, 0, value.flatten().numpy()) for name, (_, value) in values.items())
        for p, value in values.values():
            p.copy_(value)
    except Damaged as e:
        raise UserError(f"the checkpoint is damaged: {e}") from None
    except KeyError as e:
        raise UserError(f"{checkpoint.path} holds no {e.args[0]}") from None
    return module


def weights_key(ema: int | None, profiles: Sequence[EMAProfile], run: str) -> str:
    """What a checkpoint calls the weights of an EMA profile, None for the raw ones.

    profiles: those of the run of this name. Raises UserError where there is no such one.
    """
    if ema is not None and not 0 <= ema < len(profiles):
        raise UserError(f"there is no EMA {ema}: run {run} has {len(profiles)}, counted from 0")
    return "fp32" if ema is None else f"ema_{ema}"


def open_weights(
    run: RunDirectory, config: Config, ema: int | dict[str, float] | None, step: int | None
) -> tuple[Checkpoint | Combination, str]:
    """What `load_weights` takes: a checkpoint of a run, and what it calls the weights.

    ema: the number of a profile, None for the raw weights, or {"sigma_rel": 0.13} for an average made of snapshots.
    step: by default the newest. Raises UserError.
    """
    if isinstance(ema, dict):
        return combination(run, config, ema["sigma_rel"], step), AVERAGE
    return open_checkpoint(run, step), weights_key(ema, config.ema, config.run.name)


def class_names_of(data: Data, num_classes: int) -> list[str] | None:
    """The names of the model's classes by the manifest of its data; None where it names none, or is not here now."""
    from dtrain.data.shards.manifest import class_names

    return class_names(data.manifest_path) if num_classes else None


def export(
    run: RunDirectory,
    out: Path,
    step: int | None,
    ema: int | dict[str, float] | None,
    dtype: str,
    format: str,
    merge: Callable[[Checkpoint | Combination, Config, str], torch.nn.Module] | None = None,
) -> str:
    """Write a checkpoint's weights and how to draw with them to the folder `out`; lines that say what.

    safetensors: model.safetensors with the model's own parameter names, and config.json, for `dtrain.load`.
    published: model.safetensors alone, for the papers' programs: of a flow with diffusion.time_scale 1 it counts time
    as SiT's files do.
    diffusers: a pipeline's folder for `DiffusionPipeline.from_pretrained`, with a pipeline.py where diffusers has none.
    An autoencoder is a folder of diffusers' AutoencoderKL, which first_stage.source takes.
    merge: `frozen_base.load_merged`, of low-rank adapters the whole model; without, diffusers gets the adapters.
    All with a README.md that draws a picture. Raises UserError, also where `out` holds files already.
    """
    from dtrain.models.build import allocate

    if dtype not in DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(DTYPES)}")
    if format not in WRITERS:
        raise UserError(f"--format {format} is not one of {', '.join(WRITERS)}")
    config, write = run.config(), WRITERS[format]
    if config.diffusion.process == "meanflow" and format != "safetensors":
        raise UserError(
            f"--format {format} has no place for MeanFlow, whose model is told two times; take --format safetensors"
        )
    if config.diffusion.process == "ddgan" and config.objective.diffuses and format != "safetensors":
        raise UserError(
            f"--format {format} has no place for a denoising GAN, whose model is told random numbers beside its "
            "timestep; take --format safetensors"
        )
    if config.diffusion.process == "vdm" and config.objective.diffuses and format != "safetensors":
        raise UserError(
            f"--format {format} has no place for variational diffusion, whose model is told its own γ instead of a "
            "timestep; take --format safetensors"
        )
    if config.model.name == "kl_autoencoder":
        if format != "diffusers":
            raise UserError(f"--format {format} is for what draws; an autoencoder is exported with --format diffusers")
        write = _write_autoencoder
    checkpoint, key = open_weights(run, config, ema, step)
    weights = key if key != AVERAGE else f"sigma_{ema['sigma_rel']}"
    source = {"run": config.run.name, "step": checkpoint.meta["step"], "images": checkpoint.meta["images"]}
    if "first_stage" in checkpoint.meta:
        source["trained_with"] = checkpoint.meta["first_stage"]  # what latents mean is in no weight
    adapted = getattr(config.model, "adapt", None) is not None
    if merge and not adapted:
        raise UserError("--merge is of a run with model.adapt, whose adapters go into the weights of its base")
    if config.base_source and not merge:
        write = _without_base(config, format)
        source |= checkpoint.meta.get("held", {})  # of what the trained weights stand on
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"--out {out} is there already; name a new folder, or an empty one")
        if merge:
            module, config = merge(checkpoint, config, key).to(DTYPES[dtype]), config.base
        else:
            module = load_weights(checkpoint, allocate(config), key).to(DTYPES[dtype])
        if of_process := _of_process(checkpoint, config, key):
            write = partial(write, beside=of_process)
        left_out = write(module, config, source | {"weights": weights}, out)
    except OSError as e:
        raise UserError(f"cannot write --out {out}: {e.strerror}") from None
    parameters = sum(p.numel() for p in module.parameters())
    lines = [
        f"{out}: {weights} of step {checkpoint.meta['step']}, {parameters:,} parameters; its README.md draws with it"
    ]
    if left_out:
        lines.append(f"not in it, as diffusers draws otherwise: {', '.join(left_out)}")
    if config.model.num_classes and not class_names_of(config.data, config.model.num_classes):
        lines.append(f"classes go by their numbers: {config.data.manifest_path} has no names of them, or is not here")
    return "\n".join(lines)


def _of_process(checkpoint: Checkpoint | Combination, config: Config, key: str) -> dict[str, torch.Tensor]:
    """Full name → float32 weight of the networks that the process is made of, such as a learned schedule."""
    from dtrain.objectives.build import build

    objective, found = build(config), {}
    for name in objective.of_process:
        network = load_weights(checkpoint, objective.networks[name](), key, name)
        found |= {full_name(name, local): p.detach() for local, p in network.named_parameters()}
    return found


def _without_base(config: Config, format: str) -> Callable[..., list[str]]:
    """What writes the trained weights alone. Raises UserError where nothing does."""
    if format == "diffusers" and not config.pictures:
        return _write_adapters
    if format != "safetensors":
        why = "" if config.pictures else ", or --merge"
        raise UserError(f"{_why_not_controlled(config, format)}; take --format safetensors{why}")
    return _write_safetensors


def _why_not_controlled(config: Config, format: str) -> str:
    """Why what stands on a base has no such export."""
    if format != "diffusers":
        return f"--format {format} has no place for weights without their base"
    if config.model.name == "dit":
        return "diffusers' control networks for transformers are of other transformers than its DiT"
    return (
        "diffusers' ControlNetModel has transformer blocks in its middle, or one residual block alone, where this UNet "
        "has plain attention between two, and diffusers' UNet2DModel, which the base is, takes nothing that is added"
    )


def _write_safetensors(
    module: torch.nn.Module,
    config: Config,
    source: dict,
    out: Path,
    beside: Mapping[str, torch.Tensor] = MappingProxyType({}),
) -> list[str]:
    """beside: weights of further networks, by their full names."""
    tree, names = config.model_dump(mode="json"), class_names_of(config.data, config.model.num_classes)
    sections = {name: section for name, section in tree.items() if name not in ("run", "tracking")}  # `run`: its name
    sections["generator"] = config.run.generator
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(readme.of_safetensors(config, source, names), encoding="utf-8")
    _save_json(source | sections | {"class_names": names}, out / "config.json")
    own = source | {WRITTEN_BY: PROGRAM}
    weights = {n: p.detach() for n, p in module.named_parameters()}
    _save_weights({**weights, **beside}, own, out / "model.safetensors")
    return []


def _check_published(config: Config, format: str) -> None:
    """Raises UserError where the network has a part that the published one, and diffusers', has not."""
    if part := getattr(config.model, "unlike_published", None):
        if config.model.name == "unet":
            raise UserError(f"--format {format} has no place for {part} of a UNet; take --format safetensors")
        raise UserError(f"--format {format} is of the published DiT, which has no {part}; take --format safetensors")


def _write_published(module: torch.nn.Module, config: Config, source: dict, out: Path) -> list[str]:
    from dtrain.models.time_turned import time_turned

    _check_published(config, "published")
    state = {name: p.detach() for name, p in module.named_parameters()}
    if config.diffusion.data_at_one:
        state = time_turned(state, module, config.diffusion.data_at_one)
    names = class_names_of(config.data, config.model.num_classes)
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(readme.of_published(config, source, names), encoding="utf-8")
    _save_weights(state, source, out / "model.safetensors")
    return []


def _write_diffusers(module: torch.nn.Module, config: Config, source: dict, out: Path) -> list[str]:
    from dtrain.checkpoint.diffusers import to_diffusers
    from dtrain.diffusion.process import build as build_process

    if config.first_stage.kind != "pixels" or config.conditions:
        raise UserError("diffusers has no part for this run's first stage or conditions; take --format safetensors")
    _check_published(config, "diffusers")
    names = class_names_of(config.data, config.model.num_classes)
    exported = to_diffusers(module, build_process(config.diffusion), config.eval, names)
    folder = out / exported.folder
    for place in (folder, out / "scheduler"):
        place.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(readme.of_diffusers(exported, config, source, names), encoding="utf-8")
    if exported.own_pipeline:
        shutil.copyfile(Path(__file__).with_name("pipeline.py"), out / "pipeline.py")
    _save_json(exported.config, folder / "config.json")
    _save_json(exported.scheduler, out / "scheduler" / "scheduler_config.json")
    _save_weights(exported.weights, source, folder / "diffusion_pytorch_model.safetensors")
    _save_json(exported.index, out / "model_index.json")  # last: without it the folder is no pipeline yet
    return exported.left_out


def _write_adapters(module: torch.nn.Module, config: Config, source: dict, out: Path) -> list[str]:
    from dtrain.checkpoint.adapters import adapters_of_diffusers

    _check_published(config, "diffusers")
    weights = adapters_of_diffusers(module, config.model.name)
    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(readme.of_adapters(config, source), encoding="utf-8")
    _save_weights(weights, source, out / "pytorch_lora_weights.safetensors")
    return []


def _write_autoencoder(module: torch.nn.Module, config: Config, source: dict, out: Path) -> list[str]:
    from dtrain.checkpoint.diffusers import autoencoder_config

    out.mkdir(parents=True, exist_ok=True)
    (out / "README.md").write_text(readme.of_autoencoder(config, source), encoding="utf-8")
    _save_json(autoencoder_config(module, config.data.image_size), out / "config.json")
    weights = {name: p.detach() for name, p in module.named_parameters()}
    _save_weights(weights, source, out / "diffusion_pytorch_model.safetensors")
    return []


WRITERS = {"safetensors": _write_safetensors, "published": _write_published, "diffusers": _write_diffusers}


def _save_weights(weights: dict[str, torch.Tensor], source: dict, path: Path) -> None:
    from safetensors.torch import save

    with replacing(path) as file:  # safetensors' own files are for nobody else to read
        file.write(save({n: w.contiguous() for n, w in weights.items()}, {k: str(v) for k, v in source.items()}))


def _save_json(tree: dict, path: Path) -> None:
    path.write_text(json.dumps(tree, indent=1) + "\n")
