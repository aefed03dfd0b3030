"""The rooms of the library, from the ground up, and their picture: python -m tests.rooms writes docs/rooms.svg."""

import ast
import textwrap
from functools import cache
from html import escape
from pathlib import Path

import dtrain

ROOT = Path(dtrain.__file__).parent
PICTURE = Path(__file__).parent.parent / "docs" / "rooms.svg"

# From the ground up. Files of one room import each other; no file is in two.
GROUND = [
    *("errors", "terminal", "files", "credentials", "addresses", "randomness", "position", "lock", "faults"),
    *("distributed", "launcher", "rendezvous", "interrupt", "plugins", "draws", "batch"),
    *("normals", "device_draws"),
]
ROOMS = [
    GROUND,
    ["config"],
    ["run"],
    ["data.shards"],
    ["data.order"],
    ["data.fields", "data.declared"],
    ["data.pack"],
    ["data"],
    ["models"],
    ["diffusion"],
    ["first_stage"],
    ["conditions"],
    ["encoding"],
    ["objectives"],
    ["tracking"],
    ["checkpoint"],
    ["evaluation"],
    ["trained"],
    ["training"],
    ["proposal"],
    ["report"],
    ["cluster"],
    ["chaos"],
    ["cli"],
]


def modules() -> dict[str, Path]:
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(path: Path, known: dict[str, Path]) -> set[str]:
    """What a file imports of dtrain, at its top, within functions and for type checkers."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dtrain":
            module = node.module.removeprefix("dtrain").lstrip(".")
            for name in node.names:
                below = f"{module}.{name.name}".lstrip(".")
                found.add(below if below in known else module)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("dtrain.") for a in node.names if a.name.startswith("dtrain.")}
    return found - {""}  # of the package itself: its version


def room(module: str) -> int:
    """The room whose name is the longest that the module begins with."""
    fitting = [(len(name), i) for i, names in enumerate(ROOMS) for name in names if f"{module}.".startswith(f"{name}.")]
    assert fitting, f"{module} is in no room"
    return max(fitting)[1]


def floors() -> list[list[int]]:
    """Rooms by floor, from the ground up: each stands on the floor above the highest one that it imports from."""
    known = modules()
    used = {i: set() for i in range(len(ROOMS))}
    for module, path in known.items():
        if module:
            used[room(module)] |= {room(other) for other in imported(path, known)} - {room(module)}

    @cache
    def floor(i: int) -> int:
        return 1 + max((floor(other) for other in used[i]), default=-1)

    found = [[] for _ in range(1 + max(map(floor, used)))]
    for i in used:
        found[floor(i)].append(i)
    return found


# -- the picture ----------------------------------------------------------------------------------------------------

WIDTH, MARGIN, GAP = 1180, 16, 14  # pixels
LINE, TITLE, TEXT = 17, 15, 13  # a line's height; sizes of letters
LETTER = 0.56  # of a letter's size: its width, on average, and a little more

FAMILIES = {  # what a room's name begins with → its colour
    "data": "#dbeafe",
    **dict.fromkeys(("models", "diffusion", "first_stage", "conditions", "encoding", "objectives"), "#dcfce7"),
    **dict.fromkeys(("run", "tracking", "checkpoint", "report"), "#fef3c7"),
    **dict.fromkeys(("evaluation", "trained", "training"), "#fee2e2"),
}
OTHER = "#f1f5f9"


def sentence(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = " ".join(ast.get_docstring(ast.parse(path.read_text())).split("\n\n")[0].split())
    return text.split(". ")[0].rstrip(".:").replace("`", "")


def described(i: int) -> tuple[str, str]:
    """(a room's name, its line)."""
    if ROOMS[i] == GROUND:
        return "the ground", ", ".join(f"{name}.py" for name in sorted(GROUND))
    path = modules()[ROOMS[i][0]]
    name = ROOMS[i][0].replace(".", "/")
    return f"{name}/" if path.name == "__init__.py" else f"{name}.py", sentence(path)


def drawn() -> str:
    """The picture as SVG, the ground at the bottom."""
    parts, top = [], MARGIN
    for floor in reversed(floors()):
        width = (WIDTH - 2 * MARGIN - (len(floor) - 1) * GAP) / len(floor)
        letters = int((width - 2 * GAP) / (TEXT * LETTER))
        texts = [(name, textwrap.wrap(line, letters, break_on_hyphens=False)) for name, line in map(described, floor)]
        height = 2 * GAP + LINE * (1 + max(len(lines) for _, lines in texts))
        for number, (name, lines) in enumerate(texts):
            left = MARGIN + number * (width + GAP)
            colour = FAMILIES.get(name.split("/")[0].removesuffix(".py"), OTHER)
            parts.append(
                f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{height}" rx="6" fill="{colour}" '
                'stroke="#64748b"/>'
            )
            left, below = left + GAP, top + GAP + TITLE
            parts.append(f'<text x="{left:.1f}" y="{below}" class="name">{escape(name)}</text>')
            for n, line in enumerate(lines, 1):
                parts.append(f'<text x="{left:.1f}" y="{below + n * LINE}">{escape(line)}</text>')
        top += height + GAP
    size = f"{WIDTH} {top - GAP + MARGIN}"
    style = f"text {{ font: {TEXT}px Helvetica, Arial, sans-serif; fill: #0f172a }}"
    style += f" .name {{ font-weight: bold; font-size: {TITLE}px }}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" role="img" aria-label="the rooms of dtrain">'
    paper = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, f"<style>{style}</style>", paper, *parts, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(drawn())
