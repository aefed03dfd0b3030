"""The section `ema`: averages of the weights, by their profile over the steps of a run."""

import math
from typing import Annotated, Any

from pydantic import Field, model_serializer, model_validator

from dtrain.config.sections import Section

WIDEST = math.sqrt(1 / 12)  # σ_rel of γ = 0, the plain mean over all steps
SigmaRel = Annotated[float, Field(gt=0, le=WIDEST)]


class EMAProfile(Section):
    decay: Annotated[float, Field(ge=0, lt=1)] = 0.9999
    """of an average of the weights; it spans the last 1/(1 − decay) steps"""
    sigma_rel: SigmaRel | None = None
    """instead of decay: width of a power-function average, a share of the steps; two give others after the training"""

    @model_validator(mode="after")
    def _one_profile(self):
        if self.sigma_rel is not None and "decay" in self.model_fields_set:
            raise ValueError(f"decay {self.decay} and sigma_rel {self.sigma_rel} are two profiles; give the list both")
        return self

    @model_serializer(mode="wrap")
    def _as_kept(self, serialize: Any) -> dict[str, Any]:
        return {"decay": self.decay} if self.sigma_rel is None else {"sigma_rel": self.sigma_rel}

    def weight(self, step: int) -> float:
        """What the weights after `step`, counted from 1, weigh in the average: 1 − decay, or 1 − (1 − 1/step)^(γ + 1).

        Karras et al. 2024, equation 123: after the first step the initial weights are gone.
        """
        if self.sigma_rel is None:
            return 1 - self.decay
        return -math.expm1((gamma_of(self.sigma_rel) + 1) * math.log1p(-1 / step)) if step > 1 else 1.0

    def __str__(self) -> str:
        return f"decay {self.decay}" if self.sigma_rel is None else f"sigma_rel {self.sigma_rel}"


def gamma_of(sigma_rel: float) -> float:
    """γ of the profile ∝ τ^γ whose deviation is `sigma_rel` of the steps so far (Karras et al. 2024, equation 126)."""
    low, high = 0.0, 1 / sigma_rel  # σ_rel falls as γ grows, and is below 1/γ
    while low < (middle := (low + high) / 2) < high:
        wide = middle + 1 > sigma_rel**2 * (middle + 2) ** 2 * (middle + 3)
        low, high = (middle, high) if wide else (low, middle)
    return middle
