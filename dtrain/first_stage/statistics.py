"""Mean and deviation of each channel of latents, in float64, exact whatever the order of shards was worked in."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ChannelStatistics:
    """Of `count` values a channel: their mean (C,), and the sum of squares about it (C,), float64.

    Values are posterior samples z = μ + σ · noise, over the noise as over pictures: Σ E(z − mean)² = Σ (μ − mean)² +
    Σ σ².
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, moments: np.ndarray) -> "ChannelStatistics":
        """Of the moments (mirrors, 2, C, h, w) of one picture."""
        mean, std = np.moveaxis(moments.astype(np.float64), 1, 0)  # (mirrors, C, h, w) each
        centre = mean.mean((0, 2, 3))
        squares = np.square(mean - centre[:, None, None]).sum((0, 2, 3)) + np.square(std).sum((0, 2, 3))
        return cls(mean.size // len(centre), centre, squares)

    def __add__(self, other: "ChannelStatistics") -> "ChannelStatistics":
        """Both together (Chan et al. 1979): the shift between the means comes on top, so that nothing cancels."""
        count, shift = self.count + other.count, other.mean - self.mean
        mean = self.mean + shift * (other.count / count)
        squares = self.squares + other.squares + np.square(shift) * (self.count * other.count / count)
        return ChannelStatistics(count, mean, squares)

    @property
    def deviation(self) -> np.ndarray:
        """(C,), of all values as a population."""
        return np.sqrt(self.squares / self.count)

    def as_plain(self) -> dict:
        return {"count": self.count, "mean": self.mean.tolist(), "squares": self.squares.tolist()}

    @classmethod
    def of_plain(cls, tree: dict) -> "ChannelStatistics":
        """Raises KeyError, TypeError and ValueError for what `as_plain` did not give."""
        return cls(int(tree["count"]), *(np.array(tree[key], dtype=np.float64) for key in ("mean", "squares")))
