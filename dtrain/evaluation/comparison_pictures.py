"""One picture of each run over its numbers of steps, from the same noise, with the seconds that this device took."""

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.evaluation.combinations import configured
from dtrain.evaluation.comparable import Member
from dtrain.evaluation.evaluate import asked_of
from dtrain.evaluation.generate import GRID_IDS, Generator
from dtrain.evaluation.reference import Reference

FEW_SECONDS = 0.3  # below which one measurement says little


@dataclass(frozen=True)
class Asked:
    """What the pictures show. label: of runs with classes, by default 0; prompt: of runs that are told in words, by
    default the first held-out caption. steps: the columns, beside each run's own number.
    """

    steps: tuple[int, ...] = (5, 25, 50, 999)
    label: int | None = None
    prompt: str | None = None


def check_asked(asked: Asked, members: Sequence[Member]) -> None:
    """Raises UserError for a class or a prompt that runs cannot be asked for."""
    if asked.label is not None:
        classes = {member.name: member.config.model.num_classes for member in members}
        if not any(classes.values()):
            raise UserError(f"--label {asked.label}: none of these runs has classes; leave it out")
        for name, number in classes.items():
            if number and not 0 <= asked.label < number:
                raise UserError(f"--label {asked.label}: the model of {name} has {number} classes, counted from 0")
    if asked.prompt is not None and not any(member.config.texts for member in members):
        raise UserError(f"--prompt {asked.prompt!r}: none of these runs is told in words; leave it out")


def draw(
    generator: Generator, config: Config, reference: Reference, asked: Asked, steps: int, seed: int
) -> dict[str, Any]:
    """A picture as PNG in base64, and the seconds that it took alone, on this rank; the median of three where they are
    few.
    """
    e = configured(config, {"steps": steps, "seed": seed}).eval
    said = dict(asked_of([0], reference))
    if asked.prompt is not None and config.texts:
        said |= generator.conditions.saying([asked.prompt])
    labels = torch.tensor([asked.label or 0])
    seconds: list[float] = []
    while len(seconds) < (3 if sum(seconds) < FEW_SECONDS else 1):
        begun = time.perf_counter()
        image = generator.draw([GRID_IDS], labels, e, **({"said": said} if said else {}))[0]
        seconds.append(time.perf_counter() - begun)
    return {"steps": steps, "evaluations": generator.evaluations(e), "seconds": median(seconds), "png": png(image)}


def png(image: torch.Tensor) -> str:
    """A picture, uint8 (C, H, W), as a PNG file in base64."""
    from PIL import Image

    pixels = image.permute(1, 2, 0).numpy()
    content = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()
