"""How far a run is."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Position:
    """Optimizer steps done and images seen (design, decision 1)."""

    step: int = 0
    images: int = 0
