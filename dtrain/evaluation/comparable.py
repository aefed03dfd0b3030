"""Which runs may stand beside each other: their samples are compared with the same held-out images in the same way.

Imports no torch.
"""

from dataclasses import dataclass

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.evaluation.requirements import check_generates, check_guidance, split_of
from dtrain.run import RunDirectory

METRICS = ("fd", "precision", "recall", "density", "coverage")


@dataclass(frozen=True)
class Member:
    """A run of a comparison. config: the run's own, with the `eval` that it is compared by."""

    name: str
    run: RunDirectory
    config: Config


def named(runs: list[str]) -> list[tuple[str, RunDirectory]]:
    """Each run once, by a name that tells it apart. Raises UserError for fewer than two."""
    found = {run.path.resolve(): run for run in map(RunDirectory.find, runs)}
    names = [run.path.resolve().name for run in found.values()]
    if len(found) < 2:
        raise UserError("a comparison is of two runs or more; name another one, or take dtrain evaluate")
    return [
        (name if names.count(name) == 1 else str(run.path), run)
        for name, run in zip(names, found.values(), strict=True)
    ]


def check_comparable(members: list[Member]) -> None:
    """Raises UserError, in one line, for what cannot be compared; before anything is read but configs and manifests."""
    for member in members:
        check_generates(member.config, member.run.path)
        check_guidance(member.config)
    first, of_first = members[0], _aspects(members[0].config)
    for other in members[1:]:
        for aspect, (value, fix) in _aspects(other.config).items():
            if value != of_first[aspect][0]:
                raise UserError(
                    f"{other.name} cannot be compared with {first.name}: its {aspect} {value}, the other's "
                    f"{of_first[aspect][0]}; {fix}"
                )


def _aspects(config: Config) -> dict[str, tuple[str, str]]:
    """What must be the same for all → its value, in words, and what helps."""
    data, e = config.data, config.eval
    split = split_of(config)
    leave = "leave one of them out"
    return {
        "images have": (f"{data.image_size} × {data.image_size} × {data.channels}", leave),
        "held-out images are": (
            f"{split.path} ({split.hash[:12]})" if split is not None else "none",
            "compare runs of one data.holdout",
        ),
        "statistics to compare with are": (str(e.reference or "those of data.holdout"), leave),
        "data.exif is": (data.exif, leave),
        "data.scaling is": (data.scaling, leave),
        "features are": (e.features, "name them for all with --features"),
        "eval.weights is": (str(e.weights), "name them for all with --weights"),
        "eval.resize is": (str(e.resize), "name it for all with --resize"),
        "number of samples is": (str(e.num_samples), "name it for all with --n"),
        "eval.labels is": (e.labels, "name it for all with --labels data or uniform"),
    }
