"""YAML with a reason beside each key, as the files of configs/ have it."""

import textwrap
from dataclasses import dataclass
from typing import Any

import yaml

COLUMN = 47  # where comments begin
WIDTH = 120


@dataclass(frozen=True)
class Line:
    """`key: value  # why`; item: of a list of sections."""

    key: str
    value: Any
    why: str | None = None
    item: bool = False

    def __str__(self) -> str:
        mark = "- " if self.item else ""
        text = f"  {mark}{self.key}: {scalar(self.value)}"
        if not self.why:
            return text
        why = " ".join(self.why.split())
        if len(text) < COLUMN and COLUMN + 2 + len(why) <= WIDTH:
            return f"{text:<{COLUMN}}# {why}"
        if len(text) + 4 + len(why) <= WIDTH:
            return f"{text}  # {why}"
        return f"  # {why}\n{text}"


def scalar(value: Any) -> str:
    """A value as YAML on one line, which `config.load` reads back."""
    if isinstance(value, float) and value < 0.01:
        return f"{value:.1e}".replace("e-0", "e-")
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").strip()


def wrapped(line: str) -> list[str]:
    """A sentence in lines of a comment; an indented command stays whole."""
    return [line] if line.startswith(" ") else textwrap.wrap(line, WIDTH - 2)


def document(header: list[str], sections: dict[str, list[Line]]) -> str:
    """A whole file: sentences and commands above, then the sections."""
    top = [f"# {part}" for line in header for part in wrapped(line)]
    parts = [f"{name}:\n" + "\n".join(map(str, lines)) for name, lines in sections.items()]
    return "\n".join(top) + "\n" + "\n\n".join(parts) + "\n"
