"""Which metrics a configuration can have: each names what it is of, and what to take instead."""

from typing import Any

from dtrain.config.evaluation import BOUNDS, DENSITIES, OF_THE_MODEL, OF_WHAT_IS_ASKED


def check(config: Any) -> None:
    """Raises ValueError for metrics that this config's process, first stage or model cannot have."""
    for metric in config.eval.metrics:
        if metric in OF_THE_MODEL and not config.objective.diffuses:
            raise ValueError(
                f"eval.metrics {metric} is of a diffusion process, and objective.kind {config.objective.kind} has "
                "none; take fd"
            )
        if metric in BOUNDS:
            _check_bound(metric, config)
        elif metric in DENSITIES:
            _check_density(metric, config)
        elif metric == "straightness" and config.diffusion.process != "flow":
            raise ValueError(
                f"eval.metrics straightness is of a flow's paths, and diffusion.process is {config.diffusion.process}; "
                "leave it out"
            )
        elif metric in OF_WHAT_IS_ASKED:
            _check_asked(metric, config)
        elif metric == "memorisation" and not config.reads_pictures:
            raise ValueError(
                "eval.metrics memorisation compares samples with training pictures, and this config reads none; "
                "leave it out"
            )


def _check_bound(metric: str, config: Any) -> None:
    process, kind = config.diffusion.process, config.first_stage.kind
    if process not in ("gaussian", "vdm"):
        instead = f"take {metric}_ode" if process == "flow" else "leave it out"
        raise ValueError(
            f"eval.metrics {metric} is the bound of a gaussian process, which has timesteps to sum over, or of vdm, "
            f"and diffusion.process is {process}; {instead}"
        )
    if getattr(config.diffusion, "noise", "normal") == "gamma":
        raise ValueError(
            f"eval.metrics {metric} is a bound of normal noise, and diffusion.noise is gamma; leave it out"
        )
    if metric == "bpd" and kind != "pixels":
        more = "; the bound on the density of latents is nats_per_dim_latent" if kind == "kl" else ""
        raise ValueError(f"eval.metrics bpd is of pixels, which have levels, and first_stage.kind is {kind}{more}")
    if metric == "nats_per_dim_latent" and not config.first_stage.is_continuous:
        raise ValueError(f"eval.metrics nats_per_dim_latent is of latents, and first_stage.kind is {kind}")


def _check_density(metric: str, config: Any) -> None:
    process, kind = config.diffusion.process, config.first_stage.kind
    if process != "flow":
        has_bound = process in ("gaussian", "vdm")
        instead = f"take {metric.removesuffix('_ode')}" if has_bound else "leave it out"
        raise ValueError(
            f"eval.metrics {metric} is by the ODE of a flow, and diffusion.process is {process}; {instead}"
        )
    if config.diffusion.prediction != "velocity":
        raise ValueError(
            f"eval.metrics {metric} cannot go with diffusion.prediction {config.diffusion.prediction}, whose velocity "
            "has no bound towards clean data"
        )
    if (metric == "bpd_ode") != (kind == "pixels"):
        raise ValueError(
            f"eval.metrics {metric} cannot go with first_stage.kind {kind}: bpd_ode is of pixels, "
            "nats_per_dim_latent_ode of latents"
        )


def _check_asked(metric: str, config: Any) -> None:
    key = OF_WHAT_IS_ASKED[metric]
    if getattr(config.eval, key) is None:
        raise ValueError(f"eval.metrics {metric} needs a network of your own; name it in eval.{key}")
    if not (config.texts if metric == "clip_score" else config.model.num_classes):
        told = "is told in words" if metric == "clip_score" else "has classes"
        raise ValueError(f"eval.metrics {metric} is of what samples are asked for; it needs a model that {told}")
