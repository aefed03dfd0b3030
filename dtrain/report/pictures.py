"""Pictures inside the page: sample grids over training, no larger than a page can bear."""

import base64
import io
from pathlib import Path

from dtrain.files import read_bytes, within
from dtrain.report.evaluations import at
from dtrain.report.markup import escaped
from dtrain.report.runs import Line, Run

MOST_GRIDS = 12  # of a run, spread over its training, the last one among them
MOST_COLUMNS = 10  # of a grid that training draws: the first classes, a column each
MOST_BYTES = 250_000  # of a picture that is taken as it is
LARGEST = 1 << 28  # bytes of a picture that is read
LONGEST = 1400  # pixels, of one that is not


def data_uri(picture: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def grids(runs: list[Run]) -> str:
    """A row of thumbnails a run, with one of them large; a script lets a slider move through them."""
    found = []
    for run in runs:
        lines = _with_grids(run)
        taken = _spread(lines, MOST_GRIDS)
        shown = [(line, uri) for line in taken if (uri := _read(within(run.directory.path, _artifact(line))))]
        if not shown:
            continue
        thumbs = "".join(
            f'<button type="button" class="thumb" aria-label="samples at {at(line)}">'
            f'<img src="{uri}" alt="samples at {at(line)}" loading="lazy"><span>step {line["step"]:,}</span></button>'
            for line, uri in shown
        )
        name = f"<h3>{escaped(run.name)}</h3>" if len(runs) > 1 else ""
        of = f"{len(shown)} of {len(lines)} grids. " if len(shown) < len(lines) else ""
        found.append(
            f'<div class="grids">{name}<p class="note">{of}The same noise and labels at every step'
            f"{_which(run)}; {escaped(run.ema(_weights(lines)))}.</p>"
            f'<input type="range" min="0" max="{len(shown) - 1}" value="{len(shown) - 1}" hidden '
            f'aria-label="step of the samples"><div class="both"><figure class="large" hidden>'
            f'<div class="labelled">{_columns(run)}<img alt=""></div><figcaption></figcaption></figure>'
            f'<div class="scroll thumbs">{thumbs}</div></div></div>'
        )
    return "".join(found)


def _classes(run: Run) -> int:
    classes = run.setting("model.num_classes", 0)
    return classes if isinstance(classes, int) else 0


def _which(run: Run) -> str:
    """What the columns are."""
    classes = _classes(run)
    if classes > MOST_COLUMNS:
        return f", a column for each of the first {MOST_COLUMNS} of {classes:,} classes"
    return ", a column a class" if classes else ""


def _columns(run: Run) -> str:
    """The class of each column: its name, or its number where no manifest names it; nothing without classes."""
    columns = min(_classes(run), MOST_COLUMNS)
    if columns < 1:
        return ""
    names = (run.manifest.classes if run.manifest else None) or []
    shown = [escaped(name) for name in (*names[:columns], *map(str, range(len(names), columns)))]
    cells = "".join(f'<span title="{name}">{name}</span>' for name in shown)
    return f'<div class="classes" style="--columns:{columns}">{cells}</div>'


def _with_grids(run: Run) -> list[Line]:
    """Evaluations that drew a grid, by step."""
    lines = {line["step"]: line for line in run.of("eval") if _artifact(line) is not None}
    return [lines[step] for step in sorted(lines)]


def _artifact(line: Line) -> str | None:
    return line["context"].get("artifact")


def _weights(lines: list[Line]) -> str:
    return str(lines[-1]["context"].get("ema", "?"))


def _spread(lines: list[Line], most: int) -> list[Line]:
    if len(lines) <= most:
        return lines
    return [lines[round(i * (len(lines) - 1) / (most - 1))] for i in range(most)]


def _read(path: Path | None) -> str | None:
    """A picture as a data URI, smaller where it is large; None where it is gone, damaged or outside of the run."""
    from PIL import Image

    if path is None:
        return None
    try:
        content = read_bytes(path, LARGEST)
        with Image.open(io.BytesIO(content)) as picture:
            if len(content) <= MOST_BYTES and picture.format in ("PNG", "JPEG", "WEBP"):
                picture.verify()
                return data_uri(content, picture.format.lower())
            picture.thumbnail((LONGEST, LONGEST))
            smaller = io.BytesIO()
            picture.convert("RGB").save(smaller, "WEBP", quality=85)
            return data_uri(smaller.getvalue(), "webp")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
