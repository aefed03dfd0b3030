import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.diffusion.schedule import cosine, linear, named, scaled_linear, sigmoid, subsequence
from dtrain.errors import UserError

lengths = st.integers(1, 1500).flatmap(lambda T: st.tuples(st.just(T), st.integers(1, T)))


@pytest.mark.parametrize("T", [21, 250, 1000, 4000])
def test_linear_is_the_running_product_of_one_minus_beta(T):
    beta = [(1e-4 + (0.02 - 1e-4) * t / (T - 1)) * 1000 / T for t in range(T)]
    product, expected = 1.0, []
    for b in beta:
        product *= 1 - b
        expected.append(product)
    schedule = linear(T)
    np.testing.assert_allclose(schedule.alpha_bar.numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(schedule.snr.numpy(), np.array(expected) / (1 - np.array(expected)), rtol=1e-10)
    np.testing.assert_allclose((schedule.alpha**2 + schedule.sigma**2).numpy(), 1, rtol=1e-15)


def test_tables_are_float64_on_the_cpu_even_under_another_default():
    with torch.device("meta"):
        schedule = linear(1000)
    for table in (schedule.alpha_bar, schedule.alpha, schedule.sigma, schedule.snr):
        assert table.dtype == torch.float64
        assert table.device.type == "cpu"
    assert float(schedule.sigma[0] ** 2) == pytest.approx(1e-4, rel=1e-11)


def test_before_zero_is_clean_data():
    schedule = linear(1000)
    assert schedule.alpha_bar_at(-1) == 1.0
    assert schedule.alpha_bar_at(0) == pytest.approx(1 - 1e-4, abs=1e-15)


def test_a_linear_schedule_too_short_for_its_beta_is_refused():
    with pytest.raises(UserError, match="at least 21"):
        linear(20)


@given(lengths, st.sampled_from(["trailing", "leading"]))
def test_a_subsequence_has_exactly_s_different_falling_timesteps(length, spacing):
    T, S = length
    timesteps = subsequence(T, S, spacing)
    assert len(timesteps) == S
    assert all(p < t for t, p in pairwise(timesteps))
    assert timesteps[0] <= T - 1
    assert timesteps[-1] >= 0
    assert timesteps[0] == T - 1 if spacing == "trailing" else timesteps[-1] == 0
    gaps = [t - p for t, p in pairwise(timesteps)]
    assert all(T // S <= gap <= -(-T // S) for gap in gaps)  # as even as integers allow


@given(lengths)
def test_leading_starts_within_one_gap_of_the_top(length):
    T, S = length
    assert subsequence(T, S, "leading")[0] >= T - -(-T // S)


def test_subsequences_of_the_literature():
    assert subsequence(1000, 4, "trailing") == [999, 749, 499, 249]
    assert subsequence(1000, 4, "leading") == [750, 500, 250, 0]
    assert subsequence(1000, 1000, "trailing") == subsequence(1000, 1000, "leading") == list(range(999, -1, -1))


@pytest.mark.parametrize("S", [0, -1, 1001])
def test_a_number_of_steps_that_does_not_fit_is_refused(S):
    with pytest.raises(UserError, match="1 to 1000"):
        subsequence(1000, S, "trailing")


def test_cosine_follows_its_curve_until_beta_is_capped():
    def f(s):
        return math.cos((s + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = cosine(1000)
    for t in (0, 100, 500, 998):
        assert float(schedule.alpha_bar[t]) == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-9)
    assert float(schedule.beta[-1]) == pytest.approx(0.999)
    assert 1 / float(schedule.alpha[-1]) == pytest.approx(20291, abs=1)


def test_sigmoid_follows_its_curve_until_beta_is_capped():
    def logistic(v):
        return 1 / (1 + math.exp(-v))

    schedule = sigmoid(1000)
    for t in (0, 100, 500, 998):
        value = logistic(3 - 6 * (t + 1) / 1000)
        expected = (value - logistic(-3)) / (logistic(3) - logistic(-3))
        assert float(schedule.alpha_bar[t]) == pytest.approx(expected, rel=1e-9)
    assert float(schedule.beta[-1]) == pytest.approx(0.999)


def test_scaled_linear_is_linear_in_the_root_of_beta():
    beta = np.linspace(math.sqrt(0.00085), math.sqrt(0.012), 1000) ** 2
    np.testing.assert_allclose(scaled_linear(1000).alpha_bar.numpy(), np.cumprod(1 - beta), rtol=1e-10)
    np.testing.assert_allclose(scaled_linear(1000).beta.numpy(), beta, rtol=1e-9)
    with pytest.raises(UserError, match="at least 13"):
        scaled_linear(12)
    scaled_linear(13)


SCHEDULES = ["linear", "scaled_linear", "cosine", "sigmoid"]


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("T", [50, 1000])
def test_every_schedule_falls_from_nearly_all_signal_to_nearly_none(name, zero, T):
    schedule = named(name, T, zero)
    assert bool((schedule.alpha_bar.diff() < 0).all())
    first, last = schedule.snr_ends
    assert first == float(schedule.snr[0]) > 30
    assert last < 0.005
    assert (last == 0) == zero == schedule.has_zero_terminal_snr
    assert float(schedule.alpha_bar[0]) == pytest.approx(float(named(name, T).alpha_bar[0]), rel=1e-14)


@given(lengths, st.sampled_from(["linspace", "quad"]))
def test_linspace_and_quad_have_exactly_s_different_falling_timesteps(length, spacing):
    T, S = length
    timesteps = subsequence(T, S, spacing)
    assert len(timesteps) == S
    assert all(p < t for t, p in pairwise(timesteps))
    assert T - 1 >= timesteps[0] >= timesteps[-1] >= 0
    if S > 1:
        assert timesteps[-1] == 0
        assert timesteps[0] == (T - 1 if spacing == "linspace" else max(4 * T // 5, S - 1))


def test_quad_is_the_spacing_of_the_published_table():
    theirs = [int(s) for s in np.linspace(0, math.sqrt(1000 * 0.8), 10) ** 2]
    assert subsequence(1000, 10, "quad")[::-1] == [*theirs[:-1], 800]  # √800² is 800.0000…01 there, 799.99… elsewhere


def test_an_explicit_list_is_taken_as_it_is_or_refused():
    assert subsequence(1000, 3, [999, 20, 0]) == [999, 20, 0]
    with pytest.raises(UserError, match="lists 2 timesteps, but 3"):
        subsequence(1000, 3, [999, 0])
    for wrong in ([1000, 20, 0], [20, 20, 0], [20, 30, 0], [20, 10, -1]):
        with pytest.raises(UserError, match="out of order"):
            subsequence(1000, 3, wrong)
