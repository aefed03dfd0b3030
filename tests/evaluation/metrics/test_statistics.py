import contextlib

import numpy as np
import pytest

from dtrain.errors import UserError
from dtrain.evaluation.metrics.statistics import Statistics, load, read, save

D = 5


def features(n: int, offset: float = 0.0, seed: int = 0, dimensions: int = D) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dimensions)) @ rng.normal(size=(dimensions, dimensions)) + offset


def test_statistics_come_back_from_their_file_under_the_names_other_tools_use(tmp_path):
    x = features(50)
    saved = Statistics(50, x.mean(0), np.cov(x, rowvar=False))
    save(saved, tmp_path / "new" / "reference.npz", "ab" * 32)
    loaded = load(tmp_path / "new" / "reference.npz", "ab" * 32)
    assert loaded.count == 50
    assert np.array_equal(loaded.mean, saved.mean)
    assert np.array_equal(loaded.cov, saved.cov)
    with np.load(tmp_path / "new" / "reference.npz") as f:
        assert np.array_equal(f["mu"], saved.mean)
        assert np.array_equal(f["sigma"], saved.cov)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["reference.npz"]


def test_statistics_of_something_else_are_refused(tmp_path):
    save(Statistics(3, np.zeros(2), np.eye(2)), tmp_path / "r.npz", "ab" * 32)
    with pytest.raises(
        UserError, match=r"r\.npz holds the statistics of other .* \(fingerprint abababababab, not cdcdcd"
    ):
        load(tmp_path / "r.npz", "cd" * 32)


def test_a_damaged_statistics_file_is_refused_wherever_it_is_damaged(tmp_path):
    path = tmp_path / "r.npz"
    save(Statistics(3, np.zeros(8), np.eye(8)), path, "ab" * 32)
    whole = path.read_bytes()
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="damaged or no statistics file"):
            load(path)
    at = whole.index(np.eye(8).tobytes()) + 100
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(UserError, match="damaged or no statistics file"):
        load(path)
    np.savez(path, other=np.zeros(3))
    with pytest.raises(UserError, match="damaged or no statistics file"):
        load(path)
    with pytest.raises(UserError, match="no statistics at"):
        load(tmp_path / "absent.npz")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(UserError, match="damaged or no statistics file"):
        load(tmp_path / "one.npy")
    np.savez_compressed(path, mu=np.zeros(8), sigma=np.eye(8))
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        with contextlib.suppress(UserError):  # a bit of a date or a name is no damage to what is read
            load(path)


def _mirrored(cov):
    return np.tril(cov)


def _with_a_negative_variance(cov):
    return cov - 2 * cov[3, 3] * np.outer(np.eye(8)[3], np.eye(8)[3])


def _indefinite(cov):
    values, vectors = np.linalg.eigh(cov)
    return (vectors * np.where(np.arange(8) == 0, -1e-3 * values[-1], values)) @ vectors.T


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_mirrored, "it is not symmetric"),
        (_with_a_negative_variance, "it is not positive semi-definite"),
        (_indefinite, "it is not positive semi-definite"),
        (lambda cov: -cov, "it is not positive semi-definite"),
    ],
)
def test_a_sigma_that_is_no_covariance_is_refused_in_one_line(tmp_path, spoil, message):
    cov = np.cov(features(50, dimensions=8), rowvar=False)
    np.savez(tmp_path / "r.npz", mu=np.zeros(8), sigma=spoil(cov))
    with pytest.raises(UserError, match=rf"^sigma in .*r\.npz is no covariance: {message}; name another file") as error:
        read(tmp_path / "r.npz")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dimensions", [8, 300])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_covariance_of_too_few_samples_or_in_single_precision_is_one(tmp_path, dimensions, dtype):
    """50 features of 300 dimensions, means far from zero: 251 eigenvalues are rounding errors around 0."""
    cov = np.cov(features(50, offset=100.0, dimensions=dimensions), rowvar=False).astype(dtype)
    np.savez(tmp_path / "r.npz", mu=np.zeros(dimensions), sigma=cov)
    assert np.array_equal(read(tmp_path / "r.npz").statistics.cov, cov)
    np.savez(tmp_path / "r.npz", mu=np.zeros(dimensions), sigma=np.zeros_like(cov))
    assert not read(tmp_path / "r.npz").statistics.cov.any()


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(2, complex), "sigma": np.eye(2)},
        {"mu": np.zeros(2), "sigma": np.eye(2) + 1j},
        {"mu": np.array(["0", "1"]), "sigma": np.eye(2)},
        {"mu": np.zeros(2), "sigma": np.eye(2), "count": -3},
    ],
    ids=["complex mean", "complex covariance", "words", "negative count"],
)
def test_what_is_no_moment_of_real_numbers_is_refused(tmp_path, arrays):
    np.savez(tmp_path / "r.npz", **arrays)
    with pytest.raises(UserError, match="damaged or no statistics file"):
        read(tmp_path / "r.npz")
