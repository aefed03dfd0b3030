"""A first config for a data set, whole: the data found, looked at, choices made, judged as a start would judge them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import yaml

from dtrain import config as configuration
from dtrain.config import Config
from dtrain.proposal.choices import Choices, image_size
from dtrain.proposal.facts import Facts, Machine, facts_of, machine, seen_gpus
from dtrain.proposal.source import find
from dtrain.proposal.text import Line, document
from dtrain.proposal.timing import PATIENCE, measure
from dtrain.training.check import check_start

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Proposal:
    """about: what `--check` says of it."""

    data: str
    facts: Facts
    machine: Machine
    sections: dict[str, list[Line]]
    config: Config
    about: str

    def text(self, minutes: str, file: str) -> str:
        """The YAML. minutes: a line on how long it takes. file: what its comments call it."""
        held = f" and {self.facts.held_out:,} held out" if self.facts.held_out else ""
        side, gpus = self.config.data.image_size, self.machine.gpus
        shown = f"{self.facts.samples:,} pictures of {self.data} to train on{held}; {side} × {side} pixels"
        header = [
            f"{shown}, for {self.machine.shown}.",
            minutes,
            f"  dtrain train {file} --check{f' --ranks {gpus}' if gpus > 1 else ''}",
            f"  deepspeed --quiet launch/train.py {file}" if gpus > 1 else f"  dtrain train {file}",
            "Every key: dtrain config",
        ]
        return document(header, self.sections)

    def minutes(self, file: str, progress: Progress) -> str:
        """How long it takes, by taking a few steps where this machine is the one it is for."""
        if self.machine.gpus not in (0, seen_gpus()):
            return f"Not timed: it is for {self.machine.shown}, which are not here. `dtrain plan {file}` counts."
        try:
            timing = measure(self.config, self.machine.gpus or 1, progress)
            return timing.minutes(self.config.train.steps, self.config.eval.every)
        except TimeoutError:
            return f"Not timed: no step was done here in {PATIENCE:.0f} s."


def propose(
    data: str, size: int | None, name: str | None, gpus: int | None, say: Callable[[str], None], progress: Progress
) -> Proposal:
    """data, say: as `source.find` takes them. size, name, gpus: None for what data and machine suggest.

    Raises UserError, also where the training would be refused.
    """
    found = find(data, name, say, progress)
    facts, here = facts_of(found), machine(gpus)
    sections = Choices(found, facts, here, size or image_size(facts, here)).sections(_free(found.name))
    config = configuration.validate(yaml.safe_load(document([], sections)), f"a config for {data}")
    return Proposal(data, facts, here, sections, config, check_start(config, here.gpus or 1))


def _free(name: str) -> str:
    """A name that no run has yet, as a run that is there would be gone on with."""
    taken = {path.name for path in Path("runs").glob("*")}
    return next(one for n in range(1, len(taken) + 2) if (one := name if n == 1 else f"{name}-{n}") not in taken)
