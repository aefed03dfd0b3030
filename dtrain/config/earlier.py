"""What a key meant before it existed: an older run goes on as it began, whatever today's default is.

A run's own config.yaml, or a checkpoint's config, may lack keys that were added since. Each means there what was done
before it existed; only a new run takes today's default. Whoever adds a key that decides what a run computes, or how it
is evaluated, adds a row here; the golden configs hold everybody to it. `data.streams` is resolved beside this table, in
`data/order/streams.py`, because its value follows from the data.
"""

from typing import Any, NamedTuple


class Earlier(NamedTuple):
    """A row, of a key or of a whole section: the value that held.

    where: (tag, value, …) of the branches that have the key, where a section is a union.
    """

    value: Any
    where: tuple[str, ...] | None = None


_DIT, _UNET = ("name", "dit"), ("name", "unet")
_GAUSSIAN, _FLOW, _MEAN_FLOW = ("process", "gaussian"), ("process", "flow"), ("process", "meanflow")

EARLIER: dict[str, Earlier] = {
    "run.init_from": Earlier(None),
    "run.init_weights": Earlier(None),
    "run.generator": Earlier(1),
    "data.weight": Earlier(1.0),
    "data.mix": Earlier([]),
    "data.arrays": Earlier({}),
    "data.fields": Earlier({}),
    "data.crop": Earlier("centre"),
    "data.scaling": Earlier("adm"),
    "data.exif": Earlier("ignore"),
    "data.on_error": Earlier("raise"),
    "data.allow_pipe": Earlier(False),
    "data.holdout_shards": Earlier(None),
    "model.control_of": Earlier(None, ("name", "dit", "unet")),
    "model.adapt": Earlier(None, ("name", "dit", "unet")),
    "model.fourier": Earlier([], ("name", "dit", "unet")),
    "model.qk_norm": Earlier(False, _DIT),
    "model.frequency_shift": Earlier(0, _DIT),
    "model.norm": Earlier("layer", _DIT),
    "model.mlp": Earlier("gelu", _DIT),
    "model.positions": Earlier("sincos", _DIT),
    "model.patch_bottleneck": Earlier(None, _DIT),
    "model.context_tokens": Earlier(0, _DIT),
    "model.context_from": Earlier(None, _DIT),
    "model.resblock_updown": Earlier(False, _UNET),
    "model.group_norm_eps": Earlier(1e-6, _UNET),
    "diffusion.stratified": Earlier(False),
    "diffusion.zero_terminal_snr": Earlier(False, _GAUSSIAN),
    "diffusion.noise": Earlier("normal", _GAUSSIAN),
    "diffusion.theta_0": Earlier(0.001, _GAUSSIAN),
    "diffusion.variance": Earlier("fixed_small", _GAUSSIAN),
    "diffusion.loss": Earlier("simple", _GAUSSIAN),
    "diffusion.weighting": Earlier("none", _GAUSSIAN),
    "diffusion.times": Earlier("uniform", ("process", "gaussian", "flow")),
    "diffusion.coupling": Earlier("independent", _FLOW),
    "diffusion.time_scale": Earlier(1000, _FLOW),
    "diffusion.prediction": Earlier("velocity", _FLOW),
    "diffusion.least_time": Earlier(0.05, _FLOW),
    "diffusion.perceptual": Earlier(None, _FLOW),
    "diffusion.guidance": Earlier(1.0, _MEAN_FLOW),
    "diffusion.guidance_mix": Earlier(0.0, _MEAN_FLOW),
    "diffusion.guidance_from": Earlier(0, _MEAN_FLOW),
    "first_stage.kind": Earlier("pixels"),
    "objective.kind": Earlier("denoising"),
    "conditions": Earlier({}),
    "optim.name": Earlier("adamw"),
    "optim.momentum": Earlier(0.95),
    "optim.schedule": Earlier("constant"),
    "optim.decay_start": Earlier(None),
    "optim.decay_end": Earlier(None),
    "optim.decay_share": Earlier(None),
    "optim.fused": Earlier(False),
    "deepspeed.precision": Earlier("fp32"),
    "deepspeed.offload": Earlier("none"),
    "train.activation_checkpointing": Earlier(False),
    "train.compile": Earlier(False),
    "train.tf32": Earlier("convolutions"),
    "train.spike_factor": Earlier(0.0),  # no step was refused for its norm
    "train.start_limit": Earlier(1800.0),
    "train.snapshot_every": Earlier(None),
    "train.keep_snapshots": Earlier(None),
    "train.ema_new": Earlier("refuse"),
    "eval.images": Earlier("reconstructions"),
    "eval.clip": Earlier(False),
    "eval.training_images": Earlier(50_000),
    "eval.bpd_clip": Earlier(False),
    "eval.ode_tolerance": Earlier(1e-5),
    "eval.ode_probes": Earlier(1),
    "eval.negative_prompt": Earlier(""),
    "eval.sde_noise": Earlier(None),
    "eval.churn": Earlier(0.0),
    "eval.churn_min": Earlier(0.0),
    "eval.churn_max": Earlier(0.0),
    "eval.churn_noise": Earlier(1.0),
    "eval.prompts": Earlier([]),
    "eval.guidance_interval": Earlier([0.0, 1.0]),
    "eval.guidance_rescale": Earlier(0.0),
    "eval.guidance_orthogonal": Earlier(0.0),
    "eval.guidance_norm": Earlier(None),
    "eval.guidance_momentum": Earlier(0.0),
    "eval.guidance_renoise": Earlier("guided"),
    "eval.guide_with": Earlier(None),
    "eval.guidance_channels": Earlier("all"),
    "eval.control_scale": Earlier({}),
    "eval.guess_mode": Earlier(False),
    "eval.labels": Earlier("data"),
    "eval.bootstrap": Earlier(0),
    "eval.reference": Earlier(None),
    "eval.resize": Earlier(None),
    "eval.clip_model": Earlier(None),
    "eval.classifier": Earlier(None),
    "eval.precision": Earlier("fp32"),
    "eval.decode_batch": Earlier(None),
    "tracking.carbon_intensity": Earlier(None),
}

# Key → its former default, where only the default has changed: a run that began with it keeps it.
FORMER_DEFAULTS: dict[str, Any] = {"eval.batch_size": 250}


def with_earlier_values(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree of an older run's config, with every key of the table that it lacks."""
    filled = dict(tree)
    for name in missing(tree):
        section, _, key = name.partition(".")
        filled[section] = (filled.get(section) or {}) | {key: EARLIER[name].value} if key else EARLIER[name].value
    return filled


def missing(tree: dict[str, Any]) -> list[str]:
    """Keys of the table that a config's tree lacks, of the branches that it has chosen."""
    found = []
    for name, row in EARLIER.items():
        section, _, key = name.partition(".")
        keys = tree.get(section) or {}
        if not key:
            found += [name] if section not in tree else []
            continue
        if isinstance(keys, dict) and key not in keys and (row.where is None or _chosen(keys, *row.where)):
            found.append(name)
    return found


def _chosen(keys: dict[str, Any], tag: str, *values: str) -> bool:
    """Whether the section is one of these branches of its union; a diffusion that does not say is gaussian."""
    return keys.get(tag, "gaussian" if tag == "process" else None) in values
