"""Where a run comes from, and where else it can be seen: command, code, data set, MLflow."""

import html

from dtrain.credentials import redacted
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import UserError
from dtrain.report.markup import escaped, plural
from dtrain.report.numbers import size
from dtrain.report.runs import Run

FEW = 10  # class names that are shown


def facts(run: Run) -> str:
    """A list of what is known; nothing where nothing is."""
    begun = run.begun
    context = begun[-1]["context"] if begun else {}
    command = context.get("command_line") or context.get("command")
    origins = {tuple(line["context"].get(k) for k in ("command_line", "commit", "uncommitted")) for line in begun}
    others = f" <small>attempt {begun[-1]['attempt']}; the others are in the time line</small>" if begun else ""
    found = {
        "command": f"<code>{escaped(command)}</code>{others if len(origins) > 1 else ''}" if command else "",
        "commit": f"<code>{escaped(context['commit'])}</code>{_changes(context)}" if "commit" in context else "",
        "data": _data(run),
        "held out": _held_out(run),
        "MLflow": _mlflow(run),
    }
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in found.items() if value)
    return f'<dl class="origin">{rows}</dl>' if rows else ""


def _changes(context: dict) -> str:
    difference = next((str(a) for a in context.get("artifacts", []) if str(a).endswith("uncommitted.diff")), None)
    if not context.get("uncommitted"):
        return ""
    return " and changes" + (f", kept in <code>{escaped(difference)}</code>" if difference else "")


def _data(run: Run) -> str:
    """A line a source: where it is, and how much, as far as its manifest is still there."""
    places = [f"<code>{escaped(source.get('shards'))}</code>" for source in run.sources]
    whole = run.manifest
    if whole is None:
        gone = " <small>size not known: its manifest is not here or has changed</small>"
        return "<br>".join(places) + (gone if places else "")
    lines = [f"{place} {_size(one)}{_classes(one)}" for place, one in zip(places, (whole, *whole.mixed), strict=True)]
    return f"{'<br>'.join(lines)} <small>hash {whole.hash[:12]}</small>"


def _held_out(run: Run) -> str:
    return f"<code>{escaped(run.setting('data.holdout'))}</code> {_size(run.holdout)}" if run.holdout else ""


def _size(one: Manifest) -> str:
    return f"{plural(one.samples, 'sample')}, {size(sum(shard.bytes for shard in one.shards))}"


def _classes(one: Manifest) -> str:
    if not one.classes:
        return ""
    kind = f"{len(one.classes):,} class{'es' if len(one.classes) > 1 else ''}"
    return f", {kind}: {escaped(', '.join(one.classes[:FEW]))}{', …' if len(one.classes) > FEW else ''}"


def _mlflow(run: Run) -> str:
    """The page of the run's curves, the one link that leads away from this page."""
    from dtrain.tracking.mlflow.link import curves_link, server_command

    try:
        link, command = curves_link(run.directory), server_command(run.directory)
    except UserError:  # the config of another version
        return ""
    if link is None:
        return ""
    server, _, page = link.partition("/#/")
    address = html.escape(f"{redacted(server)}/#/{page}")
    served = f", while <code>{escaped(command)}</code> runs" if command else ""
    return f'<a href="{address}" rel="noreferrer">the curves</a>{served}'
