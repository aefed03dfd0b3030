"""Images that a run leaves out: ranges of k that training could do nothing with.

The run's images are then all but these, in their order, so a batch is still a pure function: of the images seen and of
the ranges, which checkpoints hold. World size, batch size and where a run was stopped do not enter.
"""

from collections.abc import Iterable

import numpy as np


class Skipped:
    """ranges: [first, last) of k, in any order, overlapping or not; held merged and sorted."""

    def __init__(self, ranges: Iterable[Iterable[int]] = ()):
        self.ranges: list[tuple[int, int]] = []
        for first, last in sorted((int(a), int(b)) for a, b in ranges):
            if self.ranges and first <= self.ranges[-1][1]:
                first, last = self.ranges[-1][0], max(last, self.ranges.pop()[1])
            self.ranges.append((first, last))
        bounds = np.array(self.ranges, dtype=np.int64).reshape(-1, 2)
        self._first, self._last = bounds.T
        self._gone = np.concatenate([[0], np.cumsum(self._last - self._first)])  # images left out before each range

    def ordinal(self, k: np.ndarray) -> np.ndarray:
        """How many images before k are kept, for each k (n,) int64."""
        k = np.asarray(k, dtype=np.int64)
        begun = np.searchsorted(self._first, k, side="right")  # ranges that begin at or below k
        inside = np.maximum(np.append(self._last, 0)[begun - 1] - k, 0) if self.ranges else 0
        return k - self._gone[begun] + inside * (begun > 0)

    def kept(self, first: int, count: int) -> np.ndarray:
        """k of the next `count` images that are kept, from k = `first` on: (count,) int64."""
        return self.at(int(self.ordinal(first)), count)

    def at(self, ordinal: int, count: int) -> np.ndarray:
        """k of the images kept whose ordinals are `ordinal`, …, `ordinal + count − 1`: (count,) int64."""
        ordinals = ordinal + np.arange(count, dtype=np.int64)
        return ordinals + self._gone[np.searchsorted(self._first - self._gone[:-1], ordinals, side="right")]

    def between(self, first: int, last: int) -> list[tuple[int, int]]:
        """What is kept of the images [first, last): ranges that are not empty."""
        found = []
        for a, b in [*self.ranges, (last, last)]:
            if first < min(a, last):
                found.append((first, min(a, last)))
            first = max(first, b)
        return found


NOTHING = Skipped()
