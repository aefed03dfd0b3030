"""What the `eval` section of a configuration can ask of its process, its first stage and its model."""

from typing import Any

from dtrain import plugins
from dtrain.config import guidance as guidances
from dtrain.config import metrics
from dtrain.config.evaluation import OF_THE_PRIOR, OWN_DEFAULT, SAMPLERS, Sampling


def check(config: Any) -> None:
    """Raises ValueError for samples, or metrics of them, that a config's process, first stage or model cannot have."""
    e, process = config.eval, config.diffusion.process
    if e.images == "prior":
        _check_prior(config)
    processes = SAMPLERS.get(e.sampler) or plugins.find("sampler", e.sampler).processes
    if process not in processes:
        walks = [name for name, walked in SAMPLERS.items() if process in walked]
        raise ValueError(f"eval.sampler {e.sampler} does not walk a {process} process; take {' or '.join(walks)}")
    if e.eta != 0 and e.sampler != "ddim":
        raise ValueError(f"eval.eta {e.eta} has no effect on sampler {e.sampler}; take sampler ddim, or eta 0")
    if getattr(config.diffusion, "noise", "normal") == "gamma":
        _check_gamma(config)
    if e.sde_noise is not None and e.sampler != "sde":
        raise ValueError(f"eval.sde_noise {e.sde_noise} has no effect on sampler {e.sampler}; take sampler sde")
    if e.churn and (process, e.sampler) != ("edm", "heun"):
        raise ValueError(
            f"eval.churn {e.churn} has no effect on sampler {e.sampler} of diffusion.process {process}; it is of "
            "heun on edm: leave it out"
        )
    for key, unset in (("churn_min", 0.0), ("churn_max", 0.0), ("churn_noise", 1.0)):
        if getattr(e, key) != unset and not e.churn:
            raise ValueError(f"eval.{key} {getattr(e, key)} has no effect with eval.churn 0; leave it out")
    if 0 < e.churn_max <= e.churn_min:
        raise ValueError(f"eval.churn_max {e.churn_max} must be above eval.churn_min {e.churn_min}, or 0 for any σ")
    if e.spacing == "edm" and e.sampler == "sde":
        raise ValueError("eval.spacing edm has no effect on sampler sde, which has times of its own; leave it out")
    if e.spacing != "trailing" and process == "edm":
        raise ValueError(
            f"eval.spacing {e.spacing} has no effect on edm, whose steps diffusion.rho spaces; leave it out"
        )
    if e.spacing not in ("trailing", "edm") and process in ("flow", "meanflow", "vdm"):
        what = "a flow" if process == "flow" else process
        raise ValueError(
            f"eval.spacing {e.spacing} has no effect on {what}, whose times are no timesteps; take edm, or leave it out"
        )
    if process == "gaussian" and e.steps > config.diffusion.timesteps:
        raise ValueError(f"eval.steps {e.steps} exceeds diffusion.timesteps {config.diffusion.timesteps}")
    if isinstance(e.spacing, list):
        if len(e.spacing) != e.steps:
            raise ValueError(f"eval.spacing lists {len(e.spacing)} timesteps, but eval.steps is {e.steps}")
        if e.spacing != sorted(set(e.spacing), reverse=True) or e.spacing[0] >= config.diffusion.timesteps:
            raise ValueError(
                "eval.spacing must list timesteps that fall, "
                f"from at most {config.diffusion.timesteps - 1} to at least 0"
            )
    if process == "meanflow":
        _check_mean_flow(config)
    metrics.check(config)
    if e.clip and config.first_stage.is_continuous:
        raise ValueError(
            f"eval.clip holds pixels within [−1, 1], and first_stage.kind is {config.first_stage.kind}; leave it out"
        )
    if e.decode_batch is not None and config.first_stage.kind == "pixels":
        raise ValueError("eval.decode_batch has no effect on first_stage.kind pixels; leave it out")
    for key in ("prompts", "negative_prompt"):
        if getattr(e, key) and not config.texts:
            raise ValueError(f"eval.{key} needs a model that is told in words; add a section conditions.text")
    guidances.check(config)


def _check_prior(config: Any) -> None:
    e = config.eval
    if config.objective.kind != "autoencoding":
        raise ValueError(
            f"eval.images prior decodes latents of an autoencoder, and objective.kind is {config.objective.kind}, "
            "whose images eval.sampler draws; leave it out"
        )
    unsaid = Sampling(sampler=OWN_DEFAULT.get(config.diffusion.process, "ddim"))
    for key in Sampling.model_fields.keys() - set(OF_THE_PRIOR):
        if (value := getattr(e, key)) != getattr(unsaid, key):
            raise ValueError(
                f"eval.{key} {value} has no effect on eval.images prior, where the decoder is asked once; leave it out"
            )


def _check_mean_flow(config: Any) -> None:
    e = config.eval
    if e.guidance != 1:
        raise ValueError(
            f"eval.guidance {e.guidance} cannot go with diffusion.process meanflow, whose steps have no velocity to "
            "lead; take 1"
        )
    if e.clip and e.sampler != "lcm":
        raise ValueError(
            "eval.clip has no effect on meanflow, whose steps make no estimate of x_0; take sampler lcm, or leave it "
            "out"
        )


def _check_gamma(config: Any) -> None:
    e = config.eval
    if e.sampler in ("dpmpp_2m", "dpmpp_3m", "unipc", "heun"):
        raise ValueError(
            f"eval.sampler {e.sampler} follows the ODE of normal noise, and diffusion.noise is gamma; "
            "take ancestral or ddim"
        )
    if e.sampler == "lcm":
        raise ValueError("eval.sampler lcm adds normal noise, and diffusion.noise is gamma; take ancestral or ddim")
    if e.eta != 0:
        raise ValueError(
            f"eval.eta {e.eta} adds normal noise, and diffusion.noise is gamma; take sampler ancestral, or eta 0"
        )
