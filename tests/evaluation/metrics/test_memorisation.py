"""Memorisation: the share of samples within the ball that a training image's nearest other one spans around it."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from dtrain.config import Eval
from dtrain.evaluation.embedding import of_training
from dtrain.evaluation.features.build import Pixels
from dtrain.evaluation.metrics import neighbours
from dtrain.evaluation.metrics.build import compute
from dtrain.evaluation.metrics.neighbours import memorisation
from tests.digits import tiny
from tests.ranks import run_ranks


def points(n, seed, dimensions=6):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((n, dimensions)))


def by_force(samples, training):
    """In NumPy, one sample at a time, by differences."""
    between = np.linalg.norm(training[:, None] - training[None], axis=2)
    np.fill_diagonal(between, np.inf)
    copies = 0
    for sample in samples:
        away = np.linalg.norm(training - sample, axis=1)
        copies += away.min() <= between[away.argmin()].min()
    return copies / len(samples)


@pytest.mark.parametrize("tile", [8, 10_000])
def test_it_is_what_brute_force_counts_in_tiles_of_any_size(tile, monkeypatch):
    monkeypatch.setattr(neighbours, "ROWS", tile)
    monkeypatch.setattr(neighbours, "COLUMNS", tile)
    training, samples = points(90, 0), points(130, 1)
    samples[:40] = training[:40] + 0.3 * samples[:40]
    found = memorisation(samples, training)
    assert found == by_force(samples.numpy(), training.numpy())
    assert 0.3 < found < 0.9


def test_copies_are_all_memorised_and_fresh_data_as_much_as_held_out_ones():
    training, held_out, fresh = points(2000, 0), points(2000, 1), points(2000, 2)
    assert memorisation(training[:500], training) == 1
    twice = torch.cat([training, training[:50]])
    assert memorisation(training[:50], twice) == 1
    assert memorisation(fresh, training) == pytest.approx(memorisation(held_out, training), abs=0.05)
    falls = [memorisation(training + width * fresh, training) for width in (0.01, 0.3, 1.0)]
    assert falls[0] == 1
    assert falls[0] > falls[1] > falls[2]


def test_beside_it_stands_what_the_held_out_images_have():
    training, held_out = points(100, 0), points(60, 1)
    found = compute(Eval(metrics=["memorisation"]), Pixels(8, 1), None, None, training, held_out, training)
    assert found == {
        "memorisation_pixels": 1.0,
        "memorisation_pixels_held_out": by_force(held_out.numpy(), training.numpy()),
    }


def _features(config):
    return of_training(config, Pixels(8, 1), torch.device("cpu"))


@pytest.mark.parametrize("flip", [False, True])
def test_training_images_are_the_first_of_the_shards_mirrored_too_where_the_run_flips(digits, tmp_path, flip):
    config = tiny(digits, tmp_path, "eval.training_images=1100", f"data.flip={str(flip).lower()}")
    alone, (first, second) = run_ranks(_features, 1, config)[0], run_ranks(_features, 2, config)
    assert second is None
    assert torch.equal(alone, first)
    assert alone.shape == (2200 if flip else 1100, 64)
    known = {tuple(row) for row in (load_digits().data * 255 / 16).round().astype(int)}
    levels = ((alone + 1) * 127.5).round().int().view(-1, 8, 8)
    plain = [tuple(row) for row in levels.flatten(1).tolist()]
    assert sum(row in known for row in plain[:512]) == 512
    if flip:
        assert torch.equal(levels[512:1024], levels[:512].flip(-1))
