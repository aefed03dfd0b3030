"""What MeanFlow, whose network is told two times, can be combined with (Geng et al. 2025)."""

from typing import Any

from dtrain.config.guidance import untrained_null
from dtrain.config.models import DiT, MMDiT


def check(config: Any) -> None:
    """Raises ValueError for what a mean flow of a `Config` cannot have."""
    if not isinstance(config.model, DiT | MMDiT):
        raise ValueError(
            f"diffusion.process meanflow tells a transformer two times, and model.name is {config.model.name}; take "
            "dit or mmdit"
        )
    if config.base_source:
        raise ValueError(
            "diffusion.process meanflow cannot go with a frozen base, which is told one time; take process flow"
        )
    if config.deepspeed.precision == "bf16":
        raise ValueError(
            "diffusion.process meanflow takes a difference of two answers, which deepspeed.precision bf16 would "
            "round to noise; take bf16_autocast"
        )
    if (scale := config.diffusion.guidance) != 1 and (why := untrained_null(config)) is not None:
        raise ValueError(f"diffusion.guidance {scale:g} leads away from an answer without a class, but {why}")
