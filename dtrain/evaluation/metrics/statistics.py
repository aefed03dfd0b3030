"""What a Fréchet distance knows of a set of features: count, mean and covariance, and the .npz files that keep them."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError
from zipfile import BadZipFile

import numpy as np

from dtrain.errors import UserError
from dtrain.files import opener, replacing

# What numpy.load raises for damaged bytes; the header of an array is read as a piece of Python.
DAMAGES = (OSError, ValueError, KeyError, EOFError, SyntaxError, RuntimeError, TokenError, BadZipFile, zlib.error)

ROUNDING = 1e-6  # of a covariance's Frobenius norm: what other tools' single precision may leave


@dataclass(frozen=True)
class Statistics:
    """What the Fréchet distance needs to know of a set of features."""

    count: int
    mean: np.ndarray  # float64 (D,)
    cov: np.ndarray  # float64 (D, D), divisor N − 1 as in numpy.cov

    @property
    def dimensions(self) -> int:
        return len(self.mean)


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
    more = {} if features is None else {"features": features}
    about = {"count": statistics.count, **more, "fingerprint": fingerprint, "source": source}
    with replacing(path) as f:
        np.savez(f, mu=statistics.mean, sigma=statistics.cov, **about)


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
