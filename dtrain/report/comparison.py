"""The page of `dtrain compare`, made of what was measured and of what the runs' journals tell, and its numbers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dtrain.credentials import masked
from dtrain.errors import UserError
from dtrain.files import replacing
from dtrain.report import triangle
from dtrain.report.chart import DASHES, Chart, Point, Series, line_of
from dtrain.report.markup import details, escaped, plural, table
from dtrain.report.numbers import count, duration, short
from dtrain.report.page import document
from dtrain.report.runs import Run
from dtrain.tracking import energy

PAGE, NUMBERS = "comparison.html", "comparison.json"
ALWAYS = ("sampler", "steps", "guidance", "ema", "precision", "batch_size", "seed")  # settings that are shown anyhow
SMALL = 64  # pixels a side of a picture that is shown enlarged, its pixels as squares
HIGHER, LOWER = max, min


def with_training(found: dict[str, Any]) -> dict[str, Any]:
    """What was measured, and with each run what its training took. Raises UserError for a run without a journal."""
    runs = []
    for one in found["runs"]:
        run = Run.read(one["path"])
        taken = energy.total(energy.by_attempt(run.directory.journal_file).values())
        training = {
            "images": one["images"],
            "seconds": run.seconds,
            "energy_watt_hours": taken or None,  # an estimate; None: nobody measured it
            "begun_with": run.setting("run.init_from"),
        }
        runs.append(one | {"training": training, "process": _process(run)})
    return found | {"runs": runs}


def write(found: dict[str, Any], out: Path) -> tuple[Path, Path]:
    """Write the page and the numbers, in `out`; their paths. A page that is there stays until then.

    Raises UserError where they cannot be written.
    """
    page, numbers = out / PAGE, out / NUMBERS
    try:
        with replacing(numbers) as f:
            f.write(json.dumps(masked(_without_pictures(found)), indent=1).encode() + b"\n")
        with replacing(page) as f:
            f.write(html(found).encode(errors="replace"))
    except OSError as e:
        raise UserError(
            f"cannot write {out}: {e.strerror}; make room there, or name another folder with --out"
        ) from None
    return page, numbers


def html(found: dict[str, Any]) -> str:
    """The whole document."""
    names = [run["name"] for run in found["runs"]]
    title = ", ".join(names) if len(names) <= 3 else f"{len(names)} runs"
    sections = [
        ("Numbers", numbers(found)),
        ("Triangle", triangle.html(found)),
        ("Over network evaluations", curves(found)),
        ("Pictures, steps and seconds", pictures(found)),
        ("What was compared", settings(found)),
    ]
    return document(f"Quality, diversity and speed: {title}", "dtrain compare", sections)


def for_mlflow(found: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[dict, list]]]:
    """(params, of each run its numbers and those at each number of network evaluations)."""
    params = {key: found[key] for key in ("device", "n", "features", "labels")}
    params |= {"held_out": found["held_out"]["hash"], **found["versions"]}
    runs = {}
    for run in found["runs"]:
        own, training = run["own"], run["training"]
        numbers = own["metrics"] | {name: own[name] for name in ("evaluations", "seconds_per_thousand")}
        numbers |= {"parameters": run["parameters"], "training_images": run["images"]}
        numbers |= {"training_seconds": training["seconds"], **(training["energy_watt_hours"] or {})}
        over = [
            (round(p["evaluations"]), p["metrics"] | {"seconds_per_thousand": p["seconds_per_thousand"]})
            for p in run["curve"]
        ]
        runs[run["name"]] = numbers, over
        params[f"{run['name']}.checkpoint"] = run["step"]
        if run["walks"]:
            params[f"{run['name']}.steps"] = own["steps"]
    return params, runs


def numbers(found: dict[str, Any]) -> str:
    """The table: a row a run, the best value of a column in bold; and what its columns are."""
    metrics, runs = found["metrics"], found["runs"]
    columns: list[tuple[str, Callable[[dict], float], Callable | None]] = [
        (escaped(metrics["fd"]), lambda run: run["own"]["metrics"][metrics["fd"]], LOWER),
        ("precision", lambda run: run["own"]["metrics"][metrics["precision"]], HIGHER),
        ("recall", lambda run: run["own"]["metrics"][metrics["recall"]], HIGHER),
        ("density", lambda run: run["own"]["metrics"][metrics["density"]], None),
        ("coverage", lambda run: run["own"]["metrics"][metrics["coverage"]], HIGHER),
        ("evaluations<br>an image", lambda run: run["own"]["evaluations"], LOWER),
        ("seconds<br>a thousand", lambda run: run["own"]["seconds_per_thousand"], LOWER),
    ]
    best = {name: better(map(value, runs)) for name, value, better in columns if better is not None}

    def cell(run: dict, name: str, value: Callable[[dict], float]) -> str:
        number = value(run)
        shown = f'<span title="{number!r}">{short(number)}</span>'
        return f"<b>{shown}</b>" if number == best.get(name) else shown

    rows = [
        [
            named(run, number),
            *(cell(run, name, value) for name, value, _ in columns),
            count(run["parameters"]),
            f"{run['images']:,}{_begun(run)}",
            duration(run["training"]["seconds"]),
            _energy(run),
        ]
        for number, run in enumerate(runs)
    ]
    head = [name for name, _, _ in columns]
    return table(["run", *head, "parameters", "training<br>images", "training<br>time", "energy"], rows) + _legend(
        found
    )


def in_words(found: dict[str, Any]) -> str:
    """The table's first columns, for a terminal."""
    metrics = found["metrics"]
    cells = [["run", metrics["fd"], "precision", "recall", "evaluations", "s a thousand"]]
    for run in found["runs"]:
        own = run["own"]
        three = [f"{own['metrics'][metrics[name]]:.4f}" for name in ("fd", "precision", "recall")]
        cells.append([run["name"], *three, f"{own['evaluations']:g}", f"{own['seconds_per_thousand']:.4g}"])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells)


def named(run: dict, number: int) -> str:
    return f'<i class="swatch" style="--c:var(--{line_of(number)[0]})"></i>{escaped(run["name"])}'


def _begun(run: dict) -> str:
    """A run that begins with another's weights has cost that one's training too."""
    of = run["training"]["begun_with"]
    return f"<br><small>after {escaped(Path(of).name)}</small>" if of else ""


def _energy(run: dict) -> str:
    taken = run["training"]["energy_watt_hours"]
    return f"{short(sum(taken.values()))} Wh <small>estimated</small>" if taken else "not measured"


def _legend(found: dict) -> str:
    distance, device, held_out = found["metrics"]["fd"], found["device"], f"{found['held_out']['samples']:,}"
    lines = [
        f"{distance}: distance of {found['n']:,} samples of each run from {held_out} held-out images, lower is better. "
        "Precision: share of samples that look like held-out images; recall: share of held-out images that samples "
        "look like, by 3 nearest neighbours. Density and coverage: the same by 5, less moved by an outlier.",
        f"Seconds: of 1,000 samples from noise to 8-bit images, on this device alone ({device}); the median of "
        f"{found['timed_blocks']} blocks, after one that is not counted. Evaluations: forward passes of a network an "
        "image, those of guidance counted.",
        "Training: images, and time of all attempts with evaluations; energy of GPUs and CPUs of the run's nodes, an "
        "estimate where it was measured. What another run took, whose weights one began with, is not in its row.",
    ]
    return "".join(f'<p class="note">{escaped(line)}</p>' for line in lines)


def curves(found: dict[str, Any]) -> str:
    """Distance and recall over network evaluations, a line a run; nothing where no run has more than one point."""
    metrics, several = found["metrics"], any(len(run["curve"]) > 1 for run in found["runs"])

    def line(number: int, run: dict, metric: str) -> Series:
        points = [
            Point(
                point["evaluations"],
                point["metrics"][metric],
                label=f"{_taken(run, point)}, {short(point['seconds_per_thousand'])} s a thousand",
            )
            for point in run["curve"]
        ]
        return Series(run["name"], points, line_of(number)[0], number % DASHES, dots=True)

    charts = [
        Chart(
            metrics[name],
            [line(number, run, metrics[name]) for number, run in enumerate(found["runs"])],
            x_name="network evaluations an image",
            y_name="lower is better" if name == "fd" else "higher is better",
            log_x=True,
            log_y=name == "fd",
        ).html()
        for name in ("fd", "recall")
    ]
    note = (
        "Each run at several numbers of its sampler's steps, all else as it is; one whose steps are not free is a dot."
    )
    return f'<div class="charts">{"".join(charts)}</div><p class="note">{note}</p>' if several else ""


def pictures(found: dict[str, Any]) -> str:
    """A row a run, a column a number of steps; below each picture its steps and seconds."""
    others = sorted({one["steps"] for run in found["runs"] for one in run["pictures"][1:]})
    rows, size = [], found["picture"]["size"]
    for number, run in enumerate(found["runs"]):
        by_steps = {one["steps"]: one for one in run["pictures"]} if run["walks"] else {}
        cells = [
            _picture(run, run["pictures"][0], size),
            *(_picture(run, by_steps[s], size) if s in by_steps else "–" for s in others),
        ]
        rows.append([named(run, number), *cells])
    head = ["", "its own steps", *(f"{steps:,} steps" for steps in others)]
    asked = found["picture"]
    what = [
        f"class {asked['label']}" if any(run["classes"] for run in found["runs"]) else "",
        (f"“{asked['prompt']}”" if asked["prompt"] else "the first held-out caption")
        if any(run["words"] for run in found["runs"])
        else "",
    ]
    note = (
        f"{', '.join(filter(None, what)) or 'A sample'} from the same noise (seed {asked['seed']}) in every column. "
        f"Seconds are of this picture drawn alone, on {found['device']}; a thousand drawn together take less each."
    )
    return f'{table(head, rows, "pictures")}<p class="note">{escaped(note[0].upper() + note[1:])}</p>'


def _picture(run: dict, one: dict, size: int) -> str:
    steps = _taken(run, one)
    kind = ' class="small"' if size <= SMALL else ""
    return (
        f'<figure><img{kind} src="data:image/png;base64,{one["png"]}" alt="{escaped(run["name"])}, {steps}">'
        f"<figcaption>{steps}<br>{short(one['seconds'])} s</figcaption></figure>"
    )


def _taken(run: dict, one: dict) -> str:
    return plural(one["steps"], "step") if run["walks"] else "no steps"


def _without_pictures(found: dict[str, Any]) -> dict[str, Any]:
    """As numbers: steps and seconds of the pictures stay."""
    runs = [
        run | {"pictures": [{k: v for k, v in one.items() if k != "png"} for one in run["pictures"]]}
        for run in found["runs"]
    ]
    return found | {"runs": runs}


def settings(found: dict[str, Any]) -> str:
    """What all have in common, and in which settings they differ."""
    runs = found["runs"]
    contexts = [run["context"] | {"process": run["process"]} for run in runs]
    keys = list(dict.fromkeys(["process", *ALWAYS, *(key for context in contexts for key in context)]))
    same = [key for key in keys if len({_text(context.get(key)) for context in contexts}) == 1]
    differing = [key for key in keys if key not in same]
    rows = [[escaped(key), *(_text(context.get(key)) for context in contexts)] for key in differing]
    rows.insert(0, ["step of the checkpoint", *(f"{run['step']:,}" for run in runs)])
    all_rows = [[escaped(key), _text(contexts[0].get(key))] for key in same]
    held_out, versions = found["held_out"], found["versions"]
    facts = [
        f"device: {found['device']}",
        f"{found['n']:,} samples of each run",
        f"features: {found['features']}",
        f"held-out images: {held_out['path']}, hash {held_out['hash'][:12]}",
        *([f"statistics: {found['statistics']}"] if found["statistics"] else []),
        *(f"{name} {version}" for name, version in versions.items()),
    ]
    left_out = [f"{run['name']}, {steps} steps: {why}" for run in runs for steps, why in run["left_out"].items()]
    missing = details("Left out", "".join(f"<p>{escaped(line)}</p>" for line in left_out)) if left_out else ""
    return (
        f'<p class="note">{escaped(" · ".join(facts))}</p><h3>Settings in which they differ</h3>'
        f"{table(['', *(named(run, i) for i, run in enumerate(runs))], rows, 'left')}"
        f"{details('Settings that are the same for all', table(['', 'all'], all_rows, 'left'))}{missing}"
    )


def _text(value: Any) -> str:
    return (
        "–"
        if value is None
        else escaped(json.dumps(value, ensure_ascii=False) if isinstance(value, dict | list) else value)
    )


def _process(run: Run) -> str:
    kind = run.setting("objective.kind", "denoising")
    return str(run.setting("diffusion.process", "gaussian")) if kind == "denoising" else str(kind)
