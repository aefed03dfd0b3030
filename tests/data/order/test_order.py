"""Every property the order claims (design, decision 1), against a scalar version written out again here."""

import itertools
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from dtrain.data.order.order import Order
from dtrain.data.order.streams import default_streams

shard_lists = st.lists(st.integers(1, 40), min_size=1, max_size=12)
seeds = st.integers(0, 2**63 - 1)


@st.composite
def orders(draw):
    """(seed, shard sizes, streams, window) with 1 ≤ V ≤ N and windows below, at and above L."""
    sizes = draw(shard_lists)
    streams = draw(st.integers(1, min(sum(sizes), 9)))
    return draw(seeds), sizes, streams, draw(st.integers(1, sum(sizes) // streams + 3))


def philox_words(seed: int, purpose: int, index: int, sub: int, size: int) -> list[int]:
    counter = np.array([0, index, sub, 0], dtype=np.uint64)
    key = np.array([seed, purpose], dtype=np.uint64)
    return np.random.Philox(counter=counter, key=key).random_raw(size).tolist()


def sample_by_hand(seed: int, sizes: list[int], streams: int, window: int, k: int) -> int:
    """The formula of the design for one k, in Python integers; purposes 1, 2, 3 are shards, rotation, windows."""
    total = sum(sizes)
    length = total // streams
    stream, q = k % streams, k // streams
    epoch, i = q // length, q % length
    w = i // window
    places = min(window, length - w * window)
    words = philox_words(seed, 3, epoch, stream * 2**32 + w, places)
    shuffled = w * window + sorted(range(places), key=words.__getitem__)[i - w * window]
    rotation = philox_words(seed, 2, epoch, 0, 1)[0] % total
    words = philox_words(seed, 1, epoch, 0, len(sizes))
    place = (stream * length + shuffled + rotation) % total
    for shard in sorted(range(len(sizes)), key=words.__getitem__):  # one after the other
        if place < sizes[shard]:
            return sum(sizes[:shard]) + place
        place -= sizes[shard]
    raise AssertionError("a place of the data set lies in a shard")


@settings(max_examples=60, deadline=None)
@given(orders(), st.lists(st.integers(0, 5000), min_size=1, max_size=12))
def test_the_order_is_the_formula_of_the_design(parameters, k):
    seed, sizes, streams, window = parameters
    by_hand = [sample_by_hand(seed, sizes, streams, min(window, sum(sizes) // streams), one) for one in k]
    assert Order(*parameters).sample(np.array(k)).tolist() == by_hand


def test_the_formula_holds_for_more_samples_than_32_bits_count():
    sizes = [2**31 + 977 * n for n in range(11)]  # 2.4e10 samples
    samples, rng = sum(sizes), np.random.default_rng(0)
    order = Order(7, sizes, 256, 4096)
    edges = [
        edge + near for edge in (2**31, 2**32, samples, 256 * (samples // 256), 3 * samples) for near in (-1, 0, 1)
    ]
    k = np.array([0, *edges, *rng.integers(0, 5 * samples, 40).tolist()])
    found = order.sample(k)
    assert found.tolist() == [sample_by_hand(7, sizes, 256, 4096, one) for one in k.tolist()]
    assert found.max() > 2**34
    window = order.sample(
        np.arange(256 * 4096) + 2 * 256 * order.stream_length
    )  # the first of each stream, third epoch
    assert len(np.unique(window)) == len(window)


def test_what_32_bits_must_number_is_refused_beyond_them():
    huge = [2**40]
    Order(0, huge, 2**10, 2**10)
    for streams, window in ((2**33, 1), (1, 2**7), (1, 2**33)):
        with pytest.raises(ValueError, match=r"at most 2\^32 streams, windows in one, and samples in a window"):
            Order(0, huge, streams, window)


def test_the_order_never_changes():
    """Golden values, made by `sample_by_hand`; a run resumed by a later version must go on through the same samples."""
    order = Order(seed=20231122, shard_sizes=[7, 50, 13, 30], streams=3, window=8)
    golden = {
        0: [18, 54, 98, 23, 53, 58, 19, 56, 59, 24, 70, 60],
        99 * 7 + 40: [72, 7, 43, 6, 11, 41, 71, 10, 52, 75, 16, 55],
        99 * 10**12: [64, 2, 30, 70, 97, 32, 66, 1, 33, 65, 99, 31],
    }
    assert {k: order.sample(np.arange(k, k + 12)).tolist() for k in golden} == golden


@settings(max_examples=80, deadline=None)
@given(orders(), st.integers(0, 50))
def test_every_sample_comes_at_most_once_per_epoch_and_exactly_the_remainder_is_left_out(parameters, epoch):
    order = Order(*parameters)
    images = order.streams * order.stream_length
    seen = order.sample(np.arange(epoch * images, (epoch + 1) * images))
    assert len(np.unique(seen)) == images
    assert seen.min() >= 0
    assert seen.max() < order.samples
    assert order.samples - images == order.samples % order.streams < order.streams


@settings(max_examples=60, deadline=None)
@given(orders(), st.data())
def test_any_batch_sizes_and_world_sizes_walk_the_same_sequence(parameters, data):
    order = Order(*parameters)
    seen, images = {}, 0
    for world_size in data.draw(st.lists(st.integers(1, 8), min_size=1, max_size=6)):
        batch = world_size * data.draw(st.integers(1, 12))
        for rank in range(world_size):
            k = Order(*parameters).rows(images, batch, rank, world_size)  # as after a restart
            assert len(k) == batch // world_size
            seen |= dict(zip(k.tolist(), order.sample(k).tolist(), strict=True))
        images += batch
    uninterrupted = Order(*parameters).sample(np.arange(images)).tolist()
    assert [seen[k] for k in range(images)] == uninterrupted
    assert len(seen) == images


@settings(max_examples=60, deadline=None)
@given(orders(), st.integers(0, 10**12), st.integers(1, 8), st.integers(1, 20))
def test_ranks_cut_a_batch_sorted_by_stream_and_place_into_equal_runs(parameters, first, world_size, rows):
    order = Order(*parameters)
    cut = [order.rows(first, world_size * rows, rank, world_size).tolist() for rank in range(world_size)]
    everything = sorted(range(first, first + world_size * rows), key=lambda k: (k % order.streams, k // order.streams))
    assert cut == [everything[r * rows : (r + 1) * rows] for r in range(world_size)]


@settings(max_examples=60, deadline=None)
@given(orders(), st.lists(st.integers(0, 4000), max_size=40), st.randoms(use_true_random=False))
def test_a_sample_depends_on_its_number_alone(parameters, k, shuffler):
    """Not on what was asked before, in which order, or together with what."""
    order = Order(*parameters)
    together = dict(zip(k, order.sample(np.array(k, dtype=np.int64)).tolist(), strict=True))
    shuffler.shuffle(k)
    assert {one: int(order.sample(np.array([one]))[0]) for one in k} == together


@settings(max_examples=60, deadline=None)
@given(seeds, st.integers(2, 400), st.data())
@example(0, 100, None)
def test_a_window_holds_neighbours_only(seed, samples, data):
    """One shard, so that ids are places: the images of a window are a run of neighbours (around the end), shuffled."""
    streams = data.draw(st.integers(1, min(samples, 6))) if data else 3
    window = data.draw(st.integers(1, 30)) if data else 7
    order = Order(seed, [samples], streams, window)
    for stream in range(streams):
        q = np.arange(order.stream_length)
        ids = order.sample(q * streams + stream)
        for w in range(0, order.stream_length, window):
            inside = np.sort(ids[w : w + window])
            gaps = np.diff(np.append(inside, inside[0] + samples))  # around the circle
            assert np.sum(gaps != 1) <= 1


@settings(max_examples=40, deadline=None)
@given(seeds, st.integers(2, 20), st.integers(2, 30), st.integers(1, 4), st.integers(1, 60))
def test_a_window_touches_few_shards(seed, size, shards, streams, window):
    order = Order(seed, [size] * shards, streams, window)
    ids = order.sample(np.arange(order.stream_length) * streams)
    for w in range(0, order.stream_length, window):
        touched = len(set((ids[w : w + window] // size).tolist()))
        assert touched <= -(-min(window, order.stream_length) // size) + 1


def test_one_window_over_one_stream_is_a_uniform_shuffle():
    """All 24 permutations of 4 samples are equally frequent over seeds, and over the epochs of one run."""
    k = np.arange(4)
    over_seeds = Counter(tuple(Order(seed, [3, 1], 1, 4).sample(k).tolist()) for seed in range(4800))
    order = Order(1, [4], 1, 4)
    over_epochs = Counter(map(tuple, order.sample(np.arange(4 * 4800)).reshape(-1, 4).tolist()))
    for counts in (over_seeds, over_epochs):
        assert set(counts) == set(itertools.permutations(range(4)))
        assert chisquare(list(counts.values())).pvalue > 1e-3


def test_every_sample_is_as_likely_at_every_place_whatever_the_window():
    """Shard order, rotation and windows together: 12 ids at place 0 and at a later place, over 2,400 epochs."""
    order = Order(5, [3, 5, 4], 2, 2)
    per_epoch = order.sample(np.arange(12 * 2400)).reshape(-1, 12)
    for place in (0, 7):
        assert chisquare(np.bincount(per_epoch[:, place], minlength=12)).pvalue > 1e-3


def test_what_an_epoch_leaves_out_moves_on():
    order = Order(3, [10, 9], 4, 4)  # 19 samples, 16 a turn
    epochs = order.sample(np.arange(16 * 40)).reshape(40, 16)
    left_out = Counter(s for epoch in epochs.tolist() for s in set(range(19)) - set(epoch))
    assert len(left_out) == 19
    assert max(left_out.values()) < 20


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(0, 1000))
def test_epochs_and_seeds_differ(seed, epoch):
    order = Order(seed, [50] * 8, 4, 25)
    now, after = (order.sample(np.arange(400 * e, 400 * (e + 1))) for e in (epoch, epoch + 1))
    other = Order(seed + 1, [50] * 8, 4, 25).sample(np.arange(400 * epoch, 400 * (epoch + 1)))
    assert np.mean(now == after) < 0.1
    assert np.mean(now == other) < 0.1


def test_no_two_windows_of_any_stream_and_epoch_are_shuffled_alike():
    order = Order(11, [3000], 10, 20)  # 15 windows of 10 streams
    windows = order.sample(np.arange(2 * 3000)).reshape(2, 15, 20, 10).transpose(0, 1, 3, 2).reshape(300, 20)
    from_first = (windows - windows[:, :1] + 1500) % 3000  # neighbours stay neighbours where ids wrap around
    assert len({tuple(np.argsort(row).tolist()) for row in from_first}) == 300


def test_resuming_far_into_a_run_of_ten_million_samples_costs_what_starting_does():
    def seconds_to_first_batch(first: int) -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            order = Order(7, np.full(10_000, 1000), 64, 4096)
            ids = order.sample(order.rows(first, 256, 0, 2))
            times.append(time.perf_counter() - started)
            assert ids.max() < 10_000_000
        return min(times)

    assert seconds_to_first_batch(0) < 0.5
    assert seconds_to_first_batch(123 * 10_000_000 + 9_876_544) < 0.5
    assert seconds_to_first_batch(10**15) < 0.5


def test_a_million_samples_in_one_window_are_one_permutation():
    ids = Order(0, [10**6], 1, 10**6).sample(np.arange(10**6, 2 * 10**6))
    assert np.bincount(ids, minlength=10**6).max() == 1


def test_each_window_is_permuted_once_by_a_reader_that_goes_forward():
    """Batches that do not divide by V or W, on one of two ranks: the cache of V windows never has to repeat itself."""
    order = Order(2, [500], 8, 10)
    for step in range(80):
        order.sample(order.rows(step * 28, 28, 0, 2))
    everything = Order(2, [500], 8, 10)
    everything.sample(np.concatenate([order.rows(step * 28, 28, 0, 2) for step in range(80)]))
    assert order._shuffled.cache_info().misses == everything._shuffled.cache_info().misses
    assert order._shuffled.cache_info().currsize <= 8


@pytest.mark.parametrize(
    ("sizes", "streams", "window", "message"),
    [
        ([5, 5], 11, 4, "streams must lie between 1 and the 10 samples, got 11"),
        ([5, 5], 0, 4, "streams must lie between 1 and the 10 samples, got 0"),
        ([5, 5], 2, 0, "a window holds at least 1 sample, got 0"),
        ([5, 0], 2, 4, "every shard must have a sample"),
        ([], 1, 1, "there must be a shard"),
    ],
)
def test_impossible_orders_are_refused(sizes, streams, window, message):
    with pytest.raises(ValueError, match=message):
        Order(0, sizes, streams, window)


def test_impossible_requests_are_refused():
    order = Order(0, [10], 2, 4)
    with pytest.raises(ValueError, match="counted from 0, got -1"):
        order.sample(np.array([3, -1]))
    with pytest.raises(ValueError, match="a batch of 10 does not divide by 4 ranks"):
        order.rows(0, 10, 0, 4)
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        order.rows(0, 10, 2, 2)


@pytest.mark.parametrize(("samples", "streams"), [(1, 1), (1023, 1), (2048, 2), (50_000, 48), (10**7, 256)])
def test_the_default_is_a_stream_per_1024_samples_up_to_256(samples, streams):
    assert default_streams(samples) == streams
