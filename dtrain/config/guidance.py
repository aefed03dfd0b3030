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


_SET = ("negative_prompt", "guidance_orthogonal", "guidance_norm", "guidance_momentum", "guide_with")
OF_GUIDANCE = (*_SET, "guidance_renoise", "guess_mode")  # keys of `eval` that mean nothing without guidance


def chosen_over(own: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Any]:
    """A run's own `eval` with other values; where these take guidance away, what belongs to it alone goes too."""
    gone = OF_GUIDANCE if str(chosen.get("guidance")) in ("1", "1.0") else ()
    return {key: value for key, value in own.items() if key not in gone} | chosen


def check(config: Any) -> None:
    """Raises ValueError for guidance that a config's model or sampler cannot have, or that has no effect."""
    e, told = config.eval, [*([CLASS] if config.model.num_classes else []), *config.conditions]
    if e.guidance != 1 and not told and e.guide_with is None:
        raise ValueError(f"eval.guidance {e.guidance} needs a model with classes, but model.num_classes is 0")
    if isinstance(e.guidance, str):
        _check_apart(e.guidance, told)
    if e.guide_with is not None:
        _check_weak(e)
    if e.guidance_renoise == "away" and e.sampler not in ("ddim", "euler"):
        raise ValueError(
            f"eval.guidance_renoise away cannot go with sampler {e.sampler}, whose steps hold a velocity, several "
            "noises or a new one; take ddim or euler"
        )
    for key in _SET:
        if getattr(e, key) and not e.asked.steps:
            raise ValueError(f"eval.{key} has no effect with eval.guidance 1; take 3, or leave it out")
    if e.guidance_renoise == "away" and not e.asked.steps:
        raise ValueError("eval.guidance_renoise away has no effect with eval.guidance 1; take 0.6, or leave it out")
    if e.guidance_interval[0] >= e.guidance_interval[1]:
        raise ValueError("eval.guidance_interval must be [low, high] with low < high, shares of the process")


def _check_apart(guidance: str, told: list[str]) -> None:
    named = scales(guidance)
    if len(set(told)) < len(told):
        raise ValueError(f"eval.guidance {guidance}: the class is called {CLASS}, and so is a condition")
    if others := [name for name in named if name not in told]:
        raise ValueError(f"eval.guidance names {others[0]}, and this model is told {' and '.join(told)}")
    if len(named) < len(told):
        raise ValueError(
            f"eval.guidance {guidance} must name each of {', '.join(told)} once; 1 tells it without leading to it"
        )


def _check_weak(e: Any) -> None:
    """What has a meaning only where guidance leads away from the null."""
    if isinstance(e.guidance, str):
        raise ValueError(
            f"eval.guidance {e.guidance} cannot go with eval.guide_with: the weaker model is told everything too; "
            "take one number"
        )
    for key in ("negative_prompt", "guess_mode"):
        if getattr(e, key):
            raise ValueError(
                f"eval.{key} has no effect with eval.guide_with: the weaker model is told the same; leave one out"
            )


def untrained_null(config: Any) -> str | None:
    """Why a network never learns an answer with nothing told, and what to do; None where it learns one."""
    if not config.model.num_classes and not config.conditions:
        return "model.num_classes is 0; take guidance 1"
    dropouts = {f"conditions.{name}.dropout": getattr(one, "dropout", 1) for name, one in config.conditions.items()}
    if config.model.num_classes:
        dropouts["diffusion.label_dropout"] = config.diffusion.label_dropout
    never = next((key for key, share in dropouts.items() if share == 0), None)
    return None if never is None else f"{never} is 0, so no row is trained without; take 0.1, or guidance 1"


def shown(guidance: Any) -> str:
    """For a line about an evaluation."""
    return f"{guidance:g}" if isinstance(guidance, int | float) else str(guidance)
