"""Steps that would harm the run: which are refused, and when the run goes back and around the images that keep coming.

A step is refused where its loss or gradient is not finite, or its gradient's norm is far over those of recent steps.
It moves nothing (`training/refusal.py`) and does not count: `images` goes on, `step` does not. After some in a row the
run goes back to its newest whole checkpoint and leaves their images out for ever (`data/skipped.py`).

Every rank decides by itself from the same numbers: norms are equal on all ranks, and the window is in the checkpoint.
"""

from collections import deque
from typing import Any, NamedTuple

import numpy as np

from dtrain.config import Config
from dtrain.data.order.names import SampleNames
from dtrain.data.order.skipped import Skipped
from dtrain.errors import SharedError
from dtrain.position import Position
from dtrain.tracking.tracker import Tracker
from dtrain.training.player import LARGEST
from dtrain.training.reduction import StepSums

WINDOW = 128  # norms of steps that were taken
FEWEST = 32  # of them, before one can be called a spike
QUANTILE = 0.9
NAMED = 3  # samples in a message


class Refused(NamedTuple):
    norm: float
    limit: float
    images: list[tuple[int, int]]  # [first, last) of the run's order, without what is left out


class BadSteps:
    """skipped: the ranges of images that the run leaves out; refused: the steps refused in a row up to now."""

    def __init__(self, config: Config, names: SampleNames, tracker: Tracker):
        self._train, self._batch_size = config.train, config.data.batch_size
        self._names, self._tracker = names, tracker
        self._norms: deque[float] = deque(maxlen=WINDOW)
        self._untold: list[Refused] = []
        self.skipped = Skipped()
        self.refused: list[list[tuple[int, int]]] = []
        self.rollbacks = 0  # of the whole run

    @property
    def limit(self) -> float:
        """The largest norm that the next step may have."""
        factor = self._train.spike_factor
        if not factor or len(self._norms) < FEWEST:
            return LARGEST
        typical = sorted(self._norms)[int(QUANTILE * len(self._norms))]
        return factor * typical or LARGEST

    def batch(self, images: int) -> list[tuple[int, int]]:
        """The images of the global batch that begins at place `images` of the order: ranges [first, last)."""
        after = int(self.skipped.places(images, self._batch_size)[-1]) + 1
        return self.skipped.between(images, after)

    def judge(self, norm: float, limit: float, images: list[tuple[int, int]]) -> bool:
        """Whether the step of this batch was taken; `limit` is the one it had."""
        if norm <= limit:
            self._norms.append(norm)
            self.refused.clear()
            return True
        self.refused.append(images)
        self._untold.append(Refused(norm, limit, images))
        return False

    def on_reduced(self, sums: StepSums) -> str | None:
        """Journal a refused step once all ranks have reduced it; what to tell the user of it."""
        if sums.taken:
            return None
        norm, limit, images = self._untold.pop(0)
        spike = f"the norm of its gradient is {norm:.4g}, over {limit:.4g}"
        why = spike if np.isfinite(norm) else "its loss or gradient is not finite"
        message = f"the step after {sums.position.step} was refused: {why}"
        samples = self._names.by_shard(_places(images))
        context = {"kind": "bad_step", "message": message, "refused": images, "samples": samples}
        self._tracker.write("fault", sums.position, {"grad_norm": norm}, context)
        return message

    def drop_pending(self) -> None:
        """The refused steps that no rank has been told of were of rows that stood in for a batch: they are none."""
        del self.refused[len(self.refused) - len(self._untold) :]
        self._untold.clear()

    @property
    def too_many(self) -> bool:
        return len(self.refused) >= self._train.bad_steps

    def leave_out(self, position: Position) -> None:
        """Be without the images refused in a row up to `position`. Raises SharedError where that is too often."""
        ranges = [one for batch in self.refused for one in batch]
        if self.rollbacks >= self._train.rollbacks:
            places = _places(ranges)
            more = f" and {len(places) - NAMED:,} more" if len(places) > NAMED else ""
            raise SharedError(
                f"{len(self.refused)} steps in a row after step {position.step} were refused, and the run has gone "
                f"back {self.rollbacks} times already (train.rollbacks); look at the samples "
                f"{', '.join(self._names.of(places[:NAMED]))}{more}, at optim.lr, or at train.spike_factor"
            )
        self.skipped = Skipped([*self.skipped.ranges, *ranges])
        self.rollbacks += 1
        self.refused.clear()

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain data, of now, though it is written later."""
        return {
            "norms": list(self._norms),
            "refused": list(self.refused),
            "skipped": self.skipped.ranges,
            "rollbacks": self.rollbacks,
        }

    @staticmethod
    def check(state: Any) -> None:
        """Raises ValueError for what `state` cannot have given."""
        try:
            ranges = [*state.get("skipped", []), *(one for batch in state.get("refused", []) for one in batch)]
            sound = all(type(a) is type(b) is int and 0 <= a <= b < 1 << 53 for a, b in ranges)
            sound &= all(type(norm) in (int, float) for norm in state.get("norms", []))
            sound &= type(state.get("rollbacks", 0)) is int
        except (AttributeError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ValueError("which steps were refused")

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state` gave. What has been left out since stays left out, and how often the run went back counts on."""
        self._norms = deque(state.get("norms", []), maxlen=WINDOW)
        self.refused = [[(a, b) for a, b in batch] for batch in state.get("refused", [])]
        self.skipped = Skipped([*self.skipped.ranges, *state.get("skipped", [])])
        self.rollbacks = max(self.rollbacks, state.get("rollbacks", 0))


def _places(ranges: list[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([np.arange(first, last) for first, last in ranges])
