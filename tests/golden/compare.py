"""Whether two sets of golden figures are the same, and where they first differ."""

import math


def differences(was: dict, now: dict) -> list[str]:
    """One line a case that is not the same bit for bit: its first step, metric or hash that differs."""
    found = []
    for name, before in was.items():
        if (after := now.get(name)) is None:
            found.append(f"{name}: not there")
        elif before != after:
            found.append(f"{name}: {_first(before, after)}")
    return found


def _first(before: dict, after: dict) -> str:
    for key in ("losses", "grad_norms"):
        for step, (a, b) in enumerate(zip(before[key], after[key], strict=False), start=1):
            if a != b:
                return f"{key} of step {step} was {a!r}, is {b!r}"
        if len(before[key]) != len(after[key]):
            return f"{len(before[key])} {key}, now {len(after[key])}"
    for key in ("evaluation", "hashes"):
        for name in before[key] | after[key]:
            if before[key].get(name) != after[key].get(name):
                return f"{key} {name} was {before[key].get(name)}, is {after[key].get(name)}"
    return "differs in a key that this comparison does not know"


def furthest(was: dict, now: dict) -> float:
    """The largest difference between the losses of one case, relative to the loss."""
    pairs = list(zip(was["losses"], now["losses"], strict=True))
    return max((abs(a - b) / max(abs(a), 1e-12) if math.isfinite(b) else math.inf) for a, b in pairs)
