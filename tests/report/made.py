"""A run directory with all that a report shows, written by the journal's own writer; and a page taken apart."""

import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
from PIL import Image

from dtrain.run import RunDirectory
from dtrain.tracking import journal
from dtrain.tracking.journal import Journal
from tests.digits import tiny

BATCH = 24
CONTEXT = {"sampler": "ddim", "steps": 5, "eta": 0.0, "guidance": 1.0, "seed": 0, "features": "pixels"}
VOID_LOSS, VOID_DISTANCE = 76543.21, 98765.43


class Clock:
    """Ten seconds between two lines of a journal."""

    def __init__(self):
        self.now = 1.8e9

    def time(self) -> float:
        self.now += 10
        return self.now


def make_run(
    folder: Path, monkeypatch, name: str = "made", *overrides: str, outcome: str | None = "finished", **begun
) -> Path:
    """Attempt 1 goes to step 7 and dies, attempt 2 goes on after step 4 to step 12; every fourth step is evaluated.

    begun: more of what an attempt's line says.
    """
    monkeypatch.setattr(journal, "time", Clock())
    config = tiny(folder / "digits", folder, f"run.name={name}", "train.steps=12", *overrides)
    run = RunDirectory(folder / name)
    run.make_folders()
    run.save_config(config)
    writer = Journal(run.journal_file)
    start = {"data": "0" * 64, "world_size": 2, "zero_stage": 1, "run_key": name} | begun
    writer.begin_attempt(0, 0, start)
    for step in range(1, 8):
        write_step(writer, run, step, void=step > 4)
    write_goodput(writer, 7, productive_s=60.0, data_wait_s=5.0, restart_s=15.0, lost_steps=3)
    writer.begin_attempt(4, 4 * BATCH, start)
    for step in range(5, 13):
        write_step(writer, run, step)
    fault = {"kind": "bad_step", "message": "a gradient is not finite"}
    writer.append("fault", 12, 12 * BATCH, context=fault)
    write_goodput(writer, 12, productive_s=140.0, evaluation_s=30.0, restart_s=10.0, lost_steps=0)
    writer.close()
    if outcome:
        run.write_outcome(outcome, 12, 2)
    return run.path


def write_step(writer: Journal, run: RunDirectory, step: int, void: bool = False) -> None:
    metrics = {"loss": 1 / step, "grad_norm": 2.0, "lr": 1e-3, "images_per_second": 100.0 + step}
    metrics |= {"step_seconds": 0.5, "data_wait_seconds": 0.01 * step}
    metrics |= {f"loss_level_{i}": (8 - i) / step for i in range(8)}
    writer.append("train", step, step * BATCH, metrics | ({"loss": VOID_LOSS} if void else {}))
    if step % 4 == 0 or void:
        writer.append("checkpoint", step, step * BATCH, {"seconds": 1.0}, {"path": f"step-{step:08d}"})
        fd = VOID_DISTANCE if void else 40 / step
        grid = f"samples/step-{step:08d}.png"
        picture(8 * 10, 10 * 10, step).save(run.path / grid)
        found = {"fd_pixels": fd, "fd_pixels_low": 0.9 * fd, "fd_pixels_high": 1.2 * fd, "seconds": 3.0}
        writer.append("eval", step, step * BATCH, found, CONTEXT | {"ema": "ema_0", "n": 48, "artifact": grid})
        writer.append("validation", step, step * BATCH, {f"loss_level_{i}": (9 - i) / step for i in range(8)})


def write_goodput(writer: Journal, step: int, **metrics: float) -> None:
    writer.append("goodput", step, step * BATCH, {name: value / 2 for name, value in metrics.items()})
    writer.append("goodput", step, step * BATCH, metrics)  # they accumulate: the last one counts


def append(path: Path, event: str, step: int, metrics: dict | None = None, context: dict | None = None) -> None:
    writer = Journal(path / "journal.jsonl")
    writer.append(event, step, step * BATCH, metrics, context)
    writer.close()


def picture(height: int, width: int, seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


class Page(HTMLParser):
    """A page as a browser would take it apart; every tag that is opened must be closed in its turn."""

    EMPTY = ("meta", "img", "input", "br", "path")

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.source, self.text, self.tags, self.open = text, "", [], []
        self.charts, self._figure, self._json = {}, None, False
        self.feed(text)
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "figure" and "chart" in (dict(attrs).get("class") or "").split():
            self._figure = {"title": None, "data": None}
        self._json = tag == "script" and dict(attrs).get("type") == "application/json"

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if self._json and self.open[-1] == "script":
            self._figure["data"] = json.loads(data)
            self.charts[self._figure["title"]] = self._figure["data"]
        elif self._figure is not None and self._figure["title"] is None and self.open[-1] == "b":
            self._figure["title"] = data
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data + "\n"

    def points(self, chart: str) -> dict[str, list]:
        """Name of a line → [[x, y, low, high, label], …]."""
        return {s["name"]: s["points"] for s in self.charts[chart]["series"]}
