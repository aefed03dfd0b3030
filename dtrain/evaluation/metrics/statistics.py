"""First and second moments of features: streamed in float64, joined over batches and ranks, kept in .npz files.

Moments are held as count n, mean μ and scatter S = Σ(x−μ)(x−μ)ᵀ and joined after Chan, Golub & LeVeque (1979),
"Updating formulae and a pairwise algorithm for computing sample variances". Sums of x and xxᵀ would cancel when means
are large.
"""

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

from dtrain.errors import SharedError, UserError
from dtrain.files import opener, replacing

# What numpy.load raises for damaged bytes; the header of an array is read as a piece of Python.
DAMAGES = (OSError, ValueError, KeyError, EOFError, SyntaxError, RuntimeError, TokenError, BadZipFile, zlib.error)

ROUNDING = 1e-6  # of a covariance's Frobenius norm: what other tools' single precision may leave

Triple = tuple[Tensor, Tensor, Tensor]  # count int64 (), mean float64 (D,), scatter float64 (D, D)


@dataclass(frozen=True)
class Statistics:
    """What the Fréchet distance needs to know of a set of features."""

    count: int
    mean: np.ndarray  # float64 (D,)
    cov: np.ndarray  # float64 (D, D), divisor N − 1 as in numpy.cov

    @property
    def dimensions(self) -> int:
        return len(self.mean)


class Moments(Metric):
    """Streaming moments of features, of this rank while updating and of all ranks in `compute`.

    States stay float64 whatever the module is cast to. A rank without samples needs no update. `compute` is collective.
    """

    full_state_update = False
    is_differentiable = False

    def __init__(self, dimensions: int, **kwargs: Any):
        # No cache: a rank with an empty share would answer from it while the others wait for it in the collective.
        super().__init__(compute_with_cache=False, **kwargs)
        self.add_state("count", torch.zeros((), dtype=torch.int64))
        self.add_state("mean", torch.zeros(dimensions, dtype=torch.float64))
        self.add_state("scatter", torch.zeros(dimensions, dimensions, dtype=torch.float64))

    def update(self, features: Tensor) -> None:
        """Take in features (N, D) of any dtype and device, N ≥ 0."""
        if features.ndim != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"features of shape (N, {len(self.mean)}) expected, got {tuple(features.shape)}")
        self._set(merge(self._triple(), moments(features.to(self.mean))))

    def compute(self) -> Statistics:
        """The joint Statistics of all ranks. Raises SharedError below two samples, which have no covariance."""
        count = int(self.count)
        if count < 2:
            raise SharedError(f"a covariance needs at least 2 images, and there are {count}; raise eval.num_samples")
        return Statistics(count, self.mean.cpu().numpy(), (self.scatter / (count - 1)).cpu().numpy())

    def _triple(self) -> Triple:
        return self.count, self.mean, self.scatter

    def _set(self, triple: Triple) -> None:
        self.count, self.mean, self.scatter = triple

    # What torchmetrics does with the states. Each has to be joined knowing the others, which a `dist_reduce_fx` for one
    # state cannot; and gathering every rank's scatter would take R·D² numbers where sums over ranks take D².

    def _sync_dist(self, dist_sync_fn: Callable | None = None, process_group: Any = None) -> None:
        self._set(merge_over_ranks(self._triple(), process_group or self.process_group))

    def _reduce_states(self, incoming_state: dict[str, Any]) -> None:
        self._set(merge((incoming_state["count"], incoming_state["mean"], incoming_state["scatter"]), self._triple()))

    def _apply(self, fn: Callable, exclude_state: Any = "") -> "Moments":
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


def moments(features: Tensor) -> Triple:
    """Count, mean and scatter of float64 features (N, D) in two passes; zeros for N = 0."""
    mean = features.mean(0) if len(features) else features.new_zeros(features.shape[1])
    centred = features - mean
    return torch.tensor(len(features), device=features.device), mean, centred.T @ centred


def merge(a: Triple, b: Triple) -> Triple:
    """The moments of two sets together (Chan et al. 1979); either may be empty."""
    (n_a, mean_a, scatter_a), (n_b, mean_b, scatter_b) = a, b
    n = n_a + n_b
    share = n_b / n.clamp(min=1).double()
    delta = mean_b - mean_a
    return n, mean_a + share * delta, scatter_a + scatter_b + n_a * share * torch.outer(delta, delta)


def merge_over_ranks(own: Triple, group: Any = None) -> Triple:
    """The moments of all ranks' sets together, the same on every rank. Collective: two sums over ranks."""
    n_r, mean_r, scatter_r = own
    sums = torch.cat([n_r.double().reshape(1), n_r * mean_r])
    dist.all_reduce(sums, group=group)
    n, mean = sums[0], sums[1:] / sums[0].clamp(min=1)
    delta = mean_r - mean
    scatter = scatter_r + n_r * torch.outer(delta, delta)
    dist.all_reduce(scatter, group=group)
    return n.long(), mean, scatter


def statistics_of(features: Tensor, rows: int = 8192) -> Statistics:
    """The Statistics of features (N, D), N ≥ 2, on one rank; float64 holds `rows` of them at a time."""
    total = moments(features[:0].double())
    for part in features.split(rows):
        total = merge(total, moments(part.double()))
    count, mean, scatter = total
    return Statistics(int(count), mean.cpu().numpy(), (scatter / (count - 1)).cpu().numpy())


def save(
    statistics: Statistics, path: str | Path, fingerprint: str, source: str = "", features: np.ndarray | None = None
) -> None:
    """Write an .npz, whole or not at all: `mu`, `sigma` (clean-fid's, pytorch-fid's, EDM's names), and what is ours:
    `count`, `fingerprint`, `source`, and the `features` (N, D) themselves where they are given.

    The fingerprint stands for the images and the features that these are the statistics of; source says which those
    were. Raises OSError.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as f:
        arrays = {"mu": statistics.mean, "sigma": statistics.cov, "count": statistics.count}
        if features is not None:
            arrays["features"] = features
        np.savez(f, **arrays, fingerprint=fingerprint, source=source)


@dataclass(frozen=True)
class Stored:
    """The contents of an .npz; in another tool's file count is 0, for unknown, and the rest is None."""

    statistics: Statistics
    fingerprint: str | None
    source: str | None


def read(path: str | Path) -> Stored:
    """Read what `save`, clean-fid, pytorch-fid or EDM wrote. Raises UserError for no such file or a damaged one."""
    try:
        with open(path, "rb", opener=opener) as file, np.load(file, allow_pickle=False) as f:
            mean, cov = f["mu"], f["sigma"]
            if {mean.dtype.kind, cov.dtype.kind} - set("fiu"):
                raise ValueError("mu and sigma are not real numbers")
            mean, cov = mean.astype(np.float64), cov.astype(np.float64)
            own = {key: f[key] for key in ("count", "fingerprint", "source") if key in f}
            if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
                raise ValueError(f"mu {mean.shape} and sigma {cov.shape} are no mean and covariance")
            if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
                raise ValueError("it holds non-finite values")
            fingerprint, source = (str(own[key]) if key in own else None for key in ("fingerprint", "source"))
            count = int(own.get("count", 0))
            if count < 0:
                raise ValueError("there cannot be fewer than no images")
    except FileNotFoundError:
        raise UserError(f"no statistics at {path}") from None
    except (*DAMAGES, TypeError, MemoryError):  # a TypeError: an .npy holds one array and no names
        raise UserError(
            f"{path} is damaged or no statistics file, an .npz of mu and sigma; name another, or delete it if "
            "`dtrain reference` made it"
        ) from None
    if problem := not_a_covariance(cov):
        raise UserError(f"sigma in {path} is no covariance: {problem}; name another file, or make it again")
    return Stored(Statistics(count, mean, cov), fingerprint, source)


def not_a_covariance(cov: np.ndarray) -> str | None:
    """Why a finite float64 matrix (D, D) is none, by more than single precision rounds; None where it may be one.

    Rounding PSD entries to float32 moves eigenvalues by at most 6e-8 of the Frobenius norm. Of a matrix that is not
    positive semi-definite the distance would be a number all the same.
    """
    rounding = ROUNDING * np.linalg.norm(cov)
    if np.abs(cov - cov.T).max(initial=0) > rounding:
        return "it is not symmetric"
    try:
        np.linalg.cholesky(cov + (rounding or 1.0) * np.eye(len(cov)))
    except np.linalg.LinAlgError:
        return "it is not positive semi-definite"
    return None


def load(path: str | Path, fingerprint: str | None = None) -> Statistics:
    """`read`, refusing with a UserError another fingerprint than the one wanted."""
    stored = read(path)
    if fingerprint is not None and stored.fingerprint != fingerprint:
        raise UserError(
            f"{path} holds the statistics of other images or features "
            f"(fingerprint {str(stored.fingerprint)[:12]}, not {fingerprint[:12]}); delete it to have it made again"
        )
    return stored.statistics
