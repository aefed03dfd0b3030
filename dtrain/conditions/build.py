"""The conditions a configuration asks for, side by side."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dtrain.batch import Batch, Condition
from dtrain.conditions.classes import Classes
from dtrain.conditions.condition import Conditioning
from dtrain.conditions.encoders import Frozen
from dtrain.conditions.picture import Shown
from dtrain.conditions.text import CachedWords, Trained, Words
from dtrain.config import Config, Eval, Section, Text
from dtrain.config.conditions import Picture
from dtrain.config.guidance import CLASS
from dtrain.data.declared import caption
from dtrain.errors import UserError
from dtrain.models.build import allocate

# What samples are asked for, by the condition that is told it: captions or prompts, or pictures (n, C, S, S).
Said = Mapping[str, list[str] | Tensor]
NOTHING: Said = {}


def taken(said: Said, rows: list[int]) -> Said:
    """What these rows of samples are asked for."""
    return {
        name: several[rows] if isinstance(several, Tensor) else [several[i] for i in rows]
        for name, several in said.items()
    }


class Conditions:
    """Several conditions as one: each keeps to its own arguments, and each is dropped by its own draw."""

    def __init__(self, parts: Sequence[Conditioning] = (), names: Sequence[str] | None = None):
        """names: by which guidance may lead to each of the parts apart; None: by none."""
        self._parts = list(parts)
        self._names = list(names) if names is not None else [None] * len(self._parts)

    def __bool__(self) -> bool:
        return bool(self._parts)

    @property
    def words(self) -> list[Words]:
        """Those that are told in words."""
        return [part for part in self._parts if isinstance(part, Words)]

    @property
    def pictures(self) -> list[Shown]:
        """Those that are told pictures."""
        return [part for part in self._parts if isinstance(part, Shown)]

    def of_batch(self, batch: Batch) -> Condition:
        """What the rows of a batch are told in training, a share of them nothing."""
        condition: Condition = {}
        for part in self._parts:
            condition |= part.dropped(part.given(batch), batch)
        return condition

    def null(
        self, condition: Condition, negative: str = "", told: Collection[str] = (), pictures: bool = True
    ) -> Condition:
        """The same rows told nothing. An argument that is no condition's stays as it is.

        negative: what those that are told in words are told instead, a negative prompt. told: those that stay.
        pictures: False: all pictures stay.
        """
        nothing = dict(condition)
        for name, part in zip(self._names, self._parts, strict=True):
            if name in told or (not pictures and part in self.pictures):
                continue
            said = part in self.words and negative.strip()
            nothing |= part.all_told(condition, negative) if said else part.null(condition)
        return nothing

    def of_ids(self, ids: list[int], labels: Tensor, said: Said = NOTHING) -> Condition:
        """What samples are told; see `Conditioning.of_ids`. said: n captions, or n pictures, of each that has some."""
        condition: Condition = {}
        for part in self._parts:
            if isinstance(part, Words) and part.name in said:
                condition |= part.said(said[part.name], labels.device)
            elif isinstance(part, Shown) and part.name in said:
                condition |= part.of_pictures(said[part.name].to(labels.device), ids)
            else:
                condition |= part.of_ids(ids, labels)
        return condition

    def saying(self, prompts: list[str]) -> Said:
        """Prompts as all are told them. Raises UserError where none is told in words."""
        if not self.words:
            raise UserError("this model is not told in words; leave prompts out")
        return {part.name: prompts for part in self.words}

    def as_sampled(self, condition: Condition, how: Eval) -> Condition:
        """The same with the control of pictures as strong as `how` says."""
        for part in self.pictures:
            condition = part.scaled(condition, how.control_scale.get(part.name, 1.0), how.guess_mode)
        return condition

    @property
    def stated(self) -> dict[str, Any]:
        """What a checkpoint says of the frozen encoders, as plain data; nothing where there are none."""
        return {"text_encoders": found} if (found := self.fingerprints) else {}

    def check(self, stated: Any) -> None:
        """Raises UserError where a checkpoint, as its `text_encoders` say, was trained with other frozen encoders."""
        for name, own in self.fingerprints.items():
            theirs = stated.get(name) if isinstance(stated, dict) else None
            if theirs not in (None, own):
                raise UserError(
                    f"it was trained with another text encoder (fingerprint {str(theirs)[:12]} there, {own[:12]} here) "
                    f"of other files, precision or block; name the right folder in conditions.{name}.encoder"
                )

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprint of each frozen encoder, by condition."""
        return {part.name: part.fingerprint for part in self.words if part.fingerprint is not None}

    def typical(self, rows: int) -> Condition:
        """A stand-in of the shapes that so many rows have, on the default device; no encoder is asked."""
        condition: Condition = {}
        for part in self._parts:
            if isinstance(part, Words | Shown):
                condition |= part.typical(rows)
            else:
                condition |= part.of_ids(list(range(rows)), torch.zeros(rows, dtype=torch.long))
        return condition


def build(config: Config) -> Conditions:
    """The class where `model.num_classes` > 0, then those of `conditions`."""
    parts: list[Conditioning] = []
    if config.model.num_classes:
        parts.append(Classes(config.model.num_classes, config.diffusion.label_dropout))
    names = [*([CLASS] if parts else []), *config.conditions]
    return Conditions([*parts, *(_part(name, section, config) for name, section in config.conditions.items())], names)


def _part(name: str, section: Section, config: Config) -> Conditioning:
    if isinstance(section, Picture):
        return Shown(name, section, config.data.channels, config.data.image_size)
    if not isinstance(section, Text):
        return section.build(config)
    encoder = Trained(section.length) if section.trained else Frozen(section)
    words = CachedWords if section.cached else Words
    return words(caption(name, section), encoder, section.dropout, section.null == "empty")


def typical_forward(model: nn.Module, config: Config, rows: int, training: bool = True) -> Callable[[], Tensor]:
    """A forward pass of the backbone on zeros of the shapes that it gets, on the default device: to count its cost."""
    x = torch.zeros(rows, *config.shape)
    if config.model.name == "kl_autoencoder":
        noise = torch.zeros(rows, model.latent_channels, *(side // model.downscale for side in x.shape[2:]))
        return lambda: model(x, noise).pixels
    if config.base_source:
        model.stand_on(allocate(config.base).to(next(model.parameters()).dtype))
    condition = build(config).typical(rows)
    draws = config.model.draws() if training else {}
    drawn = {argument: torch.zeros(rows, dtype=torch.long) for argument in draws}
    return partial(model, x, torch.zeros(rows, *config.diffusion.told_shape), **condition, **drawn)
