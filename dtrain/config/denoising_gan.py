"""What `diffusion.process: ddgan` can be combined with."""

from typing import Any


def check(config: Any) -> None:
    """Raises ValueError for what a denoising GAN of a `Config` cannot have."""
    named, e, timesteps = "diffusion.process ddgan", config.eval, config.diffusion.timesteps
    if config.base_source:
        raise ValueError(f"{named} cannot go with a frozen base, which is told no latent; take process gaussian")
    if config.conditions:
        raise ValueError(
            f"{named} cannot go with conditions.{next(iter(config.conditions))}: its critic judges the class alone; "
            "leave it out"
        )
    if config.objective.kind != "denoising" and config.objective.diffuses:
        raise ValueError(
            f"{named} has a training of its own, and objective.kind is {config.objective.kind}; leave it out"
        )
    if e.steps != timesteps:
        raise ValueError(
            f"eval.steps {e.steps} must be diffusion.timesteps, {timesteps}: a denoising GAN draws each step that it "
            "has learned"
        )
    if e.spacing != "trailing":
        raise ValueError(f"eval.spacing {e.spacing} has no effect on ddgan, which takes every timestep; leave it out")
    if e.guidance != 1:
        raise ValueError(
            f"eval.guidance {e.guidance} cannot go with {named}, whose network draws samples and no means to lead; "
            "take 1"
        )
