"""Steps that would harm the run: which are refused, and when the run goes back and around the images that keep coming.

A step is refused where its loss or gradient is not finite, or its gradient's norm is far over those of recent steps.
It moves nothing (`training/refusal.py`) and does not count: `images` goes on, `step` does not. After some in a row the
run goes back to its newest whole checkpoint and leaves their images out for ever (`data/order/skipped.py`).

Every rank decides by itself from the same numbers: norms are equal on all ranks, and the window is in the checkpoint.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from dtrain.config import Train
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
    turn: str
    norm: float
    limit: float
    images: list[tuple[int, int]]  # [first, last) of k, without what is left out


class BadSteps:
    """What is judged of every turn of a step, each by its own recent norms: any turn that is refused refuses the step.

    skipped: the ranges of images that the run leaves out. refused: by turn, the images of those refused in a row up to
    now. turns: their names; the first is that of the run's own norm.
    """

    def __init__(
        self, train: Train, batch_size: int, names: SampleNames, tracker: Tracker, turns: Sequence[str] = ("main",)
    ):
        self._train, self._batch_size = train, batch_size
        self.names, self._tracker, self._first = names, tracker, turns[0]
        self._norms: dict[str, deque[float]] = {turn: deque(maxlen=WINDOW) for turn in turns}
        self._pending: list[Refused] = []  # that not all ranks have reduced yet
        self.skipped = Skipped()
        self.refused: dict[str, list[list[tuple[int, int]]]] = {turn: [] for turn in turns}
        self.rollbacks = 0  # of the whole run

    def limit(self, turn: str = "main") -> float:
        """The largest norm that the turn's next gradient may have."""
        factor, norms = self._train.spike_factor, self._norms[turn]
        if not factor or len(norms) < FEWEST:
            return LARGEST
        typical = sorted(norms)[int(QUANTILE * len(norms))]
        return factor * typical or LARGEST

    def batch(self, images: int) -> list[tuple[int, int]]:
        """The images of the global batch after `images` were seen: ranges [first, last) of k."""
        after = int(self.skipped.kept(images, self._batch_size)[-1]) + 1
        return self.skipped.between(images, after)

    def judge(self, norm: float, limit: float, images: list[tuple[int, int]], turn: str = "main") -> bool:
        """Whether the turn of this batch was taken; `limit` is the one it had."""
        if norm <= limit:
            self._norms[turn].append(norm)
            self.refused[turn].clear()
            return True
        self.refused[turn].append(images)
        self._pending.append(Refused(turn, norm, limit, images))
        return False

    def on_reduced(self, sums: StepSums) -> str | None:
        """Journal a refused step once all ranks have reduced it; what to tell the user of it."""
        if sums.taken:
            return None
        turn, norm, limit, images = self._pending.pop(0)
        spike = f"the norm of its gradient is {norm:.4g}, over {limit:.4g}"
        why = spike if np.isfinite(norm) else "its loss or gradient is not finite"
        whose = "" if turn == self._first else f" in its turn {turn}"
        message = f"the step after {sums.position.step} was refused{whose}: {why}"
        samples = self.names.by_shard(_k_in(images))
        context = {"kind": "bad_step", "message": message, "refused": images, "samples": samples}
        self._tracker.write("fault", sums.position, {"grad_norm": norm}, context)
        return message

    def drop_pending(self) -> None:
        """The refused steps that no rank has journaled were of rows that stood in for a batch: they are none."""
        for one in self._pending:
            self.refused[one.turn].pop()
        self._pending.clear()

    @property
    def too_many(self) -> bool:
        return len(self._worst) >= self._train.bad_steps

    @property
    def _worst(self) -> list[list[tuple[int, int]]]:
        return max(self.refused.values(), key=len)

    def leave_out(self, position: Position) -> None:
        """Be without the images refused in a row up to `position`. Raises SharedError where that is too often."""
        batches = self._worst
        ranges = [one for batch in batches for one in batch]
        if self.rollbacks >= self._train.rollbacks:
            k = _k_in(ranges)
            more = f" and {len(k) - NAMED:,} more" if len(k) > NAMED else ""
            raise SharedError(
                f"{len(batches)} steps in a row after step {position.step} were refused, and the run has gone "
                f"back {self.rollbacks} times already (train.rollbacks); look at the samples "
                f"{', '.join(self.names.of(k[:NAMED]))}{more}, at optim.lr, or at train.spike_factor"
            )
        self.skipped = Skipped([*self.skipped.ranges, *ranges])
        self.rollbacks += 1
        for one in self.refused.values():
            one.clear()

    def state(self) -> dict[str, Any]:
        """For a checkpoint: plain data, of now, though it is written later."""
        first, *others = (
            {"norms": list(norms), "refused": list(self.refused[turn])} for turn, norms in self._norms.items()
        )
        further = dict(zip([*self._norms][1:], others, strict=True))
        return (
            first
            | {"skipped": self.skipped.ranges, "rollbacks": self.rollbacks}
            | ({"turns": further} if further else {})
        )

    @staticmethod
    def check(state: Any) -> None:
        """Raises ValueError for what `state` cannot have given."""
        try:
            turns = [state, *state.get("turns", {}).values()]
            ranges = [*state.get("skipped", []), *(r for turn in turns for b in turn.get("refused", []) for r in b)]
            sound = all(type(a) is type(b) is int and 0 <= a <= b < 1 << 53 for a, b in ranges)
            sound &= all(type(norm) in (int, float) for turn in turns for norm in turn.get("norms", []))
            sound &= type(state.get("rollbacks", 0)) is int
        except (AttributeError, TypeError, ValueError):
            sound = False
        if not sound:
            raise ValueError("which steps were refused")

    def load_state(self, state: dict[str, Any]) -> None:
        """What `state` gave. What has been left out since stays left out, and how often the run went back counts on."""
        further = state.get("turns", {})
        for turn in self._norms:
            own = state if turn == self._first else further.get(turn, {})
            self._norms[turn] = deque(own.get("norms", []), maxlen=WINDOW)
            self.refused[turn] = [[(a, b) for a, b in batch] for batch in own.get("refused", [])]
        self.skipped = Skipped([*self.skipped.ranges, *state.get("skipped", [])])
        self.rollbacks = max(self.rollbacks, state.get("rollbacks", 0))


def _k_in(ranges: list[tuple[int, int]]) -> np.ndarray:
    return np.concatenate([np.arange(first, last) for first, last in ranges])
