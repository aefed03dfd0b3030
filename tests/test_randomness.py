import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dtrain.draws import Draw
from dtrain.randomness import Draws, Purpose, drawn, key_of, permutation, purpose_of


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


def stratified(k, first, batch_size, seed):
    draw = Draw("time", Purpose.TIME, "stratified")
    return drawn(draw, Draws(seed), list(k), np.asarray(k), first, batch_size)


@given(st.integers(1, 300), st.integers(0, 10**12), st.integers(1, 8))
def test_every_stratum_of_a_global_batch_holds_one_row_at_any_world_size(batch_size, first, ranks):
    k = np.arange(first, first + batch_size)
    whole = stratified(k, first, batch_size, seed=1)
    assert sorted((whole * batch_size).astype(int).tolist()) == list(range(batch_size))
    assert whole.max() < 1
    for rank in range(ranks):  # any rows, in any order, give what they give in the whole
        mine = np.arange(batch_size)[rank::ranks][::-1]
        assert np.array_equal(stratified(k[mine], first, batch_size, seed=1), whole[mine])


def test_within_its_stratum_a_time_is_the_draw_of_its_image():
    k = np.arange(7, 7 + 64)
    u = [Draws(3).uniform(Purpose.TIME, key) for key in k.tolist()]
    assert np.allclose(stratified(k, 7, 64, seed=3) * 64 % 1, u, atol=1e-12)


def test_a_row_of_the_batch_is_not_tied_to_a_stratum():
    strata = {int(stratified([b * 64 + 3], b * 64, 64, seed=0)[0] * 64) for b in range(300)}
    assert len(strata) > 55
    other = [int(stratified([3], 0, 64, seed=s)[0] * 64) for s in range(20)]
    assert len(set(other)) > 10


def test_words_and_normals_of_a_row_are_its_images_own():
    word, normal = Draw("keys", Purpose.DROPOUT, "word"), Draw("noise", Purpose.NOISE, "normal", (2, 3))
    k = [5, 2**40]
    words = drawn(word, Draws(9), k, np.array(k), 0, 8)
    assert words.dtype == np.int64
    assert [int(w) % 2**64 for w in words] == [int(Draws(9).words(Purpose.DROPOUT, key)[0]) for key in k]
    normals = drawn(normal, Draws(9), k, np.array(k), 0, 8)
    assert all(np.array_equal(normals[row], Draws(9).normal(Purpose.NOISE, key, (2, 3))) for row, key in enumerate(k))


def test_the_purposes_of_plug_ins_are_apart_from_the_packages_and_from_each_other():
    purposes = {purpose_of(f"author.{i}") for i in range(100)}
    assert len(purposes) == 100
    assert min(purposes) > max(Purpose)
    one, other = (Draws(0).uniform(purpose_of(name), 1) for name in ("a", "b"))
    assert one != other
