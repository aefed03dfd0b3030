"""Where each attempt's time went, as far as the journals tell."""

from dtrain.report.markup import escaped, table
from dtrain.report.numbers import duration
from dtrain.report.runs import Run
from dtrain.tracking import energy

# In the order of the bar. What a journal says beyond these goes behind them under its own name.
NAMES = {
    "productive_s": "productive",
    "data_wait_s": "waiting for data",
    "save_stall_s": "stalled by saving",
    "evaluation_s": "evaluation",
    "bad_step_s": "refused steps",
    "restart_s": "starting",
}


def html(runs: list[Run]) -> str:
    """A bar and a row for each attempt, and for all of them together."""
    return "".join(_one(run, len(runs) > 1) for run in runs)


def _one(run: Run, several: bool) -> str:
    last = {line["attempt"]: line["metrics"] for line in run.happened if line["event"] == "goodput"}  # they accumulate
    if not last:
        return ""
    keys = dict.fromkeys(k for metrics in last.values() for k in metrics)
    names = {k: name for k, name in NAMES.items() if k in keys}
    names |= {
        k: k.removesuffix("_s").replace("_", " ") for k in keys if k.endswith("_s") and k not in (*NAMES, "wall_s")
    }
    parts = [(f"attempt {attempt}", metrics) for attempt, metrics in sorted(last.items())]
    if len(parts) > 1:
        parts.append(("in all", {k: sum(m.get(k, 0.0) for m in last.values()) for k in keys}))
    bars, rows = [], []
    for label, metrics in parts:
        total = sum(metrics.get(k, 0.0) for k in names) or 1.0
        share = f"{100 * metrics.get('productive_s', 0.0) / total:.1f} %"
        stack = "".join(
            f'<i class="g{i % 8}" style="width:{100 * metrics.get(k, 0.0) / total:.3f}%" '
            f'title="{escaped(name)}: {duration(metrics.get(k, 0.0))}"></i>'
            for i, (k, name) in enumerate(names.items())
        )
        bars.append(f'<div class="lane"><span>{label}</span><div class="stack">{stack}</div><b>{share}</b></div>')
        lost = f"{metrics['lost_steps']:,.0f}" if "lost_steps" in metrics else "–"
        rows.append([label, *(duration(metrics.get(k, 0.0)) for k in names), lost, share])
    shown = [escaped(name) for name in names.values()]
    key = "".join(f'<span class="key"><i class="g{i % 8}"></i>{name}</span>' for i, name in enumerate(shown))
    title = f"<h3>{escaped(run.name)}</h3>" if several else ""
    head = ["", *shown, "steps lost", "goodput"]
    times = f'{"".join(bars)}<div class="legend">{key}</div>{table(head, rows)}'
    return f'<div class="goodput">{title}{times}{_energy(run)}</div>'


def _energy(run: Run) -> str:
    """What it took in all, and in each attempt where there are several; nothing where no node could tell."""
    attempts = energy.by_attempt(run.directory.journal_file)
    carbon = (run.config.get("tracking") or {}).get("carbon_intensity")
    lines = [energy.said(energy.total(attempts.values()), carbon)]
    if len(attempts) > 1:
        lines += [f"attempt {number}: {energy.said(own, carbon)}" for number, own in sorted(attempts.items())]
    return f"<p>{escaped('Energy: ' + '; '.join(lines))}.</p>" if lines[0] else ""
