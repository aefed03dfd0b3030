"""What a run's journal tells beside its curves, read once and then kept as the run goes on.

A step asks it for the best evaluation, or how far an attempt had got, and no step reads a file for that. It grows with
attempts and evaluations, not with steps.
"""

from pathlib import Path
from typing import Any

from dtrain.tracking.journal import highest_attempt, outline, valid

KEPT = ("attempt", "config", "eval", "eval_failed", "floor")
_REACH = ("attempt", "train", "checkpoint")  # events whose step the run had got to


class History:
    """lines: of attempts, changes of the config and the training's own evaluations, void ones too.

    attempt: the highest number so far, 0 before any. reached: attempt → its last step, as far as the journal tells.
    """

    def __init__(self):
        self.lines: list[dict[str, Any]] = []
        self.attempt = 0
        self.reached: dict[int, int] = {}

    @classmethod
    def read(cls, path: str | Path) -> "History":
        """Of the journal at `path`, empty where there is none. Raises as `journal.events` does."""
        history = cls()
        for line in outline(path):
            history.add(line)
        return history

    def add(self, line: dict[str, Any]) -> None:
        """What the journal has got since."""
        if line["event"] in KEPT:
            self.lines.append(line)
        self.attempt = max(self.attempt, highest_attempt([line]))
        if line["event"] in _REACH:
            self.reach(line["attempt"], line["step"])

    def reach(self, attempt: int, step: int) -> None:
        """A step that an attempt has done."""
        self.reached[attempt] = max(step, self.reached.get(attempt, 0))

    def counting(self, event: str) -> list[dict[str, Any]]:
        """The lines of an event that no later attempt has made void, in order."""
        return [line for line in valid(self.lines) if line["event"] == event]

    def lost_steps(self, step: int) -> int:
        """Steps that the newest attempt had done past `step`, where the next one begins."""
        return max(0, self.reached.get(self.attempt, 0) - step)
