import contextlib
import dataclasses
import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.errors import UserError
from dtrain.evaluation.metrics.statistics import Moments, Statistics, load, merge, moments, read, save
from tests.ranks import run_ranks

D = 5


def features(n: int, offset: float = 0.0, seed: int = 0, dimensions: int = D) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dimensions)) @ rng.normal(size=(dimensions, dimensions)) + offset


def assert_equals_numpy(found: Statistics, x: np.ndarray) -> None:
    """Within 1e-12 of numpy.mean and numpy.cov, relative to the largest entry."""
    mean, cov = x.mean(0), np.cov(x, rowvar=False)
    assert found.count == len(x)
    assert found.mean.dtype == found.cov.dtype == np.float64
    assert abs(found.mean - mean).max() <= 1e-12 * abs(mean).max()
    assert abs(found.cov - cov).max() <= 1e-12 * abs(cov).max()


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda sizes: sum(sizes) >= 2),
    st.sampled_from([0.0, 1.0, -1e4, 1e4]),
)
def test_moments_equal_numpy_for_every_split_into_batches(sizes, offset):
    x = features(sum(sizes), offset)
    metric = Moments(D)
    for batch in np.split(x, np.cumsum(sizes)[:-1]):
        metric.update(torch.from_numpy(batch))
    assert_equals_numpy(metric.compute(), x)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=8).filter(lambda sizes: sum(sizes) >= 2),
    st.randoms(use_true_random=False),
)
def test_moments_equal_numpy_for_every_order_of_merging(sizes, random):
    x = features(sum(sizes), offset=1e4)
    parts = [moments(torch.from_numpy(batch)) for batch in np.split(x, np.cumsum(sizes)[:-1])]
    while len(parts) > 1:
        a, b = (parts.pop(random.randrange(len(parts))) for _ in range(2))
        parts.append(merge(a, b))
    count, mean, scatter = parts[0]
    assert_equals_numpy(Statistics(int(count), mean.numpy(), (scatter / (count - 1)).numpy()), x)


def test_one_sample_at_a_time_far_from_zero_equals_numpy():
    x = features(3000, offset=1e4)
    metric = Moments(D)
    for row in torch.from_numpy(x):
        metric.update(row[None])
    assert_equals_numpy(metric.compute(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_of_lower_precision_are_summed_in_float64(dtype):
    x = torch.from_numpy(features(4000, offset=3.0)).to(dtype)
    metric = Moments(D)
    for batch in x.split(77):
        metric.update(batch)
    assert_equals_numpy(metric.compute(), x.double().numpy())


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.float(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.set_dtype(torch.float32),
        lambda m: torch.nn.ModuleList([m]).half()[0],
    ],
)
def test_no_cast_of_the_module_costs_precision(cast):
    x = features(100)
    metric = Moments(D)
    metric.update(torch.from_numpy(x[:50]))
    metric = cast(metric)
    metric.update(torch.from_numpy(x[50:]))
    assert_equals_numpy(metric.compute(), x)
    metric.reset()
    metric.update(torch.from_numpy(x))
    assert_equals_numpy(metric.compute(), x)


def test_the_torchmetrics_interface_holds():
    """Calling the metric gives the batch's value and accumulates; states merge, reset and pickle."""
    x = features(60, offset=100)
    first, second = torch.from_numpy(x[:20]), torch.from_numpy(x[20:])
    metric, other = Moments(D), Moments(D)
    assert_equals_numpy(metric(first), x[:20])
    assert_equals_numpy(metric(second), x[20:])
    assert_equals_numpy(metric.compute(), x)
    metric.reset()
    metric.update(first)
    other.update(second)
    metric.compute()
    metric.merge_state(other)
    assert_equals_numpy(metric.compute(), x)
    stored = io.BytesIO()
    torch.save(metric, stored)
    stored.seek(0)
    assert_equals_numpy(torch.load(stored, weights_only=False).compute(), x)
    with pytest.raises(dataclasses.FrozenInstanceError):
        metric.compute().count = 3


def test_fewer_than_two_samples_have_no_covariance():
    metric = Moments(D)
    for count in (0, 1):
        with pytest.raises(UserError, match=f"at least 2 images, and there are {count}"):
            metric.compute()
        metric.update(torch.ones(1, D))


def test_features_of_another_dimension_are_refused():
    with pytest.raises(ValueError, match=r"\(N, 5\) expected, got \(3, 4\)"):
        Moments(D).update(torch.ones(3, 4))


def _share(shares, batch):
    """This rank's update with its share and the joint result; and again after more samples on rank 0 alone."""
    x = torch.from_numpy(features(sum(shares), offset=1e4))
    rank = torch.distributed.get_rank()
    warnings.simplefilter("error", UserWarning)
    metric = Moments(D)
    for part in x[sum(shares[:rank]) : sum(shares[: rank + 1])].split(batch):
        if len(part):
            metric.update(part)
    first, own = metric.compute(), int(metric.count)
    if rank == 0:
        metric.update(torch.from_numpy(features(9, seed=1)))
    return first, own, metric.compute()


@pytest.mark.parametrize(
    "shares", [(30,), (17, 13), (0, 30), (30, 0), (1, 1), (11, 2, 0, 40), (0, 0, 1, 1), (0, 0, 0, 300)], ids=str
)
def test_ranks_with_ragged_and_empty_shares_agree_with_numpy_on_all_samples(shares):
    x = features(sum(shares), offset=1e4)
    results = run_ranks(_share, len(shares), shares, 7)
    for (first, own, second), share in zip(results, shares, strict=True):
        assert_equals_numpy(first, x)
        assert own == share  # what a rank goes on accumulating is its own
        assert_equals_numpy(second, np.concatenate([x, features(9, seed=1)]))
        assert np.array_equal(first.cov, results[0][0].cov)
        assert np.array_equal(first.mean, results[0][0].mean)


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
