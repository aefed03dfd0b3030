"""What a line of a journal must be to be taken: an object of the documented form, with values in bounds.

A crash cuts lines off, a disk changes bytes, and a journal may come from anywhere. A line that is not of this form is
left out and counted, so that nobody who reads lines has to look at types again.
"""

import math
import re
import sys
from collections.abc import Callable
from typing import Any

from dtrain.files import parse_json

Line = dict[str, Any]

MOST_LINE = 1 << 24  # bytes
MOST_METRICS, LONGEST_NAME = 1000, 500
MOST_COUNT = 1 << 53  # of steps, images, attempts: what a float still counts exactly
EARLIEST, LATEST = -62135596800, 253402300799  # seconds of the years 1 and 9999, which have a date
LARGEST = 1e100  # a metric beyond it is read as infinite: sums and squares of it would be
_NUMBERS = {float, int}
NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _text(value: Any) -> bool:
    return type(value) is str


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_COUNT


def _number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST


def _key(value: Any) -> bool:
    """A run's, by which MLflow finds it: it becomes a part of a query."""
    return _text(value) and bool(re.fullmatch(r"[\w.\-]{1,200}", value))


def _texts(value: Any) -> bool:
    return type(value) is list and all(map(_text, value))


def _ranges(value: Any) -> bool:
    """[first, end] of images, one after the other."""
    return type(value) is list and all(type(r) is list and len(r) == 2 and all(map(_count, r)) for r in value)


def _changes(value: Any) -> bool:
    """Config key → [was, is]."""
    return type(value) is dict and all(type(v) is list and len(v) == 2 for v in value.values())


def _sets(value: Any) -> bool:
    """Data sets, as `tracking.metadata.trained_on` tells them."""
    known = {"name": _text, "hash": _text, "source": _text, "samples": _count}
    return type(value) is list and all(
        type(one) is dict and all(known[k](v) for k, v in one.items() if k in known) for one in value
    )


def _or_null(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


def _label(value: Any) -> bool:
    """What is shown or grouped by, and never calculated with."""
    return value is None or _text(value) or _number(value) or type(value) is bool


def _scale(value: Any) -> bool:
    """Of guidance: one number, or the text of one of each condition."""
    return _number(value) or _text(value)


def _settings(value: Any) -> bool:
    return type(value) is dict and all(map(_label, value.values()))


# What readers rely on in a context, by event; keys that are not here are only ever shown.
_MEASURED = dict.fromkeys(("n", "steps", "sampler", "eta", "seed", "features"), _label)
_MEASURED |= {"ema": _text, "guidance": _scale, "reference": _or_null(_text), "holdout": _or_null(_text)}
_MEASURED |= {"differs": lambda value: type(value) is dict}
_CONTEXT: dict[str, dict[str, Callable[[Any], bool]]] = {
    "eval": _MEASURED,
    "sweep": _MEASURED,
    "attempt": {
        "world_size": _count,
        "zero_stage": _count,
        "batch_size": _count,
        "data": _text,
        "datasets": _sets,
        "run_key": _key,
        "commit": _text,
        "uncommitted": _label,
        "command": _text,
        "command_line": _text,
        "skipped": _ranges,
    },
    "config": {"changed": _changes},
    "fault": {"refused": _ranges},
    "bad_sample": {"k": _count, "source": _text, "sample": _count},
    "checkpoint": {"path": _text, "hash": _text, "ema": _texts},
    "system": {"node": _text, "sample": _count},
}


def parse(raw: bytes) -> Line | None:
    """The event of one line, its metrics as floats and ints; None where it is not one."""
    try:
        line = parse_json(raw)
    except ValueError:
        return None
    return line if type(line) is dict and _is_event(line) else None


def parse_combination(raw: bytes) -> Line | None:
    """A line of a sweep, whose `key` names its combination; earlier versions wrote it without event and time."""
    try:
        line = parse_json(raw)
    except ValueError:
        return None
    if type(line) is not dict:
        return None
    line = {"event": "sweep", "attempt": 0, "time": 0.0} | line
    return line if line["event"] == "sweep" and _is_event(line) else None


def _is_event(line: dict[str, Any]) -> bool:
    """Whether it is of the form; its metrics are made numbers."""
    get = line.get
    event, time, metrics, context = get("event"), get("time"), get("metrics"), get("context")
    if not (
        type(event) is str
        and len(event) <= LONGEST_NAME
        and _count(get("step"))
        and _count(get("images"))
        and _count(get("attempt"))
        and type(time) in (int, float)
        and EARLIEST <= time <= LATEST
        and type(metrics) is dict
        and len(metrics) <= MOST_METRICS
        and type(context) is dict
    ):
        return False
    # Interned, since every line has the same names, and lines wait in memory for an MLflow that does not answer.
    line["metrics"] = metrics = dict(zip(map(sys.intern, metrics), metrics.values(), strict=True))
    if metrics and max(map(len, metrics)) > LONGEST_NAME:
        return False
    # Most lines hold numbers of usual size, and a journal has very many: so this is asked of all at once.
    values = metrics.values()
    if metrics and not (_NUMBERS.issuperset(map(type, values)) and max(map(abs, values)) <= LARGEST):
        for name, value in metrics.items():
            if type(value) is not float and type(value) is not int:
                if type(value) is not str or value not in NON_FINITE:
                    return False
                metrics[name] = NON_FINITE[value]
            elif not -LARGEST <= value <= LARGEST and value == value:
                metrics[name] = math.inf if value > 0 else -math.inf
    if event == "sweep" and not (_text(get("key")) and _settings(get("setting", {}))):
        return False
    if not context:
        return True
    known = _CONTEXT.get(event, {})
    if any(name in context and not check(context[name]) for name, check in known.items()):
        return False
    return _texts(context.get("artifacts", [])) and _text(context.get("artifact", ""))
