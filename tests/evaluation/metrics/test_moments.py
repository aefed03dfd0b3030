import dataclasses
import io
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.errors import UserError
from dtrain.evaluation.metrics.moments import AT_A_TIME, LEAF, Moments, MomentStream, statistics_of
from dtrain.evaluation.metrics.statistics import Statistics
from dtrain.evaluation.metrics.torchmetric import FeatureStatistics
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
    stream = MomentStream(D)
    for batch in np.split(x, np.cumsum(sizes)[:-1]):
        stream.update(torch.from_numpy(batch))
    assert_equals_numpy(stream.compute(), x)


@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("batch", [1, 250, AT_A_TIME, AT_A_TIME + 1, 2 * AT_A_TIME + 7])
def test_moments_equal_numpy_whatever_the_batches_are_beside_the_rows_joined_at_a_time(batch, offset):
    x = features(3 * AT_A_TIME + 5, offset)
    stream = MomentStream(D)
    for number, part in enumerate(torch.from_numpy(x).split(batch)):
        stream.update(part)
        assert stream.count == min(len(x), (number + 1) * batch)
    assert_equals_numpy(stream.compute(), x)
    assert_equals_numpy(statistics_of(torch.from_numpy(x)), x)


@pytest.mark.parametrize("dimensions", [1, LEAF, LEAF + 1, 3 * LEAF + 5])
def test_moments_of_many_dimensions_equal_numpy_and_are_symmetric(dimensions):
    """Above LEAF the scatter is made and mirrored by halves."""
    rng = np.random.default_rng(dimensions)
    x = rng.normal(size=(1500, dimensions)) * rng.uniform(0.1, 3, dimensions) + 10 * rng.normal(size=dimensions)
    stream = MomentStream(dimensions)
    for part in torch.from_numpy(x).split(400):
        stream.update(part)
    found = stream.compute()
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=0, atol=1e-12 * abs(x.mean(0)).max())
    np.testing.assert_allclose(found.cov, np.cov(x, rowvar=False), rtol=0, atol=1e-12 * np.cov(x, rowvar=False).max())
    assert np.array_equal(found.cov, found.cov.T)


def test_statistics_do_not_move_when_more_samples_come():
    x = torch.from_numpy(features(60))
    stream = MomentStream(D)
    stream.update(x[:20])
    first = stream.compute()
    stream.update(x[20:])
    stream.compute()
    assert_equals_numpy(first, x[:20].numpy())


def own(x: torch.Tensor) -> Moments:
    stream = MomentStream(x.shape[1])
    stream.update(x)
    return stream.joined()


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=8).filter(lambda sizes: sum(sizes) >= 2),
    st.randoms(use_true_random=False),
)
def test_moments_equal_numpy_for_every_order_of_merging(sizes, random):
    x = features(sum(sizes), offset=1e4)
    parts = [own(torch.from_numpy(batch)) for batch in np.split(x, np.cumsum(sizes)[:-1])]
    while len(parts) > 1:
        a, b = (parts.pop(random.randrange(len(parts))) for _ in range(2))
        a.join(b)
        parts.append(a)
    assert_equals_numpy(parts[0].statistics(), x)


def test_one_sample_at_a_time_far_from_zero_equals_numpy():
    """Each joined by itself, as an object that is updated once a sample would do it."""
    x = features(3000, offset=1e4)
    found = Moments.empty(D)
    for row in torch.from_numpy(x):
        found.take(torch.stack([row, row]), 1)
    assert_equals_numpy(found.statistics(), x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_features_of_lower_precision_are_summed_in_float64(dtype):
    x = torch.from_numpy(features(4000, offset=3.0)).to(dtype)
    stream = MomentStream(D)
    for batch in x.split(77):
        stream.update(batch)
    assert_equals_numpy(stream.compute(), x.double().numpy())


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
    metric = FeatureStatistics(D)
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
    metric, other = FeatureStatistics(D), FeatureStatistics(D)
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


KINDS = [MomentStream, FeatureStatistics]


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_than_two_samples_have_no_covariance(kind):
    metric = kind(D)
    for count in (0, 1):
        with pytest.raises(UserError, match=f"at least 2 images, and there are {count}"):
            metric.compute()
        metric.update(torch.ones(1, D))


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_another_dimension_are_refused(kind):
    with pytest.raises(ValueError, match=r"\(N, 5\) expected, got \(3, 4\)"):
        kind(D).update(torch.ones(3, 4))


def _share(kind, shares, batch):
    """This rank's update with its share and the joint result; and again after more samples on rank 0 alone."""
    x = torch.from_numpy(features(sum(shares), offset=1e4))
    rank = torch.distributed.get_rank()
    warnings.simplefilter("error", UserWarning)
    metric = kind(D)
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
@pytest.mark.parametrize("kind", KINDS)
def test_ranks_with_ragged_and_empty_shares_agree_with_numpy_on_all_samples(kind, shares):
    x = features(sum(shares), offset=1e4)
    results = run_ranks(_share, len(shares), kind, shares, 7)
    for (first, own, second), share in zip(results, shares, strict=True):
        assert_equals_numpy(first, x)
        assert own == share  # what a rank goes on accumulating is its own
        assert_equals_numpy(second, np.concatenate([x, features(9, seed=1)]))
        assert np.array_equal(first.cov, results[0][0].cov)
        assert np.array_equal(first.mean, results[0][0].mean)
