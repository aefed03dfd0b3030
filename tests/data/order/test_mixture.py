"""Mixing by weight: quotas, positions against a walk through the run, and batches that know no world size."""

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st

from dtrain.data import stream
from dtrain.data.order.mixture import BLOCK, Mixture, of_run, quotas
from dtrain.data.order.order import Order
from dtrain.data.shards.manifest import load_all
from dtrain.data.stream import StepDataset
from dtrain.errors import UserError
from tests.data.shard_files import configuration, data_set, labelled_pictures, picture

weights = st.lists(st.floats(0.05, 20), min_size=1, max_size=5)


def mixed_or_refused(seed, orders, given_weights) -> Mixture:
    """The mixture; of weights that leave a source less than one image in a block there is none, which must be said."""
    if quotas(given_weights).min() < 1:
        with pytest.raises(ValueError, match="gives less than one of 1024 images"):
            Mixture(seed, orders, given_weights)
        reject()
    return Mixture(seed, orders, given_weights)


@settings(max_examples=100, deadline=None)
@given(weights)
def test_quotas_are_whole_numbers_nearest_to_the_weights(given_weights):
    found = quotas(given_weights)
    assert found.sum() == BLOCK
    assert np.abs(found - np.array(given_weights) / sum(given_weights) * BLOCK).max() < 1


@settings(max_examples=30, deadline=None)
@given(weights, st.integers(0, 2**40), st.integers(0, 3000))
@example([16.0, 16.0, 16.0, 16.0, 0.05], 0, 0)
def test_every_source_is_walked_in_its_own_order_without_a_gap(given_weights, seed, images):
    """Against counting through the run from its beginning."""
    orders = [Order(seed + n, [50 + n, 20], 3, 7) for n in range(len(given_weights))]
    mixture = mixed_or_refused(seed, orders, given_weights)
    source, number = mixture.locate(np.arange(images))
    seen = Counter()
    for s, n in zip(source.tolist(), number.tolist(), strict=True):
        assert n == seen[s]
        seen[s] += 1
    assert mixture.counts(images) == [seen[s] for s in range(len(orders))]
    for block in range(images // BLOCK):
        counts = np.bincount(source[block * BLOCK : (block + 1) * BLOCK], minlength=len(orders))
        assert counts.tolist() == quotas(given_weights).tolist()


@settings(max_examples=30, deadline=None)
@given(weights, st.integers(0, 10**12), st.integers(1, 8), st.integers(1, 20))
def test_ranks_cut_every_batch_into_equal_parts_of_neighbours(given_weights, first, world_size, rows):
    orders = [Order(n, [50, 20], 3, 7) for n in range(len(given_weights))]
    mixture = mixed_or_refused(3, orders, given_weights)
    batch = world_size * rows
    parts = [mixture.rows(first, batch, rank, world_size) for rank in range(world_size)]
    assert sorted(np.concatenate(parts).tolist()) == list(range(first, first + batch))
    source, number = mixture.locate(np.concatenate(parts))
    assert sorted(zip(source, number % 3, strict=True)) == list(zip(source, number % 3, strict=True))


def test_one_source_has_its_own_order():
    order = Order(7, [30, 12], 4, 6)
    k = np.arange(500)
    assert np.array_equal(Mixture(7, [order], [2.5]).samples(k)[1], order.sample(k))


@pytest.fixture
def mixed(tmp_path):
    data_set(tmp_path / "a", labelled_pictures(50))
    data_set(tmp_path / "b", [{"png": picture(1000 + i), "cls": b"2"} for i in range(30)])
    return tmp_path


def config_of(mixed, batch_size=16, weight=1.0):
    source = {"name": "b", "shards": str(mixed / "b"), "weight": weight}
    return configuration(mixed / "a", batch_size, weight=3.0, mix=[source], streams=2, shuffle_window=9)


def test_batches_of_a_mixture_do_not_depend_on_the_world_size_or_batch_size(mixed):
    seen = []
    for world_size, batch_size in ((1, 16), (2, 32), (4, 48)):
        config = config_of(mixed, batch_size)
        rows = {}
        for rank in range(world_size):
            dataset = StepDataset(config, load_all(config.data), rank, world_size, 0)
            for step in range(96 // batch_size):
                batch = dataset[step]
                rows |= {
                    int(k): (batch["image"][n].numpy().tobytes(), int(batch["label"][n]))
                    for n, k in enumerate(batch["k"])
                }
        seen.append(rows)
    assert seen[0] == seen[1] == seen[2]
    mixture = of_run(config.data, config.run.seed, load_all(config.data))
    assert mixture.counts(BLOCK) == [768, 256]
    assert {label for _, label in seen[0].values()} == {0, 1, 2}


def test_the_hash_covers_every_source_and_tiny_weights_are_refused(mixed):
    config = config_of(mixed)
    both = load_all(config.data)
    assert both.hash != load_all(configuration(mixed / "a").data).hash
    with pytest.raises(UserError, match=r"data.mix: a source of weight 0.0001 gives less than one of 1024 images"):
        of_run(config_of(mixed, weight=0.0001).data, 0, both)


def test_counts_of_a_run_far_on_cost_nothing():
    mixture = Mixture(3, [Order(n, [50, 20], 3, 7) for n in range(2)], [1, 3])
    assert mixture.counts(BLOCK * 10**12) == [256 * 10**12, 768 * 10**12]


def test_sources_share_the_files_that_one_process_may_open(tmp_path, monkeypatch):
    monkeypatch.setattr(stream, "OPEN_SHARDS", 6)
    data_set(tmp_path / "a", labelled_pictures(40), 2)
    data_set(tmp_path / "b", labelled_pictures(40), 2)
    dataset = StepDataset(config_of(tmp_path, 80), load_all(config_of(tmp_path).data), 0, 1, 0)
    dataset[0]
    links = [os.path.realpath(link) for link in Path("/proc/self/fd").iterdir()]
    assert 2 <= len([link for link in links if link.startswith(str(tmp_path)) and link.endswith(".tar")]) <= 6
