"""Several runs by quality, diversity and speed: `dtrain compare`.

Distances, precision and recall are those of a sweep over steps, which RUN/sweep.jsonl keeps. OUT/measured.jsonl keeps
what belongs to the comparison alone: seconds on this device, and pictures. A comparison that is started again computes
what is missing.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dtrain import __version__, distributed
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.evaluation.combinations import configured
from dtrain.evaluation.comparable import METRICS, Member, check_comparable
from dtrain.evaluation.comparison_pictures import Asked, check_asked, draw
from dtrain.evaluation.evaluate import evaluations_of_a_block, of_the_reference
from dtrain.evaluation.generate import Generator, OnProgress, quiet
from dtrain.evaluation.names import metric_name
from dtrain.evaluation.opened import open_generator
from dtrain.evaluation.reference import Reference
from dtrain.evaluation.speed import BLOCKS, Speed, device_name, measure
from dtrain.evaluation.sweep import append, sweep
from dtrain.files import parse_json, read_bytes

MEASURED = "measured.jsonl"
Say = Callable[[str | None], None]


class Measured:
    """What a comparison's folder keeps, by key; rank 0 alone reads and writes it."""

    def __init__(self, out: Path):
        """Raises UserError where the folder cannot be written."""
        self.path = out / MEASURED
        self._lines: dict[str, dict[str, Any]] = {}
        try:
            out.mkdir(parents=True, exist_ok=True)
            content = read_bytes(self.path) if self.path.exists() else b""
        except OSError as e:
            raise UserError(f"cannot write {out}: {e.strerror}; name a writable folder with --out") from None
        for text in content.split(b"\n")[:-1]:
            try:
                line = parse_json(text)
                self._lines[line["key"]] = line
            except (ValueError, KeyError, TypeError):
                continue  # torn by a kill: measured again

    def __len__(self) -> int:
        return len(self._lines)

    def find(self, key: str) -> dict[str, Any] | None:
        return self._lines.get(key)

    def keep(self, key: str, found: dict[str, Any]) -> dict[str, Any]:
        line = self._lines[key] = append(self.path, {"key": key} | found)
        return line


@dataclass(frozen=True)
class Place:
    """measured: what is kept. device: its name. seed: of all pictures."""

    measured: Measured
    device: str
    seed: int

    def key(self, *parts: Any) -> str:
        content = json.dumps([*parts, self.device, torch.__version__])
        return hashlib.sha256(content.encode()).hexdigest()

    def all(self, keys: dict[int, str], make: Callable[[int, OnProgress], dict], on_progress: OnProgress) -> dict:
        """What is kept under the keys, by number of steps; rank 0 makes what is missing, and the others leave the
        machine to it. A collective.
        """
        found = distributed.on_rank_0(lambda: {steps: self.measured.find(key) for steps, key in keys.items()})
        missing = [steps for steps, line in found.items() if line is None]
        for number, steps in enumerate(missing):

            def of_all(done: int, of: int, what: str | None = None, number: int = number, steps: int = steps) -> None:
                on_progress(number * of + done, len(missing) * of, f"{what or 'timing'}, steps {steps}")

            made = make(steps, of_all)
            found[steps] = distributed.on_rank_0(lambda steps=steps, made=made: self.measured.keep(keys[steps], made()))
        return found


def compare(
    members: list[Member],
    steps: list[int],
    out: Path,
    asked: Asked = Asked(),  # noqa: B008 (it is frozen)
    on_progress: OnProgress = quiet,
    say: Say = lambda line: None,
) -> dict[str, Any]:
    """What the page shows, as plain data. A collective.

    steps: numbers of steps, beside each run's own, of the curve of runs that can take them. Raises UserError, before
    anything is drawn, for runs that cannot be compared.
    """
    distributed.agree(check_comparable, members)
    distributed.agree(check_asked, asked, members)
    device = distributed.device()
    references = [_light(Reference.open(member.config, device, on_progress)) for member in members]
    seen = [seen_by(member.config, reference) for member, reference in zip(members, references, strict=True)]
    for member, one in zip(members, seen, strict=True):
        if one != seen[0]:
            key = next(key for key in (*seen[0], *one) if one.get(key) != seen[0].get(key))
            raise UserError(
                f"{member.name} cannot be compared with {members[0].name}: its {key} {one.get(key)}, the other's "
                f"{seen[0].get(key)}; leave one of them out"
            )
    measured = distributed.on_rank_0(Measured, out)
    name = distributed.on_rank_0(device_name, device)
    at = Place(measured, name, members[0].config.eval.seed)
    runs = []
    for number, (member, reference) in enumerate(zip(members, references, strict=True), 1):
        shown = _prefixed(on_progress, f"{member.name} ({number} of {len(members)})")
        runs.append(_one(member, reference, steps, asked, at, shown, say))
    e, split, size = members[0].config.eval, references[0].manifest, members[0].config.data.image_size
    return {
        "device": name,
        "versions": {"dtrain": __version__, "torch": torch.__version__},
        "n": e.num_samples,
        "features": references[0].extractor.name,
        "held_out": {"path": str(split.path), "hash": split.hash, "samples": split.samples},
        "statistics": e.reference,
        "labels": e.labels,
        "timed_blocks": BLOCKS,
        "picture": {"label": asked.label or 0, "prompt": asked.prompt, "seed": at.seed, "size": size},
        "metrics": names_of(references[0]),
        "runs": runs,
    }


def _one(
    member: Member,
    reference: Reference,
    wanted: list[int],
    asked: Asked,
    at: Place,
    on_progress: OnProgress,
    say: Say,
) -> dict[str, Any]:
    config = member.config
    choices, refused = steps_of(config, wanted)
    lines = {
        line["setting"]["steps"]: line
        for line in sweep(member.run, config, {"steps": choices}, on_progress, _about(member, say))
    }
    own = lines.get(config.eval.steps)
    if own is None:
        raise UserError(f"{member.name} gives samples that are not finite at its own settings; leave it out")

    @cache
    def generator() -> Generator:
        """A collective; of the weights that the distances are of."""
        return open_generator(member.run, config, distributed.device(), own["step"]).generator

    def timed(steps: int, on_progress: OnProgress) -> Callable[[], dict[str, Any]]:
        opened, setting = generator(), configured(config, {"steps": steps})
        return lambda: asdict(measure(opened, setting, reference, on_progress))

    def drawn(steps: int, on_progress: OnProgress) -> Callable[[], dict[str, Any]]:
        opened = generator()

        def alone() -> dict[str, Any]:
            if not warm:
                draw(opened, config, reference, asked, min(columns), at.seed)
                warm.append(True)
            found = draw(opened, config, reference, asked, steps, at.seed)
            on_progress(1, 1, "pictures")
            return found

        return alone

    speeds = at.all({s: at.key("speed", line["key"], BLOCKS) for s, line in lines.items()}, timed, on_progress)
    columns, warm = steps_of(config, list(asked.steps))[0], []
    of_picture = own["key"], asked.label, asked.prompt, at.seed
    pictures = at.all({s: at.key("picture", *of_picture, s) for s in columns}, drawn, on_progress)
    points = [
        {
            "steps": steps,
            "evaluations": speeds[steps]["evaluations"],
            "seconds_per_thousand": _speed(speeds[steps]).seconds_per_thousand,
            "block_seconds": speeds[steps]["block_seconds"],
            "metrics": line["metrics"],
        }
        for steps, line in lines.items()
    ]
    return {
        "name": member.name,
        "path": str(member.run.path),
        "step": own["step"],
        "images": own["images"],
        "parameters": speeds[config.eval.steps]["parameters"],
        "classes": config.model.num_classes,
        "words": bool(config.texts),
        "walks": "steps" in own["context"],  # else one network's answer is the sample, and steps are nobody's
        "context": own["context"],
        "own": points[0],
        "curve": sorted(points, key=lambda point: point["evaluations"]),
        "left_out": {str(s): "its samples are not finite" for s in choices if s not in lines}
        | {str(s): why for s, why in refused.items() if len(choices) > 1},
        "pictures": [{k: line[k] for k in ("steps", "evaluations", "seconds", "png")} for line in pictures.values()],
    }


def _speed(line: dict[str, Any]) -> Speed:
    return Speed(**{name: line[name] for name in Speed.__dataclass_fields__})


def seen_by(config: Config, reference: Reference) -> dict[str, Any]:
    """How the features of a run's samples and of its held-out images come about; the same of all that are compared."""
    found = {"features": reference.extractor.name, "extractor": reference.extractor.fingerprint}
    return found | {"reference": reference.hash, **of_the_reference(config.eval, reference)}


def names_of(reference: Reference) -> dict[str, str]:
    """Metric → its key in results, by these features."""
    return {name: metric_name(name, reference.extractor.name, comparable=reference.comparable) for name in METRICS}


def steps_of(config: Config, wanted: list[int]) -> tuple[list[int], dict[int, str]]:
    """(the run's own number of steps, then those of `wanted` that it can take; why it cannot take the others).

    Of a run whose steps are not free, as one network's answer is the sample, its own alone.
    """
    own, possible, refused = config.eval.steps, {}, {}
    for steps in wanted:
        if steps != own:
            try:
                possible[steps] = evaluations_of_a_block(configured(config, {"steps": steps}))
            except UserError as e:
                refused[steps] = str(e)
    if set(possible.values()) <= {evaluations_of_a_block(config)}:
        possible = {}
    return [own, *possible], refused


def _light(reference: Reference) -> Reference:
    """Without features, which a sweep reads again: those of several runs would lie in memory beside each other."""
    return replace(reference, features=None, training=None)


def _prefixed(on_progress: OnProgress, name: str) -> OnProgress:
    def called(done: int, of: int, what: str | None = None) -> None:
        on_progress(done, of, what and f"{name}, {what}")

    return called


def _about(member: Member, say: Say) -> Say:
    return lambda line: say(line and f"{member.name}: {line}")
