"""Pieces of HTML that several sections are made of. What they are given is HTML already: words go through `escaped`."""

import html
from typing import Any

from dtrain.credentials import redacted


def escaped(text: Any) -> str:
    """`text` without secrets and as HTML, for an attribute too: every word of a run's own goes through here."""
    return html.escape(redacted(text))


def table(head: list[str], rows: list[list[str]], kind: str = "") -> str:
    """A table in a box of its own to scroll in; the first cell of a row is its name."""
    names = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>' for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{names}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def details(summary: str, content: str) -> str:
    """Content that shows when it is asked for."""
    return f"<details><summary>{summary}</summary>{content}</details>"


def plural(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
