"""Guidance built into MeanFlow, on Gaussian data of two classes whose guided velocity is a closed form.

Class c has x_0 ~ N(m_c, s²), so x_t ~ N((1 − t) m_c, σ_t²) and v(x, t | c) is affine; told nothing, the velocity is
that of both, weighted by how likely each class is at x.
"""

import pytest
import torch

from dtrain.diffusion.guidance import guided
from dtrain.diffusion.mean_flow import MeanFlow
from dtrain.diffusion.times import LogitNormal
from dtrain.objectives.mean_flow import BuiltIn, MeanVelocity
from dtrain.position import Position
from tests.diffusion.gaussian_data import normals

PROCESS, S, MEANS, SCALE = MeanFlow(time_scale=1), 0.4, (-0.7, 0.9), 2.5
NOTHING, N = 2, 400


def null(condition):
    return {"y": torch.full_like(condition["y"], NOTHING)}


def of_class(x, t, mean):
    """E[ε − x_0 | x_t] of one class."""
    variance = t**2 + (1 - t) ** 2 * S**2
    return (t - (1 - t) * S**2) / variance * (x - (1 - t) * mean) - mean


def velocity(x, t, y):
    """Of the classes y (N,), told nothing where y is NOTHING; x (N, 1, 1, 1)."""
    t, y = t.view(-1, 1, 1, 1), y.view(-1, 1, 1, 1)
    variance = t**2 + (1 - t) ** 2 * S**2
    each = torch.stack([of_class(x, t, mean) for mean in MEANS])
    likely = torch.stack([-((x - (1 - t) * mean) ** 2) / (2 * variance) for mean in MEANS]).softmax(0)
    both = (likely * each).sum(0)
    return torch.where(y == NOTHING, both, torch.where(y == 1, each[1], each[0]))


def solution(x, told, y):
    """What a network answers at a span of 0 that has learned guidance: nothing is led where nothing is told."""
    t = told[:, 0].double()
    led = SCALE * velocity(x, t, y) + (1 - SCALE) * velocity(x, t, torch.full_like(y, NOTHING))
    return torch.where(y.view(-1, 1, 1, 1) == NOTHING, velocity(x, t, y), led)


def rows():
    """x_t, the velocity of each row's path, t and the class, of which a tenth is dropped; float64."""
    y = torch.arange(N) % 2
    x_0 = torch.tensor(MEANS, dtype=torch.float64)[y].view(-1, 1, 1, 1) + S * normals(N, 1, 1, 1, seed=1)
    noise, t = normals(N, 1, 1, 1, seed=2), torch.linspace(0.05, 0.95, N).double()  # whose float32 is exact
    return PROCESS.noised(x_0, noise, t), noise - x_0, t, torch.where(torch.arange(N) % 10 == 3, NOTHING, y)


def objective(mix=0.0, from_images=0, along="data"):
    built_in = BuiltIn(SCALE, mix, from_images, null)
    return MeanVelocity(PROCESS, LogitNormal(-0.4, 1.0), 0.25, along, 1.0, built_in)


@pytest.mark.parametrize("along", ["data", "network"])
@pytest.mark.parametrize("mix", [0.0, 0.6])
def test_at_the_solution_the_target_is_the_guided_velocity_and_the_noise_of_single_paths(mix, along):
    """target − solution = ω (v − v(x_t | c)), whose mean given x_t is 0; of a dropped row ω is 1."""
    x_t, v, t, y = rows()
    learned, towards = objective(mix, along=along)._velocities(solution, x_t, v, t, {"y": y}, Position(0, 0))
    led, omega = solution(x_t, t.view(-1, 1), y), torch.where(y == NOTHING, 1.0, SCALE * (1 - mix)).double()
    expected = led + omega.view(-1, 1, 1, 1) * (v - velocity(x_t, t, y))
    torch.testing.assert_close(learned, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(learned[y == NOTHING], v[y == NOTHING], rtol=0, atol=0)
    torch.testing.assert_close(towards, learned if along == "data" else led, rtol=0, atol=1e-12)


def test_what_is_learned_is_what_guidance_makes_of_two_answers():
    x_t, _, t, y = rows()
    model = guided(lambda x, told, y: velocity(x, told[:, 0].double(), y), SCALE, null)
    told = t.view(-1, 1).float()
    torch.testing.assert_close(solution(x_t, told, y), model(x_t, told, y=y), rtol=0, atol=1e-12)


def test_before_its_image_nothing_is_built_in_and_nobody_asks_for_the_null():
    x_t, v, t, y = rows()

    def asked(*_, **__):
        raise AssertionError

    made = objective(0.6, from_images=100)
    learned, towards = made._velocities(asked, x_t, v, t, {"y": y}, Position(4, 99))
    assert learned is v
    assert towards is v
    assert not torch.equal(made._velocities(solution, x_t, v, t, {"y": y}, Position(5, 100))[0], v)


def test_a_row_that_any_condition_tells_something_is_led():
    x_t, v, t, _ = rows()
    y = torch.full((N,), NOTHING)
    words = torch.zeros(N, 3, dtype=torch.int64)
    words[::2, 1] = 7

    def nothing(condition):
        return null(condition) | {"words": torch.zeros_like(condition["words"])}

    made = MeanVelocity(PROCESS, LogitNormal(), 0.25, "data", 1.0, BuiltIn(SCALE, 0.0, 0, nothing))
    answer = torch.zeros_like(v)
    learned, _ = made._velocities(lambda x, told, **_: answer, x_t, v, t, {"y": y, "words": words}, Position())
    assert torch.equal(learned[1::2], v[1::2])
    torch.testing.assert_close(learned[::2], SCALE * v[::2], rtol=0, atol=1e-12)
