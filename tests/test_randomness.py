import numpy as np
import pytest
from scipy import stats

from dtrain.randomness import Draws, Purpose, key_of, permutation


def test_a_draw_depends_on_seed_purpose_index_and_sub_and_on_nothing_drawn_before():
    draws = Draws(7)
    first = draws.normal(Purpose.NOISE, 12, (5,), sub=3)
    draws.uniform(Purpose.TIME, 99)
    draws.at(Purpose.NOISE, 12).integers(10, size=3, dtype=np.uint32)  # leaves half a word in the generator
    np.testing.assert_array_equal(draws.normal(Purpose.NOISE, 12, (5,), sub=3), first)
    others = [
        Draws(8).normal(Purpose.NOISE, 12, (5,), sub=3),
        draws.normal(Purpose.SAMPLE_NOISE, 12, (5,), sub=3),
        draws.normal(Purpose.NOISE, 13, (5,), sub=3),
        draws.normal(Purpose.NOISE, 12, (5,), sub=4),
    ]
    assert not any(np.array_equal(o, first) for o in others)


def test_words_are_the_philox_function_itself():
    draws = Draws(123456789)
    expected = np.random.Philox(
        key=np.array([123456789, Purpose.WINDOW_ORDER], np.uint64), counter=np.array([0, 42, 5, 0], np.uint64)
    ).random_raw(9)
    np.testing.assert_array_equal(draws.words(Purpose.WINDOW_ORDER, 42, 5, size=9), expected)


def test_the_numbers_of_a_seed_never_change():
    draws = Draws(0)
    assert draws.words(Purpose.TIME, 0, size=2).tolist() == GOLDEN_WORDS
    assert draws.uniform(Purpose.TIME, 1) == GOLDEN_UNIFORM
    np.testing.assert_array_equal(draws.normal(Purpose.NOISE, 2, (3,)), np.array(GOLDEN_NORMALS, np.float32))


def test_draws_over_samples_are_uniform_and_normal():
    draws = Draws(1)
    u = [draws.uniform(Purpose.TIME, k) for k in range(20_000)]
    z = np.concatenate([draws.normal(Purpose.NOISE, k, (4,)) for k in range(5_000)])
    assert stats.kstest(u, "uniform").pvalue > 0.01
    assert stats.kstest(z, "norm").pvalue > 0.01
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 0.03


def test_sorting_words_gives_every_permutation_equally_often():
    draws = Draws(2)
    counts = {}
    for k in range(6000):
        p = tuple(permutation(draws.words(Purpose.WINDOW_ORDER, k, size=3)).tolist())
        counts[p] = counts.get(p, 0) + 1
    assert len(counts) == 6
    assert stats.chisquare(list(counts.values())).pvalue > 0.01


def test_a_seed_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="a seed lies in"):
        Draws(-1)
    with pytest.raises(ValueError, match="a seed lies in"):
        Draws(2**64)


def test_names_get_different_streams():
    assert key_of("blocks.0.attn.qkv.weight") == key_of("blocks.0.attn.qkv.weight")
    assert len({key_of(f"blocks.{i}.attn.qkv.weight") for i in range(1000)}) == 1000


# numpy.random.Philox(key=[0, purpose], counter=[0, index, 0, 0]), NumPy 2
GOLDEN_WORDS = [7916537264935705218, 11886787990761270388]
GOLDEN_UNIFORM = 0.9317910499216452
GOLDEN_NORMALS = [0.5276234149932861, 0.8752008676528931, 0.6390466690063477]
