"""What documentation prints: fenced blocks, and the simple commands in them."""

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / folder / "README.md" for folder in ("configs", "launch", "eval")),
]
# What somebody has to replace by his own: RUN, CONFIG, DIR/x, /data/…, s3://…, […], and dots.
PLACEHOLDER = re.compile(r"(^|[=/])[A-Z][A-Z_0-9]{2,}\b|^/data/|://|…|\.\.\.|^\[|\]$")


@dataclass(frozen=True)
class Command:
    """A simple command: its words, without comment and variables set before it; where it is printed."""

    words: tuple[str, ...]
    where: str
    into: str | None = None  # the file that its output goes to

    @property
    def is_pattern(self) -> bool:
        """Whether it has words to be replaced, so that nobody can run it as it stands."""
        return any(PLACEHOLDER.search(word) for word in self.words)

    @property
    def without_optional(self) -> tuple[str, ...]:
        """The words without `[…]` and dots, which stand for what may be left out."""
        words, within = [], False
        for word in self.words:
            within = within or word.startswith("[")
            if not within and word not in ("...", "…"):
                words.append(word)
            within = within and not word.endswith("]")
        return tuple(words)

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of this language, an expression such as `sh|bash`, in a Markdown text, in order."""
    return re.findall(rf"^ *```(?:{language})\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)


def inline(text: str) -> list[str]:
    """The `code` within the prose, outside of fenced blocks."""
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose)]


def commands(script: str, where: str) -> list[Command]:
    """The simple commands of lines of shell; what a line goes on with after `\\` belongs to it."""
    found = []
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&;|>")
        lexer.whitespace_split = True
        for is_word, part in itertools.groupby(lexer, key=lambda word: word not in ("&&", ";")):
            words = list(part)
            while words and re.fullmatch(r"[A-Z_0-9]+=.*", words[0]):
                del words[0]
            end = next((place for place, word in enumerate(words) if word in (">", "|")), len(words))
            into = words[end + 1] if ">" in words else None
            if is_word and words:
                found.append(Command(tuple(words[:end]), where, into))
    return found
