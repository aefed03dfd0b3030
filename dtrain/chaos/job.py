"""The job that the faults are tried on: made small and quick, in a folder of its own, on a disk that can be filled."""

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from pathlib import Path

import yaml

from dtrain import config as configuration
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.run import RunDirectory

# At the demo's 2e-3 what another shape rounds otherwise grows to 1e-3 within 110 steps; at 5e-4 it stays below 1e-6.
DIGITS = {
    "data": {"image_size": 8, "channels": 1, "batch_size": 24, "workers": 0},
    "model": {"name": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 2, "num_classes": 10},
    "optim": {"lr": 5e-4, "warmup_steps": 5, "gradient_clip": 1.0},
    "ema": [{"decay": 0.9}],
    "deepspeed": {"zero_stage": 2},
    "train": {"steps": 72},
    "eval": {"every": 12, "features": "pixels"},
}
# Of any job: what a round of faults takes. Settings given on the command line come after these.
SETTINGS = [
    "train.steps=72",
    "train.checkpoint_every=6",
    "train.log_every=1",
    "train.keep_last=3",
    "train.hang_limit=20",
]
EVALUATION = ["eval.every=12", "eval.num_samples=48", "eval.batch_size=12", "eval.steps=5"]
EVALUATION += ["eval.validation_images=12"]
QUIET = ["tracking.enabled=false", "tracking.system_every=0"]
DISK_BYTES = 64 * 2**20  # beside the checkpoints
LARGEST_DISK = 2**30


@dataclass(frozen=True)
class Shape:
    ranks: int
    stage: int

    def __str__(self) -> str:
        return f"{self.ranks} rank{'s' if self.ranks > 1 else ''} at ZeRO stage {self.stage}"


@dataclass(frozen=True)
class Job:
    """file: the config as every attempt is given it. disk: a small file system that holds the runs, or None.

    command: the entry point of `dtrain`, which every attempt runs.
    """

    work: Path
    file: Path
    config: Config
    shape: Shape
    disk: Path | None
    command: EntryPoint

    @classmethod
    def make(
        cls,
        work: Path,
        config: Path | None,
        overrides: list[str],
        ranks: int,
        disk: Path | None,
        command: EntryPoint,
    ) -> "Job":
        """Write the job's config into `work`; without one, scikit-learn's digits, packed there. Raises UserError."""
        if config is None:
            from dtrain.data.pack.pack import pack

            pack("sklearn:digits", work / "data", holdout=360)
            data = {"shards": str(work / "data/train"), "holdout": str(work / "data/holdout/manifest.json")}
            config = work / "digits.yaml"
            config.write_text(yaml.safe_dump(DIGITS | {"data": DIGITS["data"] | data}))
        given = configuration.load(config, overrides)
        more = EVALUATION if given.eval.every else []
        settings = [f"run.dir={disk or work}/runs", *SETTINGS, *more, *QUIET]
        resolved = configuration.load(config, [*settings, *overrides, "run.name=job"])
        if resolved.data.batch_size % ranks:
            raise UserError(f"data.batch_size {resolved.data.batch_size} does not divide by {ranks} ranks; see --ranks")
        file = work / "job.yaml"
        file.write_text(resolved.dump())
        return cls(work, file, resolved, Shape(ranks, resolved.deepspeed.zero_stage), disk, command)

    def run(self, name: str) -> RunDirectory:
        return RunDirectory(Path(self.config.run.dir) / name)

    def arguments(self, name: str, shape: Shape, overrides: list[str]) -> list[str]:
        """The arguments of the command that trains the run `name`."""
        own = [f"run.name={name}", f"deepspeed.zero_stage={shape.stage}", *self._commands()]
        return ["train", str(self.file), *own, *overrides]

    def _commands(self) -> list[str]:
        """The commands of `pipe:` shards, which a config is kept without."""
        data = self.config.data
        given = {"shards": data.shards, "holdout_shards": data.holdout_shards}
        given |= {f"mix.{i}.shards": source.shards for i, source in enumerate(data.mix)}
        return [f"data.{key}={json.dumps(place)}" for key, place in given.items() if (place or "").startswith("pipe:")]

    def shapes(self) -> list[Shape]:
        """Others that the job can go on in."""
        stages = [0, 1, 2, 3] if self.config.deepspeed.precision != "bf16" else [1, 2, 3]
        if self.config.deepspeed.offload != "none":
            stages = [self.shape.stage]
        most = self.shape.ranks if self.config.train.micro_batch else self.shape.ranks + 1
        sizes = [n for n in range(1, most + 1) if self.config.data.batch_size % n == 0 and n <= _devices()]
        return [s for s in (Shape(n, stage) for n in sizes for stage in stages) if s != self.shape]


@contextlib.contextmanager
def small_disk(place: Path, config: Path | None, overrides: list[str]) -> Iterator[Path | None]:
    """A tmpfs at `place` with room for the job's checkpoints, where this process may mount one."""
    size = DISK_BYTES + 12 * 16 * _parameters(config, overrides)
    if os.geteuid() != 0 or size > LARGEST_DISK:
        yield None
        return
    place.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True).returncode:
        yield None
        return
    # A shell waits for the end of a pipe that only this process holds, so that a kill leaves nothing mounted.
    undo = ["bash", "-c", "trap '' INT TERM HUP; cat >/dev/null; umount -l \"$1\"", "small-disk", place]
    waiting = subprocess.Popen(undo, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield place
    finally:
        waiting.stdin.close()
        waiting.wait()


def _parameters(config: Path | None, overrides: list[str]) -> int:
    if config is None:
        return 0
    import torch

    from dtrain.models.build import allocate

    with torch.device("meta"):
        return sum(p.numel() for p in allocate(configuration.load(config, overrides)).parameters())


def _devices() -> int:
    import torch

    return torch.cuda.device_count() or 2**10
