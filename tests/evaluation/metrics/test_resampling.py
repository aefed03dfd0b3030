"""The metrics that need every feature, and seeded subsets of them."""

import math

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.evaluation.metrics import neighbours
from dtrain.evaluation.metrics.frechet import bootstrap_interval, fd_infinity, frechet_distance
from dtrain.evaluation.metrics.inception_score import inception_score
from dtrain.evaluation.metrics.kernel import kernel_distance, squared_mmd
from dtrain.evaluation.metrics.moments import statistics_of
from dtrain.evaluation.metrics.neighbours import density_and_coverage, precision_and_recall, radii
from dtrain.evaluation.metrics.statistics import Statistics
from dtrain.evaluation.metrics.subsets import KERNEL_REFERENCE, KERNEL_SAMPLES, Subsets
from tests.ranks import run_ranks


def normals(n: int, dimensions: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(shift + scale * rng.normal(size=(n, dimensions))).float()


@pytest.mark.parametrize(
    ("n", "m", "subsets", "size"),
    [
        (400, 300, 20, 100),  # each pair of rows once
        (400, 300, 4, 100),  # the pairs of each subset
        (1100, 700, 30, 600),  # more rows than a tile has, of subsets
        (600, 1300, 1, 520),  # and of one subset
    ],
)
def test_kernel_distance_equals_torch_fidelity_on_the_same_subsets(n, m, subsets, size):
    from torch_fidelity.metric_kid import kernel_mmd

    x, y = normals(n, 24, 0), normals(m, 24, 1, shift=0.3)
    ours = kernel_distance(x, y, seed=7, subsets=subsets, subset_size=size)
    drawn = Subsets(7)
    theirs = []
    for i in range(subsets):
        rows_x = drawn.choose(n, size, i, KERNEL_SAMPLES)
        rows_y = drawn.choose(m, size, i, KERNEL_REFERENCE)
        assert len(set(rows_x.tolist())) == len(set(rows_y.tolist())) == size
        theirs.append(kernel_mmd(x[rows_x].double().numpy(), y[rows_y].double().numpy()))
    assert ours.mean == pytest.approx(np.mean(theirs), rel=1e-11)
    assert ours.std == pytest.approx(np.std(theirs), rel=1e-9, abs=1e-15)


def test_kernel_distance_of_everything_equals_torch_fidelitys_own():
    """A subset of everything is the same one in any order, so here their own function has the same subset too."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    x, y = normals(300, 24, 0), normals(300, 24, 1, shift=0.3)
    whole = kid_features_to_metric(
        x.double(), y.double(), kid_subsets=1, kid_subset_size=300, rng_seed=0, verbose=False
    )[KEY_METRIC_KID_MEAN]
    assert kernel_distance(x, y, 7, subsets=1).mean == pytest.approx(whole, rel=1e-11)


def test_the_kernel_estimate_is_unbiased_and_its_subsets_come_from_the_seed():
    """Over pairs of samples of one distribution the mean is 0, whatever their count; a biased estimate is 0.1 above."""
    values = [squared_mmd(normals(30, 4, 2 * i), normals(20, 4, 2 * i + 1)) for i in range(400)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(400)
    x, y = normals(60, 4, 0), normals(60, 4, 1)
    assert kernel_distance(x, y, 3, 10, 20) == kernel_distance(x, y, 3, 10, 20)
    assert kernel_distance(x, y, 3, 10, 20) != kernel_distance(x, y, 4, 10, 20)


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_precision_and_recall_equal_torch_fidelitys(offset):
    from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

    x, y = normals(700, 6, 0, scale=0.7).double() + offset, normals(500, 6, 1, shift=0.2).double() + offset
    theirs = prc_features_to_metric(x, y, verbose=False)
    precision, recall = precision_and_recall(x, y)
    assert precision == pytest.approx(theirs[KEY_METRIC_PRECISION], abs=1e-6)  # theirs is a float32 mean
    assert recall == pytest.approx(theirs[KEY_METRIC_RECALL], abs=1e-6)
    assert 0.2 < recall < precision < 1  # so that neither is trivially right
    assert precision_and_recall(x.float(), y.float()) == pytest.approx((precision, recall), abs=0.005)


def test_density_and_coverage_are_what_brute_force_counts(monkeypatch):
    """In tiles that divide neither set."""
    monkeypatch.setattr(neighbours, "ROWS", 64)
    monkeypatch.setattr(neighbours, "COLUMNS", 100)
    x, y = normals(430, 3, 0, scale=0.7).double() + 50, normals(310, 3, 1).double() + 50
    distances, between = torch.cdist(y - 50, y - 50).numpy(), torch.cdist(x - 50, y - 50).numpy()
    reach = np.sort(distances, axis=1)[:, 5]  # itself is the nearest
    counted = [[row[j] <= reach[j] for j in range(len(y))] for row in between]
    density, coverage = density_and_coverage(x, y)
    assert density == pytest.approx(sum(map(sum, counted)) / (5 * len(x)), abs=1e-12)
    assert coverage == pytest.approx(sum(map(any, zip(*counted, strict=True))) / len(y), abs=1e-12)
    assert 1 < density < 2  # as samples crowd in the middle
    assert coverage < 0.95


@pytest.mark.parametrize(("samples", "k"), [(40, 5), (40, 2), (15, 3)])
def test_samples_of_the_datas_own_law_have_density_1_and_the_coverage_of_order_statistics(samples, k):
    """Which of the nearest points of a real one are real is a draw without replacement, whatever the law."""
    found = np.array(
        [density_and_coverage(normals(samples, 2, 2 * i), normals(30, 2, 2 * i + 1), k) for i in range(400)]
    )
    expected = 1.0, 1 - math.prod((30 - i) / (30 + samples - i) for i in range(1, k + 1))
    assert np.all(np.abs(found.mean(0) - expected) < 4 * found.std(0) / np.sqrt(len(found)))


def test_distances_are_made_in_tiles_of_bounded_memory(monkeypatch):
    """No tensor on the way is larger than a tile, and the tiles give the brute-force answer."""
    assert neighbours.ROWS * neighbours.COLUMNS * 4 <= 32 * 2**20  # bytes, at any number of samples
    monkeypatch.setattr(neighbours, "ROWS", 64)
    monkeypatch.setattr(neighbours, "COLUMNS", 100)

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.elements = max(self.elements, tensor.numel())
            return out

    x, y = normals(430, 3, 0).double(), normals(1010, 3, 1).double()
    with Largest() as largest:
        precision, recall = precision_and_recall(x, y)
    assert largest.elements <= 64 * (100 + 4) < len(x) * len(y) / 50

    def brute(points, centres):
        reach = torch.cdist(centres, centres).kthvalue(4).values
        return (torch.cdist(points, centres) <= reach).any(1).double().mean().item()

    assert (precision, recall) == (brute(x, y), brute(y, x))
    np.testing.assert_allclose(radii(x, 3), torch.cdist(x, x).kthvalue(4).values, rtol=1e-9)


def test_inception_score_equals_torch_fidelitys():
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

    logits = 3 * normals(205, 12, 0)
    theirs = isc_features_to_metric(logits, splits=10, shuffle=False)
    ours = inception_score(logits.double().softmax(1))
    assert ours.mean == pytest.approx(theirs[KEY_METRIC_ISC_MEAN], rel=1e-9)
    assert ours.std == pytest.approx(theirs[KEY_METRIC_ISC_STD], rel=1e-9)
    one_hot = torch.eye(5).repeat(20, 1)
    assert inception_score(one_hot).mean == pytest.approx(5.0)  # sure of each sample, all classes among them


def test_the_extrapolated_distance_recovers_the_truth_that_the_plain_one_misses():
    """Gaussians with known moments: at 8 samples a dimension the plain distance is 10 % and more too high."""
    dimensions, n = 32, 256
    truth = Statistics(10**9, np.full(dimensions, 0.5), 2.0 * np.eye(dimensions))
    expected = dimensions * (0.25 + (np.sqrt(2) - 1) ** 2)
    found = [(fd_infinity(x, truth, 0), frechet_distance(statistics_of(x), truth)) for x in samples(n, dimensions)[:15]]
    extrapolated = np.mean([e.value for e, _ in found])
    plain = np.mean([p for _, p in found])
    assert plain > 1.1 * expected
    assert extrapolated == pytest.approx(expected, rel=0.03)
    larger = normals(5000, dimensions, 99)
    single = fd_infinity(larger, truth, 0)
    assert single.value == pytest.approx(expected, rel=0.03)
    assert 0 < single.error < 0.03 * expected


def samples(n: int, dimensions: int) -> list[torch.Tensor]:
    return [normals(n, dimensions, seed) for seed in range(40)]


def test_the_bootstrap_interval_is_as_wide_as_the_spread_of_independent_samples():
    dimensions, n = 8, 400
    truth = Statistics(10**9, np.full(dimensions, 0.5), np.eye(dimensions))
    values = [frechet_distance(statistics_of(x), truth) for x in samples(n, dimensions)]
    x = normals(n, dimensions, 0)
    low, high = bootstrap_interval(x, truth, seed=0, resamplings=60, value=values[0])
    assert (low + high) / 2 == pytest.approx(values[0])
    assert (high - low) / 2 == pytest.approx(1.96 * np.std(values), rel=0.4)


def _gather(blocks: dict[int, list[int]]) -> torch.Tensor | None:
    from dtrain.evaluation.metrics.kept import KeptFeatures

    kept = KeptFeatures(2)
    for number in blocks[torch.distributed.get_rank()]:
        rows = 3 if number < 4 else 1
        kept.update(number, torch.arange(number * 10, number * 10 + rows).double()[:, None].expand(-1, 2))
    found = kept.gather()
    return None if found is None else found[:, 0].tolist()


def test_kept_features_come_to_rank_0_in_the_order_of_their_blocks():
    expected = [10.0 * number + row for number in range(5) for row in range(3 if number < 4 else 1)]
    for blocks in ({0: [0, 1, 2, 3, 4]}, {0: [0, 2, 4], 1: [1, 3]}, {0: [], 1: [1, 4], 2: [0, 2, 3]}):
        found = run_ranks(_gather, len(blocks), blocks)
        assert found == [expected] + [None] * (len(blocks) - 1)
