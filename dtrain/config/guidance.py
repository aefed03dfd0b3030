"""How strongly samples are led towards what is asked for: by one number, or by one of each condition apart.

Apart it is kept as one text, `text=3,label=1.5`, in which the order counts, as a key of `eval` and in contexts alike.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

CLASS = "label"  # the class among the names of conditions


class Chain(NamedTuple):
    """What the network is asked, from the least that it is told on: each answer is led towards the next by a scale.

    begun: conditions that are told throughout. steps: scale, and all conditions that are told by then; the last tells
    everything. No step: the conditional answer alone.
    """

    begun: tuple[str, ...]
    steps: tuple[tuple[float, tuple[str, ...]], ...]


def kept(value: Any) -> Any:
    """What `eval.guidance` keeps of what is given: a number, or the text of one of each condition, also by a mapping.

    Raises ValueError for what is neither, and for a scale below 0.
    """
    if isinstance(value, Mapping):
        pairs = list(value.items())
    elif isinstance(value, str) and "=" in value:
        pairs = [part.split("=", 1) if "=" in part else (part, "") for part in value.split(",")]
    else:
        return _scale(value)
    names = [str(name).strip() for name, _ in pairs]
    if len(set(names)) < len(names) or not all(names):
        raise ValueError("names each condition once, such as text=3,label=1.5")
    return ",".join(f"{name}={_scale(scale):.15g}" for name, (_, scale) in zip(names, pairs, strict=True))


def _scale(value: Any) -> float:
    try:
        scale = float(value)
    except (TypeError, ValueError):
        raise ValueError("takes a number, or one of each condition in their order, such as text=3,label=1.5") from None
    if not 0 <= scale < math.inf:
        raise ValueError("takes finite numbers of at least 0")
    return scale


def scales(guidance: float | str) -> float | dict[str, float]:
    """The number that `kept` gives, or condition → number in their order."""
    if not isinstance(guidance, str):
        return guidance
    return {name: float(scale) for name, scale in (part.split("=") for part in guidance.split(","))}


def scale_of(guidance: float | str, name: str) -> float:
    """The number of one condition."""
    return scales(guidance)[name] if isinstance(guidance, str) else guidance


def chain(guidance: float | str) -> Chain:
    """The chain that `kept` stands for; a number leads from nothing told to everything.

    Neighbours of one scale are one step, since the answer between them falls out, and a scale of 1 in the first place
    is none: what it leads to is where it ends.
    """
    if not isinstance(guidance, str):
        return Chain((), () if guidance == 1 else ((guidance, ()),))
    begun, steps, told = (), [], ()
    for name, scale in scales(guidance).items():
        told = (*told, name)
        if scale == 1 and not steps:
            begun = told
        elif steps and steps[-1][0] == scale:
            steps[-1] = (scale, told)
        else:
            steps.append((scale, told))
    return Chain(begun, tuple(steps))


def shown(guidance: Any) -> str:
    """For a line about an evaluation."""
    return f"{guidance:g}" if isinstance(guidance, int | float) else str(guidance)
