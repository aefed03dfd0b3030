"""What is known of a run: its directory read once, without torch."""

import os
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dtrain.config import read_tree, with_earlier_values
from dtrain.credentials import masked
from dtrain.data.shards.manifest import Manifest, glance
from dtrain.errors import UserError
from dtrain.files import beside
from dtrain.lock import holder
from dtrain.report.markup import plural
from dtrain.run import RunDirectory
from dtrain.tracking.journal import EVALUATIONS, OTHER_RANKS, SWEEP, Tail, combinations, stride, valid
from dtrain.tracking.lines import Line

CURVES = 1 << 22  # bytes of a journal's curves that are read


@dataclass(frozen=True, eq=False)
class Run:
    """A run directory as a report sees it.

    config: plain data with secrets masked. lines: those that count, of the journal and of evaluations beside it.
    happened: all of the journal, void ones too, which belong to the time line alone. elsewhere: what other ranks wrote.
    every: of a long journal's "train" lines only each `every`-th is among them, and the last before any other line.
    left_out: file → how many of its lines are torn, or none of a journal's.
    """

    directory: RunDirectory
    name: str
    config: dict[str, Any]
    lines: list[Line]
    happened: list[Line]
    elsewhere: list[Line]
    sweeps: list[Line]
    left_out: dict[str, int]
    every: int = 1

    @classmethod
    def read(cls, place: str | Path) -> "Run":
        """Raises UserError where there is no run, or one that has not written anything yet."""
        directory = RunDirectory.find(place)
        # Not validated: a run of another version may still be looked at.
        config = masked(with_earlier_values(read_tree(directory.config_file)))
        left_out: dict[str, int] = {}

        def lines_of(*paths: Path, every: int = 1) -> list[Line]:
            tails = [Tail(path, every=every) for path in paths]
            found = [line for tail in tails for line in tail.read()]
            left_out.update({tail.path.name: tail.left_out for tail in tails if tail.left_out})
            return found

        every = stride(directory.journal_file, CURVES)
        happened = lines_of(directory.journal_file, every=every)
        if not happened:
            unusable = f", but {plural(*left_out.values(), 'unusable line')}" if left_out else " yet"
            raise UserError(f"{directory.path} has nothing in its journal.jsonl{unusable}; start the run first")
        evaluated, elsewhere = (
            lines_of(*beside(directory.journal_file, pattern)) for pattern in (EVALUATIONS, OTHER_RANKS)
        )
        return cls(
            directory,
            Path(os.path.abspath(directory.path)).name,  # a link of the user's is called as they call it
            config,
            valid(happened + evaluated),
            happened,
            elsewhere,
            list(combinations(directory.path / SWEEP).values()),
            left_out,
            every,
        )

    def of(self, event: str) -> list[Line]:
        """The lines of one event that count, in the order of the journal."""
        return self._by_event.get(event, [])

    @cached_property
    def _by_event(self) -> dict[str, list[Line]]:
        found: dict[str, list[Line]] = {}
        for line in self.lines:
            found.setdefault(line["event"], []).append(line)
        return found

    @cached_property
    def attempts(self) -> list[list[Line]]:
        """All lines of each attempt, void ones too, from the first to the last."""
        found: dict[int, list[Line]] = {}
        for line in self.happened:
            found.setdefault(line["attempt"], []).append(line)
        return [found[attempt] for attempt in sorted(found)]

    def setting(self, key: str, default: Any = None) -> Any:
        """A config value by its dotted key."""
        node: Any = self.config
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return default
            node = node[part]
        return node

    @cached_property
    def state(self) -> str:
        """finished, stopped, user_error, crashed, hang as outcome.json says; else running, or crashed."""
        ended = self.directory.outcome()
        if ended is not None:
            return str(ended.get("outcome"))
        return "running" if holder(self.directory.lock_file) else "crashed"

    @property
    def last(self) -> Line:
        """The line of the furthest step."""
        return max(self.lines, key=lambda line: line["step"])

    @property
    def seconds(self) -> float:
        """In attempts, what they waited, evaluated and did again counted."""
        return sum(part[-1]["time"] - part[0]["time"] for part in self.attempts)

    @property
    def begun(self) -> list[Line]:
        """The first line of each attempt, void ones too."""
        return [line for line in self.happened if line["event"] == "attempt"]

    @property
    def sources(self) -> list[dict[str, Any]]:
        """What the config says of the data set and of those mixed in."""
        mixed = self.setting("data.mix", [])
        return [
            s for s in (self.config.get("data"), *(mixed if isinstance(mixed, list) else [])) if isinstance(s, dict)
        ]

    @cached_property
    def manifest(self) -> Manifest | None:
        """What the last attempt was trained on, with data.mix; None where its manifests are gone or others now."""
        context = self.begun[-1]["context"] if self.begun else {}
        paths = [str(s.get("manifest") or f"{s.get('shards')}/manifest.json") for s in self.sources]
        for folder in self._places():
            found = [glance(folder / path) for path in paths]
            if found and None not in found:
                whole = replace(found[0], mixed=tuple(found[1:]))
                if whole.hash == context.get("data"):
                    return whole
        return None

    @cached_property
    def holdout(self) -> Manifest | None:
        """The split that evaluations compare with; None where they say another, or its manifest is gone."""
        path = self.setting("data.holdout")
        known = {line["context"].get(key) for line in self.of("eval") for key in ("reference", "holdout")}
        found = [glance(folder / path) for folder in self._places()] if isinstance(path, str) else []
        return next((one for one in found if one is not None and one.hash in known), None)

    def _places(self) -> list[Path]:
        """Where the config's relative paths may begin: the folder the run was started in, then the current one."""
        here, under = Path(os.path.abspath(self.directory.path)), Path(str(self.setting("run.dir", "runs")))
        depth = len(under.parts)
        known = not under.is_absolute() and here.parent.parts[-depth:] == under.parts
        return list(dict.fromkeys([*([here.parents[depth]] if known else []), Path.cwd()]))

    @property
    def profiles(self) -> list[dict[str, Any]]:
        """The config's `ema`, a mapping each."""
        found = self.setting("ema", [])
        return [one if isinstance(one, dict) else {} for one in found] if isinstance(found, list) else []

    def ema(self, weights: str) -> str:
        """`ema_0` with the decay, or the width, that its profile has in the config; `sigma_0.13` is a width itself."""
        kind, _, which = weights.partition("_")
        if kind not in ("ema", "sigma"):
            return f"{weights} weights"
        known = {f"ema_{number}": profile for number, profile in enumerate(self.profiles)}
        width = which if kind == "sigma" else known.get(weights, {}).get("sigma_rel")
        if width is not None:
            return f"EMA σ_rel {width}"
        return f"EMA {known[weights].get('decay')}" if weights in known else weights


def read_runs(places: list[str | Path]) -> list[Run]:
    """Each run once, under names that tell them apart. Raises UserError."""
    found = {run.directory.path.resolve(): run for run in map(Run.read, places)}
    runs = list(found.values())
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            object.__setattr__(run, "name", str(run.directory.path))
    return runs
