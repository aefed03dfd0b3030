import numpy as np
import pytest
import scipy.linalg
import torch

from dtrain.evaluation.metrics.frechet import _congruent, frechet_distance
from dtrain.evaluation.metrics.statistics import Statistics


def statistics_of(x: np.ndarray) -> Statistics:
    return Statistics(len(x), x.mean(0), np.cov(x, rowvar=False))


def correlated(rng: np.random.Generator, n: int, dimensions: int) -> np.ndarray:
    mixing = rng.normal(size=(dimensions, dimensions)) / np.sqrt(dimensions)
    return rng.normal(size=(n, dimensions)) @ mixing + rng.normal(size=dimensions)


def rotation(rng: np.random.Generator, dimensions: int) -> np.ndarray:
    return np.linalg.qr(rng.normal(size=(dimensions, dimensions)))[0]


@pytest.mark.parametrize("turned", [False, True])
def test_commuting_gaussians_have_the_closed_form_distance(turned):
    """Σ (√λ₂ − √λ₁)² + 8·0.5² with λ₁ = 1..8 and λ₂ = 2..16."""
    q = rotation(np.random.default_rng(0), 8) if turned else np.eye(8)
    a = Statistics(10**6, np.zeros(8), q @ np.diag(np.arange(1.0, 9)) @ q.T)
    b = Statistics(10**6, q @ np.full(8, 0.5), q @ np.diag(np.arange(2.0, 17, 2)) @ q.T)
    assert frechet_distance(a, b) == pytest.approx(8.176623509137158, abs=1e-10)
    assert frechet_distance(b, a) == pytest.approx(8.176623509137158, abs=1e-10)


@pytest.mark.parametrize("dimensions", [2, 16, 64])
def test_agrees_with_the_matrix_root_and_other_libraries_on_the_same_features(dimensions):
    from cleanfid.fid import frechet_distance as cleanfid
    from torch_fidelity.metric_fid import fid_statistics_to_metric
    from torchmetrics.image.fid import FrechetInceptionDistance

    rng = np.random.default_rng(dimensions)
    x, y = correlated(rng, 50 * dimensions, dimensions), correlated(rng, 60 * dimensions, dimensions)
    a, b = statistics_of(x), statistics_of(y)
    ours = frechet_distance(a, b)

    # pytorch-fid's formula
    root = scipy.linalg.sqrtm(a.cov @ b.cov).real
    by_root = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov) - 2 * np.trace(root)
    assert ours == pytest.approx(by_root, rel=1e-9)

    class Identity(torch.nn.Module):
        num_features = dimensions

        def forward(self, features):
            return features

    torchmetric = FrechetInceptionDistance(feature=Identity(), normalize=False).set_dtype(torch.float64)
    torchmetric.update(torch.from_numpy(x), real=True)
    torchmetric.update(torch.from_numpy(y), real=False)
    assert ours == pytest.approx(torchmetric.compute().item(), rel=1e-9)

    assert ours == pytest.approx(cleanfid(a.mean, a.cov, b.mean, b.cov), rel=1e-6)
    theirs = fid_statistics_to_metric({"mu": a.mean, "sigma": a.cov}, {"mu": b.mean, "sigma": b.cov}, verbose=False)
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)


def test_two_samples_of_one_gaussian_are_as_far_apart_as_the_bias_formula_says():
    dimensions, n, m, repeats = 8, 1000, 2000, 60
    rng = np.random.default_rng(1)

    def unit_gaussian(count: int) -> Statistics:
        return statistics_of(rng.normal(size=(count, dimensions)))

    distances = [frechet_distance(unit_gaussian(n), unit_gaussian(m)) for _ in range(repeats)]
    expected = dimensions * (dimensions + 5) / 4 * (1 / n + 1 / m)
    assert abs(np.mean(distances) - expected) < 4 * np.std(distances) / np.sqrt(repeats)
    assert np.std(distances) / np.sqrt(repeats) < 0.05 * expected  # so that the line above can fail


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("n", "dimensions"), [(500, 40), (30, 80), (2, 10)])
def test_identical_sets_are_at_distance_zero(n, dimensions, scale):
    s = statistics_of(scale * correlated(np.random.default_rng(2), n, dimensions))
    assert 0 <= frechet_distance(s, s) <= 1e-12 * np.trace(s.cov)


def test_fewer_samples_than_dimensions_give_the_distance_within_their_span():
    """Embedded in a larger space by an isometry, samples keep their distance, and their covariance becomes singular."""
    rng = np.random.default_rng(3)
    x, y = correlated(rng, 400, 12), correlated(rng, 300, 12)
    isometry = rotation(rng, 60)[:12]
    inside = frechet_distance(statistics_of(x), statistics_of(y))
    assert frechet_distance(statistics_of(x @ isometry), statistics_of(y @ isometry)) == pytest.approx(inside, rel=1e-9)
    # N < D on both sides, in different subspaces: tr (ab)^½ is the nuclear norm of the centred samples' products
    x, y = rng.normal(size=(20, 50)), rng.normal(size=(30, 50))
    a, b = statistics_of(x), statistics_of(y)
    cross = (x - x.mean(0)) @ (y - y.mean(0)).T / np.sqrt(19 * 29)
    by_samples = np.sum((a.mean - b.mean) ** 2) + np.trace(a.cov) + np.trace(b.cov)
    by_samples -= 2 * np.linalg.svd(cross, compute_uv=False).sum()
    assert frechet_distance(a, b) == pytest.approx(by_samples, rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(by_samples, rel=1e-9)
    # and one of them of full rank, where the product's eigenvalues are known from the smaller side too
    full = statistics_of(rng.normal(size=(500, 50)))
    spread = (x - x.mean(0)) @ full.cov @ (x - x.mean(0)).T / 19
    mixed = np.sum((a.mean - full.mean) ** 2) + np.trace(a.cov) + np.trace(full.cov)
    mixed -= 2 * np.sqrt(np.linalg.eigvalsh(spread)[1:]).sum()  # centring takes one dimension
    assert frechet_distance(a, full) == pytest.approx(mixed, rel=1e-9)
    assert frechet_distance(full, a) == pytest.approx(mixed, rel=1e-9)


def test_a_constant_feature_adds_its_shift_and_the_other_sides_variance():
    rng = np.random.default_rng(4)
    x, y = correlated(rng, 500, 6), correlated(rng, 500, 6)
    without = frechet_distance(statistics_of(x), statistics_of(y))
    constant_in_both = frechet_distance(
        statistics_of(np.insert(x, 3, 5.0, axis=1)), statistics_of(np.insert(y, 3, 2.0, axis=1))
    )
    assert constant_in_both == pytest.approx(without + 9.0, rel=1e-9)
    independent = rng.normal(size=500)
    others = np.c_[y, np.ones(500)]
    independent -= others @ np.linalg.lstsq(others, independent, rcond=None)[0]  # exactly uncorrelated with y
    constant_in_one = frechet_distance(
        statistics_of(np.insert(x, 3, 0.0, axis=1)), statistics_of(np.insert(y, 3, independent, axis=1))
    )
    assert constant_in_one == pytest.approx(without + independent.var(ddof=1), rel=1e-9)
    nothing_varies, all_vary = Statistics(9, np.zeros(3), np.zeros((3, 3))), Statistics(9, np.ones(3), np.eye(3))
    assert frechet_distance(nothing_varies, all_vary) == pytest.approx(6.0, rel=1e-12)
    assert frechet_distance(all_vary, nothing_varies) == pytest.approx(6.0, rel=1e-12)
    assert frechet_distance(nothing_varies, nothing_varies) == 0.0


@pytest.mark.parametrize("condition", [1e6, 1e10, 1e14, 1e18])
def test_ill_conditioned_covariances_lose_no_more_than_rounding(condition):
    """Commuting covariances whose spectra run in opposite directions, where the closed form is known."""
    rng = np.random.default_rng(5)
    q = rotation(rng, 30)
    spectrum = np.geomspace(1, 1 / condition, 30)
    a = Statistics(100, np.zeros(30), q @ np.diag(spectrum) @ q.T)
    for other in (spectrum, 2 * spectrum, spectrum[::-1]):
        b = Statistics(100, np.zeros(30), q @ np.diag(other) @ q.T)
        expected = np.sum((np.sqrt(spectrum) - np.sqrt(other)) ** 2)
        assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6 * np.trace(a.cov))


def test_moments_that_cannot_be_compared_are_refused():
    a = Statistics(9, np.zeros(3), np.eye(3))
    with pytest.raises(ValueError, match="3 and of 2 dimensions"):
        frechet_distance(a, Statistics(9, np.zeros(2), np.eye(2)))
    with pytest.raises(ValueError, match="non-finite"):
        frechet_distance(a, Statistics(9, np.full(3, np.nan), np.eye(3)))


def test_the_congruent_matrix_is_right_for_triangular_square_and_narrow_factors():
    rng = np.random.default_rng(6)
    square, b = rng.normal(size=(7, 7)), statistics_of(rng.normal(size=(20, 7))).cov
    for factor in (square, np.tril(square), np.tril(square)[rng.permutation(7)], square[:, :3]):
        np.testing.assert_allclose(np.tril(_congruent(factor, b)), np.tril(factor.T @ b @ factor), atol=1e-12)
