"""The `objective` section of a distillation, and what it can be combined with (Salimans & Ho 2022)."""

from typing import Any, Literal

from dtrain.config.evaluation import BOUNDS, DENSITIES
from dtrain.config.sections import NonNegativeFloat, PartSection, Place, Positive


class Distillation(PartSection):
    kind: Literal["distillation"]
    """a network learns to take in one step what a frozen teacher takes two for (progressive distillation)"""
    teacher: Place
    """a run, or the folder of a checkpoint, that is asked the same; its averaged weights where it has such"""
    steps: Positive
    """N of the network's walk, where the teacher takes 2 N; a further run with this one as teacher takes half"""
    guidance: NonNegativeFloat = 1.0
    """of the teacher, learned with its steps: samples are then drawn without; 1: none"""
    precision: Literal["fp32", "bf16"] = "fp32"
    """of the teacher, whatever deepspeed.precision is"""

    def identity_keys(self) -> list[str]:
        """Where the teacher lies may change; what it is is held by its fingerprint."""
        return [key for key in super().identity_keys() if key != "teacher"]

    @property
    def further_forwards(self) -> int:
        return 2 if self.guidance == 1 else 4


def check(config: Any) -> None:
    """Raises ValueError for what a distillation of a `Config` cannot have."""
    section, diffusion, e = config.objective, config.diffusion, config.eval
    named = "objective.kind distillation"
    process = diffusion.process
    if process not in ("gaussian", "flow"):
        raise ValueError(
            f"{named} joins two deterministic steps of a flow or of a gaussian process, and diffusion.process is "
            f"{process}; take flow"
        )
    for key, value, only, why in (
        ("noise", "gamma", "normal", "whose steps are of normal noise"),
        ("prediction", "eps", "v", "which says nothing of x_0 where no signal is left, and few steps begin there"),
        ("variance", "learned_range", "fixed_small", "whose steps have no variance"),
        ("loss", "vlb", "simple", "which has no bound"),
        ("coupling", "data", "independent", "which makes its own pairs of states in each step"),
    ):
        if getattr(diffusion, key, None) == value:
            raise ValueError(f"diffusion.{key} {value} cannot go with {named}, {why}; take {only}")
    if diffusion.times != "uniform":
        raise ValueError(
            f"diffusion.times {diffusion.times} has no effect on {named}, which trains the times of its walk; leave it "
            "out"
        )
    if process == "gaussian" and 2 * section.steps > diffusion.timesteps:
        raise ValueError(
            f"objective.steps {section.steps}: the teacher takes {2 * section.steps}, and diffusion.timesteps is "
            f"{diffusion.timesteps}; take at most {diffusion.timesteps // 2}"
        )
    if config.base_source:
        raise ValueError(f"{named} cannot go with a frozen base, of which a picture or adapters are learned; leave it")
    if section.guidance != 1:
        if not config.model.num_classes and not config.conditions:
            raise ValueError(
                f"objective.guidance {section.guidance:g} needs a model that is told something, and model.num_classes "
                "is 0; take 1"
            )
        if e.guidance != 1:
            raise ValueError(
                f"eval.guidance {e.guidance} cannot go with objective.guidance {section.guidance:g}, which the network "
                "has learned; take 1"
            )
    if bound := next((metric for metric in e.metrics if metric in (*BOUNDS, *DENSITIES)), None):
        raise ValueError(f"eval.metrics {bound} asks at times that {named} does not train; leave it out")
