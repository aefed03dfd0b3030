"""The page itself: sections in order, one file that needs nothing else."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.resources import files
from pathlib import Path

from dtrain import __version__
from dtrain.errors import UserError
from dtrain.report import evaluations, goodput, overview, pictures, sweeps, timeline, training
from dtrain.report.chart import Chart
from dtrain.report.markup import escaped
from dtrain.report.numbers import clock
from dtrain.report.runs import Run, read_runs


def write_report(
    runs: list[str | Path],
    out: Path | None = None,
    neighbours: int = 0,
    features: str | None = None,
    weights: str | None = None,
    progress: Callable[[str], AbstractContextManager] | None = None,
) -> Path:
    """Write the page about one run or several; its path.

    runs: run directories, or names under runs/. out: default, report.html in the first run's directory. neighbours: the
    number of samples whose nearest training images are looked for, under `features` (default: those of the run's
    evaluations; `weights` as in eval.weights); this alone needs torch, and `progress` shows it. Raises UserError, one
    line, where there is no such run or `out` cannot be written.
    """
    found = read_runs(runs)
    out = Path(out) if out is not None else found[0].directory.path / "report.html"
    content = page(found, _neighbours(found, neighbours, features, weights, progress) if neighbours else "")
    temporary = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        temporary.write_text(content, encoding="utf-8", errors="replace")  # names may hold bytes that are no UTF-8
        os.replace(temporary, out)
    except OSError as e:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {out}: {e.strerror}; name a writable place with --out") from None
    return out


def page(runs: list[Run], neighbours: str = "") -> str:
    """The whole document."""
    sections = [
        ("Evaluation", _charts(evaluations.charts(runs)) + evaluations.table(runs)),
        ("Samples", pictures.grids(runs)),
        ("Nearest training images", neighbours),
        ("Sweeps", sweeps.html(runs)),
        ("Training", _charts(training.charts(runs))),
        ("Speed", _charts(training.speed(runs))),
        ("Where the time went", goodput.html(runs)),
        ("Time line", timeline.html(runs)),
    ]
    title = ", ".join(run.name for run in runs) if len(runs) <= 3 else f"{len(runs)} runs"
    above = f'{overview.comparison(runs)}<div class="cards">{overview.cards(runs)}</div>'
    return document(title, "dtrain report", sections, above)


def document(title: str, kind: str, sections: list[tuple[str, str]], above: str = "") -> str:
    """A page of sections (name, HTML), those without content left out; `above` is HTML between its head and them."""
    shown = [(name, name.lower().replace(" ", "-"), content) for name, content in sections if content]
    links = "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor, _ in shown)
    body = "".join(f'<section id="{anchor}"><h2>{name}</h2>{content}</section>' for name, anchor, content in shown)
    here = files("dtrain.report")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escaped(title)} · {kind}</title><style>{(here / 'page.css').read_text()}</style></head><body>"
        f"<header><h1>{escaped(title)}</h1><nav>{links}</nav></header><main>{above}{body}</main>"
        f"<footer>dtrain {__version__}, {clock(time.time())}</footer>"
        f"<script>{(here / 'page.js').read_text()}</script></body></html>\n"
    )


def _neighbours(
    runs: list[Run], count: int, features: str | None, weights: str | None, progress: Callable | None
) -> str:
    from dtrain.report.neighbours import html, nearest

    progress = progress or (lambda what: nullcontext(lambda done, of: None))
    found = [nearest(run.directory, run.directory.config(), count, features, weights, progress) for run in runs]
    return "".join(html(run, one, len(runs) > 1) for run, one in zip(runs, found, strict=True))


def _charts(charts: list[Chart]) -> str:
    found = "".join(chart.html() for chart in charts)
    return f'<div class="charts">{found}</div>' if found else ""
