"""Normals of generator 2: one law, known exactly, and the same bits wherever they are made."""

import hashlib
from math import comb

import numpy as np
import pytest
import torch
from scipy.special import ndtr

from dtrain import device_draws
from dtrain.draws import Draw, Purpose
from dtrain.normals import GRID, TABLE, from_words, tables
from dtrain.randomness import Draws, drawn, purpose_of
from tests.devices import DEVICES
from tests.normal_table import MOMENTS, table
from tests.normality import exact_law, scores

SHA256 = "a560a8b1920e5d65f2816ca55433780fec939e7d008dc646a9b9864c8c92e40e"
M = 2**64 - 1
# Philox-4x64-10 in the known-answer file of Random123 (Salmon et al. 2011): counter, key, words.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), "16554d9eca36314c db20fe9d672d0fdc d7e772cee186176b 7e68b68aec7ba23b"),
    ((M, M, M, M), (M, M), "87b092c3013fe90b 438c3c67be8d0224 9cc7d7c69cd777b6 a09caebf594f0ba0"),
    (
        (0x243F6A8885A308D3, 0x13198A2E03707344, 0xA4093822299F31D0, 0x082EFA98EC4E6C89),
        (0x452821E638D01377, 0xBE5466CF34E90C6C),
        "a528f45403e61d95 38c72dbd566e9788 a5a1610e72fd18b5 57bd43b5e52b7fe6",
    ),
]
# (seed, purpose, keys, sub, shape): the ends of what they may be, rows of odd length, rows longer than a block
STREAMS = [
    (0, Purpose.NOISE, [0, 1, 2], 0, (3, 8, 8)),
    (2**63 - 1, purpose_of("author.noise"), [2**40, 7], 0, (5, 3, 7)),
    (2**64 - 1, Purpose.SAMPLE_STEP_NOISE, [2**62 + 3], 2**33 + 5, (1,)),
    (11, Purpose.SAMPLE_NOISE, [5, 2**32], 3, (3, 64, 65)),
]


def bits(values) -> np.ndarray:
    return np.asarray(values).view(np.int32)


def test_the_table_is_the_one_that_its_program_makes():
    assert hashlib.sha256(TABLE.read_bytes()).hexdigest() == SHA256
    assert np.abs(np.load(TABLE).astype(np.int64) - table()).max() <= 1  # SciPy's last bit


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_torchs_philox_gives_the_known_answers(counter, key, words):
    halves = tuple(device_draws.Word(torch.tensor([c >> 32]), torch.tensor([c & 0xFFFFFFFF])) for c in counter)
    found = device_draws.philox4x64(halves, key)
    assert " ".join(f"{int(word.high):08x}{int(word.low):08x}" for word in found) == words


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("seed", "purpose", "keys", "sub", "shape"), STREAMS)
def test_numpy_and_torch_make_the_same_bits(seed, purpose, keys, sub, shape, device):
    ours = Draws(seed, 2).normals(purpose, keys, shape, sub)
    theirs = device_draws.normals(seed, purpose, torch.tensor(keys, device=device), shape, sub).cpu()
    assert ours.shape == theirs.shape == (len(keys), *shape)
    assert np.array_equal(bits(ours), bits(theirs))


@pytest.mark.parametrize("device", DEVICES)
def test_pieces_that_fit_a_cache_change_no_bit(device, monkeypatch):
    whole = Draws(1, 2).normals(Purpose.NOISE, range(5), (100,))
    monkeypatch.setattr(device_draws, "_MOST_BLOCKS", 7)
    parts = device_draws.normals(1, Purpose.NOISE, torch.arange(5, device=device), (100,)).cpu()
    assert np.array_equal(bits(whole), bits(parts))


@pytest.mark.campaign
@pytest.mark.parametrize("device", DEVICES)
def test_what_torch_compiles_makes_the_same_bits(device):
    for seed, purpose, keys, sub, shape in STREAMS:
        k = torch.tensor(keys, device=device)
        theirs = device_draws.normals(seed, purpose, k, shape, sub, compiled=True).cpu()
        assert np.array_equal(bits(Draws(seed, 2).normals(purpose, keys, shape, sub)), bits(theirs))


def test_a_number_is_a_function_of_its_own_32_bits():
    words = np.random.default_rng(0).integers(0, 2**64, 3000, dtype=np.uint64)
    lower, upper = tables()
    expected = [
        lower[w >> shift & 0xFFFF] + upper[w >> shift + 16 & 0xFFFF] for w in words.tolist() for shift in (0, 32)
    ]
    for count in (3000, 1, 17):
        found = np.empty(2 * count, dtype=np.float32)
        from_words(words[:count], found)
        assert np.array_equal(bits(found), bits(np.array(expected[: 2 * count], dtype=np.float32)))


def test_the_extremes_of_a_word_are_the_extremes_of_the_law_and_more_bits_are_more():
    found = np.empty(6, dtype=np.float32)
    from_words(np.array([0, M, 1 << 32], dtype=np.uint64), found)
    least, one_more = found[0], found[5]
    assert found[:4].tolist() == [least, least, -least, -least]
    assert least < one_more < 0
    assert 6.3 < -least < 6.4
    for one in tables():
        assert (np.diff(one) > 0).all()
        assert np.array_equal(one, -one[::-1])  # no draw is likelier than its negative


def test_no_sum_is_rounded():
    """So that a fused or a wider addition gives the same bits."""
    lower, upper = (table.astype(np.float64) / GRID for table in tables())
    assert all(np.array_equal(one, np.rint(one)) for one in (lower, upper))
    assert lower.max() + upper.max() < 2**24


def test_the_laws_moments_to_the_eighth_are_the_normals():
    lower, upper = (table.astype(np.longdouble) for table in tables())
    for power, expected in MOMENTS.items():
        found = sum(comb(power, j) * (lower**j).mean() * (upper ** (power - j)).mean() for j in range(0, power + 1, 2))
        assert abs(found / expected - 1) < 1e-8, power


def test_the_laws_distribution_function_is_the_normals():
    x = np.concatenate([np.linspace(-4, 4, 61), np.random.default_rng(0).integers(-(2**23), 2**23, 40) * GRID])
    below, up_to = exact_law(x)
    assert np.abs(np.stack([below, up_to]) - ndtr(x)).max() < 2e-7
    for ends, most in ((-5.0, 0.004), (-5.5, 0.05)):
        tail = np.linspace(ends, -2, 20)
        assert np.abs(exact_law(tail)[1] / ndtr(tail) - 1).max() < most


def test_a_million_numbers_are_normal_and_independent():
    found = scores(1 << 20, seed=2)
    assert found.pop("ks") > 0.01
    assert max(map(abs, found.values())) < 3.5, found


def test_the_numbers_of_generator_2_never_change():
    found = Draws(0, 2).normals(Purpose.NOISE, [2], (3,))
    assert found.tolist() == [GOLDEN]


def test_a_draw_of_normals_is_by_the_runs_generator_and_all_others_are_the_same_in_both():
    k = [3, 2**33]
    for law in ("uniform", "word", "stratified"):
        draw = Draw("some", Purpose.TIME, law)
        one, two = (drawn(draw, Draws(5, generator), k, np.array([3, 4]), 0, 8) for generator in (1, 2))
        assert np.array_equal(one, two)
    noise = Draw("noise", Purpose.NOISE, "normal", (4,))
    one, two = (drawn(noise, Draws(5, generator), k, np.array([3, 4]), 0, 8) for generator in (1, 2))
    assert np.array_equal(one[1], Draws(5).at(Purpose.NOISE, k[1]).standard_normal(4, dtype=np.float32))
    assert not np.array_equal(one, two)


# dtrain.randomness.Draws(0, 2).normals(Purpose.NOISE, [2], (3,))
GOLDEN = [-0.03214263916015625, -0.36981868743896484, 1.7242670059204102]
