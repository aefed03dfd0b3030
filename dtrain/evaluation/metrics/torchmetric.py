"""Moments of features as a torchmetrics metric, for programs whose own loops have such. No command needs it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dtrain.evaluation.metrics.moments import Moments, MomentStream
from dtrain.evaluation.metrics.statistics import Statistics


class FeatureStatistics(Metric):
    """Streaming moments of features (N, D), of this rank while updating and of all ranks in `compute`.

    States stay float64 whatever the module is cast to. A rank without samples needs no update. `compute` is collective,
    gives Statistics for `frechet_distance`, and raises SharedError below two samples.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, dimensions: int, **kwargs: Any):
        # No cache: a rank with an empty share would answer from it while the others wait for it in the collective.
        super().__init__(compute_with_cache=False, **kwargs)
        empty = Moments.empty(dimensions)
        self.add_state("count", torch.zeros((), dtype=torch.int64))
        self.add_state("mean", empty.mean)
        self.add_state("scatter", empty.scatter)

    def update(self, features: Tensor) -> None:
        """Take in features (N, D) of any dtype and device, N ≥ 0."""
        stream = MomentStream(len(self.mean), self.mean.device, self._moments())
        stream.update(features)
        self._set(stream.joined())

    def compute(self) -> Statistics:
        return self._moments().statistics()

    def _moments(self) -> Moments:
        return Moments(int(self.count), self.mean, self.scatter)

    def _set(self, moments: Moments) -> None:
        self.count = torch.tensor(moments.count, device=self.count.device)
        self.mean, self.scatter = moments.mean, moments.scatter

    # What torchmetrics does with the states. Each has to be joined knowing the others, which a `dist_reduce_fx` for one
    # state cannot; and gathering every rank's scatter would take R·D² numbers where sums over ranks take D².

    def _sync_dist(self, dist_sync_fn: Callable | None = None, process_group: Any = None) -> None:
        self._set(self._moments().over_ranks(process_group or self.process_group))

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        incoming = Moments(int(incoming_state["count"]), incoming_state["mean"], incoming_state["scatter"].clone())
        incoming.join(self._moments())
        self._set(incoming)

    def _apply(self, fn: Callable, exclude_state: Any = "") -> "FeatureStatistics":
        device = fn(torch.empty(0, device=self.mean.device)).device
        return super()._apply(lambda tensor: tensor.to(device), exclude_state)

    def _wrap_compute(self, compute: Callable) -> Callable:
        # torchmetrics searches the result for tensors and cannot rebuild a frozen dataclass: hide it in a function.
        def hidden() -> Callable[[], Statistics]:
            statistics = compute()
            return lambda: statistics

        wrapped = super()._wrap_compute(hidden)
        return lambda: wrapped()()

    @property
    def update_called(self) -> bool:
        """Always: an empty share is no mistake, and torchmetrics would warn of it."""
        return True
