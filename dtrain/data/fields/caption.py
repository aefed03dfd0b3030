"""A sample's caption: the words of a text file, or of a place in a JSON file, as tokens."""

import json
from typing import TYPE_CHECKING, Any, NamedTuple

from dtrain.data.fields.field import Field, View
from dtrain.data.fields.tokens import Tokenizer
from dtrain.errors import BadSample

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PADDING = -1  # behind the last token


class Words(NamedTuple):
    """Where captions are: the extension of the file, and the keys that lead into it where it is JSON."""

    extension: str
    path: tuple[str, ...] = ()

    @classmethod
    def at(cls, place: str) -> "Words":
        """As `conditions.NAME.field` names it: `txt`, `json:caption`, `json:text.en`."""
        extension, _, path = place.partition(":")
        return cls(extension, tuple(filter(None, path.split("."))))

    def of(self, data: bytes, choice: float = 0.0) -> str:
        """The caption of a file; "" for null and for spaces alone: an image without words.

        choice: in [0, 1), which of several. Raises BadSample.
        """
        said = self.all_of(data)
        return said[chosen(choice, len(said))] if said else ""

    def all_of(self, data: bytes) -> list[str]:
        """The captions of a file; of a list, entries without words are left out. Raises BadSample."""
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as e:
            raise BadSample(f"is not UTF-8 at byte {e.start}; correct it") from None
        return self._words(self._found(text) if self.path else text)

    def _found(self, text: str) -> Any:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise BadSample(f"is no JSON that can be read ({e}); correct it") from None
        for key in self.path:
            if not isinstance(found, dict) or key not in found:
                raise BadSample(f"has no {'.'.join(self.path)}; write null there for an image without words")
            found = found[key]
        return found

    def _words(self, found: Any) -> list[str]:
        several = found if isinstance(found, list) else [found]
        if not all(one is None or isinstance(one, str) for one in several):
            raise BadSample(f"has at {'.'.join(self.path)} no text, null, or list of these; correct it")
        return [words for one in several if (words := " ".join((one or "").split()))]


def chosen(choice: float, several: int) -> int:
    """Which of so many captions a draw in [0, 1) stands for."""
    return int(choice * several)


class Caption(Field):
    """The tokens of a caption, int32 (1 + L,): how many the whole caption has, then at most L, padded by PADDING.

    An image without words has no tokens. A caption that is cut keeps the tokens that end one. length: L.
    """

    dtype = "int32"
    chooses = True
    remedy = "write an empty one for an image without words"

    def __init__(self, name: str, place: str, length: int, tokens: Tokenizer):
        self.name, self.place, self._words, self._tokens = name, place, Words.at(place), tokens
        self.extensions, self.shape = (self._words.extension,), (1 + length,)

    @property
    def described(self) -> str:
        return f"a {self.extensions[0]} with its caption"

    def read(self, data: bytes, view: View) -> "np.ndarray":
        return self.row(self.words(data, view.choice))

    def words(self, data: bytes, choice: float = 0.0) -> str:
        """The caption of a file, as `Words.of` finds it."""
        return self._words.of(data, choice)

    def all_words(self, data: bytes) -> list[str]:
        """All captions of a file, none of an image without words."""
        return self._words.all_of(data)

    def is_long(self, words: str) -> bool:
        """Whether it is cut."""
        return len(self._tokens(words)) > self.shape[0] - 1

    def row(self, words: str) -> "np.ndarray":
        """int32 (1 + L,) of words that are given otherwise, such as a prompt."""
        return self._row(self._tokens(words) if words.strip() else [])

    def empty(self) -> "np.ndarray":
        """int32 (1 + L,) of what a tokenizer makes of no words: the tokens that begin and end them."""
        return self._row(self._tokens(""))

    def _row(self, tokens: list[int]) -> "np.ndarray":
        import numpy as np

        row = np.full(self.shape, PADDING, dtype=np.int32)
        row[0], most = len(tokens), len(row) - 1
        if len(tokens) > most:
            end = self._tokens.closing
            tokens = [*tokens[: most - end], *tokens[len(tokens) - end :]]
        row[1 : 1 + len(tokens)] = tokens
        return row

    def truncated(self, column: "Tensor") -> int:
        """How many rows of (n, 1 + L) were cut."""
        return int((column[:, 0] >= column.shape[1]).sum())
