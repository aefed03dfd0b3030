"""Whether two sets of golden figures are the same, and where they first differ."""

import math

# A distance is the end of much linear algebra on moments: the order of their sums may change, by no more than this.
DISTANCE = 1e-12  # relative


def differences(was: dict, now: dict) -> list[str]:
    """One line a case that is not the same bit for bit, distances to DISTANCE: its first step, metric or hash."""
    found = []
    for name, before in was.items():
        if (after := now.get(name)) is None:
            found.append(f"{name}: not there")
        elif first := _first(before, after):
            found.append(f"{name}: {first}")
    return found


def same_value(name: str, a: float | None, b: float | None) -> bool:
    """Of an evaluation's metric of this name."""
    if name.startswith("fd_") and None not in (a, b):
        return math.isclose(a, b, rel_tol=DISTANCE)
    return a == b


def _first(before: dict, after: dict) -> str | None:
    for key in ("losses", "grad_norms"):
        for step, (a, b) in enumerate(zip(before[key], after[key], strict=False), start=1):
            if a != b:
                return f"{key} of step {step} was {a!r}, is {b!r}"
        if len(before[key]) != len(after[key]):
            return f"{len(before[key])} {key}, now {len(after[key])}"
    for name in before["evaluation"] | after["evaluation"]:
        a, b = before["evaluation"].get(name), after["evaluation"].get(name)
        if not same_value(name, a, b):
            return f"evaluation {name} was {a}, is {b}"
    for name in before["hashes"] | after["hashes"]:
        if before["hashes"].get(name) != after["hashes"].get(name):
            return f"hashes {name} was {before['hashes'].get(name)}, is {after['hashes'].get(name)}"
    if before.keys() != after.keys():
        return "differs in a key that this comparison does not know"
    return None


def furthest(was: dict, now: dict) -> float:
    """The largest difference between the losses of one case, relative to the loss."""
    pairs = list(zip(was["losses"], now["losses"], strict=True))
    return max((abs(a - b) / max(abs(a), 1e-12) if math.isfinite(b) else math.inf) for a, b in pairs)
