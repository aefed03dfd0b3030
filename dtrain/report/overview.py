"""The head of the page: each run on a card, several in a table, and what tells their configs apart."""

import statistics
from typing import Any

import yaml

from dtrain.config import flat
from dtrain.report.chart import line_of
from dtrain.report.evaluations import best_of, interval
from dtrain.report.markup import details, escaped, plural, table
from dtrain.report.numbers import count, duration, short
from dtrain.report.origin import facts as origin
from dtrain.report.runs import Run

STATES = {
    "finished": "finished",
    "stopped": "stopped",
    "user_error": "ended by a mistake",
    "hang": "hung",
    "running": "running",
    "crashed": "crashed",
}
NETWORKS = {"dit": "DiT", "mmdit": "MMDiT", "unet": "UNet", "kl_autoencoder": "autoencoder"}
FEW = 12  # config keys that are shown without being asked for
MOST_BEST = 6  # evaluations' settings on a card
GOOD, WAITING = ("finished",), ("running", "stopped")


def cards(runs: list[Run]) -> str:
    return "".join(_card(run, number, len(runs) > 1) for number, run in enumerate(runs))


def comparison(runs: list[Run]) -> str:
    """For several runs: one row each, and the config keys in which they differ."""
    if len(runs) < 2:
        return ""
    rows = []
    for number, run in enumerate(runs):
        best = best_of(run)[:MOST_BEST]
        shown = "<br>".join(f"{escaped(b.metric)} {short(b.value)}" for b in best) or "–"
        of = "<br>".join(f"{escaped(b.setting)}, step {b.line['step']:,}" for b in best)
        state, images = STATES.get(run.state, escaped(run.state)), f"{run.last['images']:,}"
        row = [_named(run, number), state, _steps(run), images, f"<b>{shown}</b>", of, _speed(run)]
        rows.append([*row, duration(run.seconds)])
    head = ["run", "state", "steps", "images", "best distance", "of", "images/s", "time in attempts"]
    return table(head, rows, "left") + _differences(runs)


def _named(run: Run, number: int) -> str:
    return f'<i class="swatch" style="--c:var(--{line_of(number)[0]})"></i>{escaped(run.name)}'


def _differences(runs: list[Run]) -> str:
    configs = [flat(run.config) for run in runs]
    keys = [k for k in dict.fromkeys(k for c in configs for k in c) if len({str(c.get(k)) for c in configs}) > 1]
    rows = [[f"<code>{escaped(k)}</code>", *(escaped(c.get(k, "–")) for c in configs)] for k in keys if k != "run.name"]
    if not rows:
        return '<p class="note">Their configs are the same but for the name.</p>'
    found = table(["key", *(escaped(run.name) for run in runs)], rows, "left")
    title = f"{plural(len(rows), 'config key')} in which they differ"
    return f"<h3>{title}</h3>{found}" if len(rows) <= FEW else details(title, found)


def _card(run: Run, number: int, several: bool) -> str:
    name = _named(run, number) if several else escaped(run.name)
    kind = "good" if run.state in GOOD else "waiting" if run.state in WAITING else "bad"
    ended = run.directory.outcome() or {}
    message = f'<p class="message">{escaped(ended["message"])}</p>' if ended.get("message") else ""
    facts = [("steps", _steps(run)), ("images", count(run.last["images"]))]
    best = best_of(run)
    for b in best[:MOST_BEST]:
        low, high = interval(b.line, b.metric)
        spread = f"<small>{short(low)} – {short(high)}</small>" if low is not None else ""
        where = f"<small>{escaped(b.setting)}<br>step {b.line['step']:,}</small>"
        facts.append((f"best {b.metric}", f"{short(b.value)}{spread}{where}"))
    losses = [line["metrics"]["loss"] for line in run.of("train") if "loss" in line["metrics"]]
    facts += [("loss", short(losses[-1]))] if losses else []
    facts += [("images/s", f"{_speed(run)}<small>median</small>")] if losses else []
    facts.append(("time", f"{duration(run.seconds)}<small>in {plural(len(run.attempts), 'attempt')}</small>"))
    bad = sum(line["event"] == "bad_sample" for line in [*run.lines, *run.elsewhere])
    facts += [("bad samples", f"{bad:,}")] if bad else []
    faults = sum(line["event"] == "fault" for line in [*run.happened, *run.elsewhere])
    facts += [("faults", f"{faults:,}")] if faults else []
    unusable = "".join(f"<small>in {escaped(file)}</small>" for file in run.left_out)
    facts += [("unusable lines, left out", f"{sum(run.left_out.values()):,}{unusable}")] if unusable else []
    shown = "".join(f"<div><dt>{escaped(name)}</dt><dd>{value}</dd></div>" for name, value in facts)
    more = len(best) - MOST_BEST
    rest = f'<p class="note">{plural(more, "more setting")}: all evaluations are in the table.</p>' if more > 0 else ""
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return (
        f'<section class="card"><h2>{name} <span class="state {kind}">'
        f"{STATES.get(run.state, escaped(run.state))}</span></h2>{message}"
        f'<dl class="tiles">{shown}</dl>{rest}'
        f'<p class="note">{escaped(" · ".join(_highlights(run)))}</p>{origin(run)}'
        f"{details('Config', f'<pre>{escaped(text)}</pre>')}</section>"
    )


def _highlights(run: Run) -> list[str]:
    """What people ask first about a run's config."""
    get = run.setting
    model = get("model", {}) if isinstance(get("model"), dict) else {}
    sizes = [f"{k} {v}" for k, v in model.items() if k in ("size", "depth", "width", "patch") and v is not None]
    process = get("diffusion.process", "gaussian")
    how = [process, None if process == "flow" else get("diffusion.schedule"), get("diffusion.prediction")]
    if get("objective.kind") == "autoencoding":
        how = ["autoencoding", get("objective.reconstruction"), f"KL weight {get('objective.kl_weight')}"]
    size, channels, classes = get("data.image_size"), get("data.channels", 3), get("model.num_classes", 0)
    world = next((line["context"].get("world_size") for line in reversed(run.of("attempt"))), None)
    found: list[Any] = [
        " ".join([NETWORKS.get(str(model.get("name")), "model"), *sizes]),
        f"images {size} × {size} × {channels}" + (f", {classes} classes" if classes else ""),
        ", ".join(map(str, filter(None, how))),
        f"batch {get('data.batch_size')}, learning rate {get('optim.lr')}",
        f"ZeRO {get('deepspeed.zero_stage', 2)}, {get('deepspeed.precision', 'fp32')}",
    ]
    decays = [profile.get("decay") for profile in run.profiles]
    found += [f"EMA {', '.join(map(str, decays))}"] if decays else []
    found += [plural(world, "rank")] if world else []
    return found


def _steps(run: Run) -> str:
    planned, done = run.setting("train.steps"), run.last["step"]
    return f"{done:,}" if planned == done or not isinstance(planned, int) else f"{done:,} of {planned:,}"


def _speed(run: Run) -> str:
    speeds = [
        line["metrics"]["images_per_second"] for line in run.of("train") if "images_per_second" in line["metrics"]
    ]
    return short(statistics.median(speeds)) if speeds else "–"
