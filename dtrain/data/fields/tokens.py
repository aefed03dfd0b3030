"""Words to tokens: UTF-8 bytes."""

from typing import Protocol

from dtrain.config.conditions import BEGIN


class Tokenizer(Protocol):
    """Words to token numbers, with those that begin and end a text.

    closing: how many end it, which a text that is cut keeps.
    """

    closing: int

    def __call__(self, words: str) -> list[int]: ...


class Bytes:
    closing = 0

    def __call__(self, words: str) -> list[int]:
        return [BEGIN, *words.encode()]
