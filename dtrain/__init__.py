"""dtrain: train diffusion models at cluster scale. Importing it imports no torch.

    run = dtrain.load("runs/digits")
    images = run.sample(labels=[3] * 8, steps=50, guidance=2)  # uint8 (8, H, W, C)

docs/python.md has more.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dtrain.trained import load as load

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "load":  # it needs torch, so it is imported when it is asked for
        from dtrain.trained import load

        return load
    raise AttributeError(f"module 'dtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "load"])
