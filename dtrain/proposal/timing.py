"""How long a config takes on this machine: the training itself is started, timed over a few steps, and ended."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dtrain.config import Config
from dtrain.errors import USER_ERROR, UserError

STEPS = 25  # timed at most
SECONDS = 15.0  # of steps at most, once two count
PATIENCE = 240.0  # for a first step
WARM_UP = 1  # steps that are not counted
BUSY = 0.7
LAUNCHED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)  # what a launcher sets


@dataclass(frozen=True)
class Timing:
    """Seconds. evaluation: of one, without the reading of the held-out split, which the first one does."""

    step: float
    steps: int  # timed
    evaluation: float
    reference: float
    load: float  # programs that wanted to compute already, a core

    def minutes(self, total: int, every: int) -> str:
        """The line that says how long `total` steps take, with an evaluation after `every` (0: none), and how that is
        known.
        """
        many = total // every if every else 0
        whole = total * self.step + many * self.evaluation + self.reference
        line = f"{_long(whole)} here: {total:,} steps of {self.step:.2g} s, timed over {self.steps}"
        if many:
            line += f"; {many} evaluations of {_short(self.evaluation)}, from a few samples"
        if self.reference > 1:
            line += f"; the held-out pictures once, {_short(self.reference)}"
        if self.load > BUSY:
            line += f". It was busy with other work ({self.load:.1f} programs a core); alone it is faster"
        return f"{line}."


def measure(config: Config, ranks: int, progress: Callable[[int, int], None]) -> Timing:
    """Take a few steps of this very config, on one rank with its share of the batch, in a folder that is removed.

    Communication between ranks is not in it. Raises UserError with the training's own line where it does not start, and
    TimeoutError where no step is done in time.
    """
    load = os.getloadavg()[0] / len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(prefix="dtrain-init-") as folder:
        times = _train(config, ranks, Path(folder), progress)
    intervals = [b - a for a, b in zip(times[WARM_UP:-1], times[WARM_UP + 1 :], strict=True)]
    evaluation, reference = _evaluate(config, ranks) if config.eval.every else (0.0, 0.0)
    return Timing(median(intervals), len(intervals), evaluation, reference, load)


def _train(config: Config, ranks: int, folder: Path, progress: Callable[[int, int], None]) -> list[float]:
    """When each step was done, on the clock."""
    (folder / "config.yaml").write_text(config.dump())
    overrides = [
        f"run.dir={folder}",
        "run.name=timed",
        f"data.batch_size={config.data.batch_size // ranks}",
        "train.steps=1000000",
        "train.log_every=1",
        "train.checkpoint_every=1000000",
        "eval.every=0",
        "tracking.enabled=false",
    ]
    command = [sys.executable, "-c", "from dtrain.cli import main; main()", "train", str(folder / "config.yaml")]
    with open(folder / "log.txt", "w+") as log:
        alone = {k: v for k, v in os.environ.items() if k not in LAUNCHED}
        process = subprocess.Popen([*command, *overrides], stdout=log, stderr=log, start_new_session=True, env=alone)
        try:
            return _watch(process, folder, progress)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its loaders too
            process.wait()


def _watch(process: subprocess.Popen, folder: Path, progress: Callable[[int, int], None]) -> list[float]:
    journal, began = folder / "timed" / "journal.jsonl", time.monotonic()
    while True:
        times = _step_times(journal)
        if times:  # in seconds: how many steps they are enough for is not known before
            progress(min(round(time.time() - times[0]), int(SECONDS) - 1), int(SECONDS))
        enough = len(times) > WARM_UP + 2 and times[-1] - times[0] > SECONDS
        if enough or len(times) > WARM_UP + STEPS:
            return times
        if process.poll() is not None:
            said = (folder / "log.txt").read_text().strip().splitlines() or ["it said nothing"]
            if process.returncode == USER_ERROR:
                raise UserError(said[-1].removeprefix("dtrain: "))
            raise UserError(f"a training of this config ended with exit code {process.returncode}: {said[-1]}")
        if time.monotonic() - began > PATIENCE and len(times) < 2:
            raise TimeoutError
        time.sleep(0.2)


def _step_times(journal: Path) -> list[float]:
    if not journal.exists():
        return []
    lines = journal.read_text().splitlines(keepends=True)
    events = [json.loads(line) for line in lines if line.endswith("\n")]
    return [event["time"] for event in events if event["event"] == "train"]


def _evaluate(config: Config, ranks: int) -> tuple[float, float]:
    """(seconds of one evaluation on all ranks, of reading the held-out split once), from a block of samples."""
    import torch

    from dtrain import distributed
    from dtrain.data.shards.manifest import load_holdout
    from dtrain.evaluation.features.build import extractor
    from dtrain.evaluation.generate import Generator
    from dtrain.models.build import build
    from dtrain.objectives.build import build as build_objective

    distributed.prepare()
    device, e = distributed.device(), config.eval
    generator = Generator.of(build(config).to(device), build_objective(config).process, config, device)
    block = min(e.batch_size, e.num_samples)
    labels = torch.zeros(block, dtype=torch.int64)
    few = e.model_copy(update={"steps": 2})
    generator.draw(list(range(block)), labels, few)
    began = time.perf_counter()
    images = generator.draw(list(range(block)), labels, few)
    drawing = (time.perf_counter() - began) / 2 * e.steps / block  # an image
    features = extractor(e.features, config.data.image_size, config.data.channels, e.weights, device)
    few_images = images[:16].to(device)
    features(few_images)
    began = time.perf_counter()
    features(few_images).cpu()
    seeing = (time.perf_counter() - began) / len(few_images)
    return e.num_samples * (drawing + seeing) / ranks, load_holdout(config.data).samples * seeing / ranks


def _long(seconds: float) -> str:
    if seconds < 90 * 60:
        return f"About {max(1, round(seconds / 60))} minute{'s' if round(seconds / 60) > 1 else ''}"
    return f"About {seconds / 3600:.1f} hours"


def _short(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} minutes"
