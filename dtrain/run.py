"""The run directory: where everything a run leaves behind lies.

runs/<name>/  config.yaml  journal.jsonl  outcome.json  checkpoints/step-00001000/  samples/  logs/rank-0.log
              averages/step-00000500/  of a run with power-function averages: snapshots of these alone
"""

import contextlib
import json
import os
import re
from pathlib import Path
from typing import Literal

from dtrain import config as configuration
from dtrain import files
from dtrain.config import Config
from dtrain.credentials import masked
from dtrain.errors import UserError

Outcome = Literal["finished", "stopped", "user_error", "crashed", "hang"]


class RunDirectory:
    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.journal_file = self.path / "journal.jsonl"
        self.outcome_file = self.path / "outcome.json"
        self.stop_file = self.path / "stop"
        self.lock_file = self.path / "lock"
        self.checkpoints = self.path / "checkpoints"
        self.averages = self.path / "averages"
        self.samples = self.path / "samples"
        self.logs = self.path / "logs"
        self._folders = (self.checkpoints, self.samples, self.logs)

    @classmethod
    def find(cls, run: str | Path) -> "RunDirectory":
        """An existing run: a directory, or a bare name under runs/. Raises UserError."""
        tried = [Path(run), Path("runs") / run]
        for path in tried:
            if (path / "config.yaml").is_file():
                return cls(path)
        raise UserError(f"no run at {tried[0]} or {tried[1]}: a run directory holds a config.yaml")

    def config(self) -> Config:
        """The resolved config the run was last started with."""
        return configuration.load_kept(self.config_file)

    def make_folders(self) -> None:
        """Raises UserError where the place cannot be written."""
        try:
            for folder in self._folders:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise UserError(f"cannot write the run directory {self.path}: {e.strerror}") from None

    def remove_empty_folders(self) -> None:
        for folder in (*self._folders, self.path):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def save_config(self, config: Config) -> None:
        replace(self.config_file, config.dump())

    def write_outcome(
        self, outcome: Outcome, step: int, attempt: int | None = None, message: str | None = None
    ) -> None:
        body = {"outcome": outcome, "step": step, "attempt": attempt, "message": message}
        try:
            replace(self.outcome_file, json.dumps(masked({k: v for k, v in body.items() if v is not None})) + "\n")
        except OSError as e:  # how the run ended is worth more than this file
            print(f"{self.outcome_file} cannot be written ({e.strerror}): scripts will take this end for a crash")

    def outcome(self) -> dict | None:
        """How the last attempt ended: "outcome", "step" and, where there is one, "message".

        None while it runs, where it was killed, or where the file does not tell.
        """
        try:
            found = files.read_json(self.outcome_file)
        except (OSError, ValueError):
            return None
        if not isinstance(found, dict) or not all(isinstance(found.get(k, ""), str) for k in ("outcome", "message")):
            return None
        return found if re.fullmatch(r"[a-z_]{1,40}", found.get("outcome", "")) else None


def replace(path: Path, text: str) -> None:
    """Write a small file whole or not at all. Raises OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
