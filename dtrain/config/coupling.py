"""What a training on pairs of noise and samples can be combined with (Liu et al. 2023, reflow)."""

from typing import Any

from dtrain.config import perceptual


def check(config: Any) -> None:
    """Raises ValueError for what pairs of a `Config` cannot have."""
    if not config.is_coupled:
        return
    data, e = config.data, config.eval
    if data.flip or data.crop != "centre":
        key = "data.flip" if data.flip else f"data.crop {data.crop}"
        raise ValueError(
            f"{key} cannot go with diffusion.coupling data: a changed image is not its noise's; leave it out"
        )
    if config.first_stage.reads_cache:
        raise ValueError(
            "first_stage.cached cannot go with diffusion.coupling data: pairs hold latents already; set it to false"
        )
    if config.pictures:
        raise ValueError(
            f"conditions.{next(iter(config.pictures))} is a picture of the sample, and pairs hold none; leave it out"
        )
    if e.guidance != 1:
        raise ValueError(
            f"eval.guidance {e.guidance} cannot go with diffusion.coupling data: the pairs were drawn with guidance, "
            "which the network has learned; take 1"
        )
    if (section := config.diffusion.perceptual) is not None:
        if config.first_stage.kind != "pixels":
            raise ValueError(
                f"diffusion.perceptual {section.kind} sees pictures, and first_stage.kind {config.first_stage.kind} "
                "gives latents; leave it out, or take first_stage.kind pixels"
            )
        perceptual.check(section, "diffusion.perceptual", data.image_size)
