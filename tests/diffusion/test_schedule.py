from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtrain.diffusion.schedule import linear, subsequence
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
