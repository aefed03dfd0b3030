import numpy as np
import pytest
import torch

from dtrain.diffusion.edm import EDM
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.guidance import guided
from dtrain.diffusion.prediction import Apart, to_x0
from dtrain.diffusion.projection import Projection, projection
from dtrain.diffusion.samplers import sample
from dtrain.diffusion.schedule import linear
from dtrain.diffusion.solvers import predict
from dtrain.errors import UserError

NULL = 10
x = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
t = torch.tensor([1, 500, 999])
labels = torch.tensor([0, 4, 9])


def null(condition):
    return {"y": torch.full_like(condition["y"], NULL)}


class Model:
    """Depends on every argument of its own row, and counts its rows."""

    def __init__(self):
        self.rows = []

    def __call__(self, x, t, y):
        self.rows.append(len(x))
        return torch.tanh(x * (1 + y.view(-1, 1, 1, 1))) + t.view(-1, 1, 1, 1) / 1000


@pytest.mark.parametrize("s", [0.0, 0.5, 1.5, 4.0])
def test_guidance_moves_from_the_unconditional_through_the_conditional_on_all_channels(s):
    model, plain = Model(), Model()
    cond, uncond = plain(x, t, y=labels), plain(x, t, torch.full_like(labels, NULL))
    torch.testing.assert_close(guided(model, s, null)(x, t, y=labels), (1 - s) * uncond + s * cond, rtol=0, atol=1e-14)
    assert model.rows == [6]


def test_guidance_of_one_is_the_conditional_model_bit_for_bit():
    model = Model()
    assert torch.equal(guided(model, 1.0, null)(x, t, y=labels), Model()(x, t, y=labels))
    assert model.rows == [3]


def test_guidance_on_a_model_without_classes_is_refused():
    with pytest.raises(UserError, match="num_classes is 0"):
        guided(Model(), 2.0, None)
    guided(Model(), 1.0, None)


def cond_and_uncond():
    return Model()(x, t, y=labels), Model()(x, t, torch.full_like(labels, NULL))


def test_channels_that_are_not_guided_are_the_conditional_ones():
    cond, uncond = cond_and_uncond()
    found = guided(Model(), 3.0, null, channels=1)(x, t, y=labels)
    torch.testing.assert_close(found[:, :1], uncond[:, :1] + 3 * (cond - uncond)[:, :1], rtol=0, atol=1e-14)
    assert torch.equal(found[:, 1:], cond[:, 1:])


@pytest.mark.parametrize("channels", [None, 1, 3, 4])
@pytest.mark.parametrize("image_channels", [1, 3, 4])
def test_a_learned_variance_is_never_guided_whichever_channels_are_asked_for(image_channels, channels):
    """An output of 2C channels for images of C: the second half is the conditional model's, bit for bit."""
    x = torch.randn(3, image_channels, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def wide(x, t, y):
        model = Model()
        return torch.cat([model(x, t, y), model(x - 1, t, y)], dim=1)

    cond, uncond = wide(x, t, y=labels), wide(x, t, torch.full_like(labels, NULL))
    found = guided(wide, 3.0, null, channels=channels, rescale=0.0)(x, t, y=labels)
    n = image_channels if channels is None else min(channels, image_channels)
    torch.testing.assert_close(found[:, :n], (uncond + 3 * (cond - uncond))[:, :n], rtol=0, atol=1e-14)
    assert torch.equal(found[:, n:], cond[:, n:])


def test_outside_its_interval_guidance_leaves_the_conditional_model_alone_at_half_the_cost():
    cond, uncond = cond_and_uncond()
    full = uncond + 3 * (cond - uncond)
    found = guided(Model(), 3.0, null, interval=(0.1, 0.9))(x, t, y=labels)  # t = 1, 500, 999 of 1000
    torch.testing.assert_close(found[1], full[1], rtol=0, atol=1e-14)
    torch.testing.assert_close(found[[0, 2]], cond[[0, 2]], rtol=0, atol=1e-14)
    model = Model()
    assert torch.equal(guided(model, 3.0, null, interval=(0.6, 0.9))(x, t, y=labels), cond)
    assert model.rows == [3]
    last = torch.full((3,), 1000.0)  # where a flow begins
    everywhere = guided(Model(), 3.0, null)(x, last, y=labels)
    assert torch.equal(guided(Model(), 3.0, null, interval=(0.5, 1.0))(x, last, y=labels), everywhere)


@pytest.mark.parametrize("rescale", [0.5, 1.0])
def test_rescaling_returns_the_contrast_of_the_conditional_model(rescale):
    cond, uncond = (c.numpy() for c in cond_and_uncond())
    found = guided(Model(), 7.0, null, rescale=rescale)(x, t, y=labels).numpy()
    for row in range(3):
        mixed = uncond[row] + 7 * (cond[row] - uncond[row])
        expected = rescale * mixed * cond[row].std(ddof=1) / mixed.std(ddof=1) + (1 - rescale) * mixed
        np.testing.assert_allclose(found[row], expected, rtol=1e-12)
        if rescale == 1:
            np.testing.assert_allclose(found[row].std(), cond[row].std(), rtol=1e-12)


def sums(x, t, p, q, r):
    """Of its rows alone, and of all three conditions at once: no two of the eight cases give the same."""
    rows_of.append(len(x))
    told = p + 10 * q + 100 * r + 0.5 * p * q + 7 * q * r + 3 * p * q * r
    return torch.tanh(x) * told.view(-1, 1, 1, 1)


rows_of = []
TOLD = {name: torch.tensor(values, dtype=torch.float64) for name, values in
        {"p": [1.0, 2.0, 3.0], "q": [0.5, 1.0, 2.0], "r": [3.0, 1.0, 4.0]}.items()}  # fmt: skip


def nothing(condition, told=()):
    return {name: value if name in told else torch.full_like(value, -1.0) for name, value in condition.items()}


def of(*told):
    return sums(x, t, **nothing(TOLD, told))


def test_each_condition_is_led_to_by_a_scale_of_its_own_in_the_order_given():
    """Brooks et al. 2023, equation 3: ε(nothing) + Σ s_i (ε(c_1 … c_i) − ε(c_1 … c_(i−1)))."""
    found = guided(sums, "q=3,p=1.5,r=0.5", nothing)(x, t, **TOLD)
    expected = of() + 3 * (of("q") - of()) + 1.5 * (of("q", "p") - of("q")) + 0.5 * (of("q", "p", "r") - of("q", "p"))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    other = guided(sums, "p=1.5,q=3,r=0.5", nothing)(x, t, **TOLD)
    assert (found - other).abs().max() > 1  # the order counts


@pytest.mark.parametrize(
    ("guidance", "answers"),
    [("p=2,q=3,r=4", 4), ("p=1,q=3,r=4", 3), ("p=3,q=3,r=2", 3), ("p=1,q=1,r=4", 2), ("p=2,q=1,r=1", 3)],
)
def test_answers_that_fall_out_are_not_asked_for(guidance, answers):
    scales = [float(part[2:]) for part in guidance.split(",")]
    steps = [of(), of("p"), of("p", "q"), of("p", "q", "r")]
    expected = steps[0] + sum(s * (steps[i + 1] - steps[i]) for i, s in enumerate(scales))
    rows_of.clear()
    found = guided(sums, guidance, nothing)(x, t, **TOLD)
    assert rows_of == [3 * answers]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_one_scale_for_each_is_that_number_and_1_the_conditional_model_bit_for_bit():
    assert torch.equal(guided(sums, "p=3,q=3,r=3", nothing)(x, t, **TOLD), guided(sums, 3.0, nothing)(x, t, **TOLD))
    assert guided(sums, "p=1,q=1,r=1", nothing) is sums


def test_apart_too_guidance_acts_within_its_interval_alone():
    found = guided(sums, "p=2,q=3,r=4", nothing, interval=(0.2, 0.6))(x, t, **TOLD)  # t is 1, 500 and 999 of 1000
    everywhere, bare = guided(sums, "p=2,q=3,r=4", nothing)(x, t, **TOLD), sums(x, t, **TOLD)
    assert torch.equal(found, torch.stack([bare[0], everywhere[1], bare[2]]))


FLOW = RectifiedFlow()
one_time = torch.full((3,), 400.0)


def walked(orthogonal=0.0, norm=None, momentum=0.0, s=3.0, calls=1):
    """The answers at x_t and on, of a flow at t = 0.4."""
    model = guided(Model(), s, null, project=Projection(_x0, orthogonal, norm, momentum))
    return [model(x * (i + 1), one_time, y=labels) for i in range(calls)]


def _x0(output, x_t, t):
    return to_x0("velocity", output, x_t, 0.6, 0.4)


def both(number=0):
    """x̂_0 that is told all, and that is told nothing, by a float64 of their own."""
    state, nothing = x * (number + 1), torch.full_like(labels, NULL)
    return [state - 0.4 * Model()(state, one_time, y) for y in (labels, nothing)]


@pytest.mark.parametrize("s", [1.5, 4.0])
def test_projected_guidance_that_projects_nothing_is_plain_guidance_bit_for_bit(s):
    assert torch.equal(walked(s=s)[0], guided(Model(), s, null)(x, one_time, y=labels))
    assert projection(FLOW, 0.0, None, 0.0) is None


def test_projected_guidance_is_the_papers():
    """Sadat et al. 2024, algorithm 1, in x̂_0, over three steps."""
    scale, momentum, norm, eta = 3.0, -0.5, 2.0, 0.25
    found, running = walked(1 - eta, norm, momentum, scale, 3), 0.0
    for number, answer in enumerate(found):
        told, nothing = both(number)
        running = told - nothing + momentum * running
        update = running * torch.clamp(norm / running.flatten(1).norm(dim=1), max=1.0).view(-1, 1, 1, 1)
        unit = torch.nn.functional.normalize(told.flatten(1), dim=1)
        parallel = ((update.flatten(1) * unit).sum(1, keepdim=True) * unit).view_as(update)
        expected = told + (scale - 1) * (update - parallel + eta * parallel)
        state = x * (number + 1)
        torch.testing.assert_close(_x0(answer, state, one_time), expected, rtol=0, atol=1e-12)


GAUSSIANS = [GaussianDiffusion(linear(1000)), GaussianDiffusion(linear(1000), "v")]


@pytest.mark.parametrize("process", [FLOW, RectifiedFlow(prediction="x0"), EDM(0.4), *GAUSSIANS])
def test_a_projection_knows_the_level_by_what_the_model_is_told(process):
    t = 400 if isinstance(process, GaussianDiffusion) else 0.4
    state, answer = torch.ones(2, 1, 2, 2).double(), torch.full((2, 1, 2, 2), 0.3).double()
    found = projection(process, 1.0, None, 0.0).x0(answer, state, process.model_time(t, state))
    rounded = 1e-6 if isinstance(process, EDM) else 1e-12  # the model is told a float32
    torch.testing.assert_close(found, process.x0(answer, state, t), rtol=0, atol=rounded)


class Weak(Model):
    def __call__(self, x, t, y):
        return 0.5 * super().__call__(x, t, y) + 0.1


@pytest.mark.parametrize("s", [0.0, 1.5, 4.0])
def test_a_weaker_model_is_told_the_same_and_led_away_from(s):
    """Karras et al. 2024, equation 3; a model without classes can be led so too."""
    model, weak = Model(), Weak()
    strong, other = Model()(x, t, y=labels), Weak()(x, t, y=labels)
    for nobody in (null, None):
        found = guided(model, s, nobody, weak=weak)(x, t, y=labels)
        torch.testing.assert_close(found, other + s * (strong - other), rtol=0, atol=1e-14)
    assert model.rows == weak.rows == [3, 3]
    assert torch.equal(guided(Model(), 1.0, None, weak=weak)(x, t, y=labels), strong)
    assert weak.rows == [3, 3]


@pytest.mark.parametrize("process", [FLOW, EDM(), *GAUSSIANS])
@pytest.mark.parametrize("s", [0.0, 0.6, 2.0])
def test_renoised_with_the_null_a_walk_is_the_papers(process, s):
    """Chung et al. 2024, algorithm 2: x_p = α_p x̂_0 (guided) + σ_p ε (null), step by step in our own words."""

    def model(x, t, y):
        time = t.double().view(-1, 1, 1, 1) / process.last_time
        return torch.tanh(x * (1 + y.view(-1, 1, 1, 1) / 10)) + time

    denoiser = guided(model, s, null, renoise="away")
    sampler = "ddim" if process in GAUSSIANS else "euler"
    found = sample(lambda x, t: denoiser(x, t, y=labels), process, x, sampler, 5, renoise="away")
    times, state = process.walk(5, "trailing"), x
    for here, there in zip(times, [*times[1:], process.clean], strict=True):
        told, nothing = (
            model(state, process.model_time(here, state), y) for y in (labels, torch.full_like(labels, NULL))
        )
        clean = process.x0(nothing + s * (told - nothing), state, here)
        alpha, sigma = process.level(there)
        state = alpha * clean + sigma * process.eps(nothing, state, here)
    torch.testing.assert_close(found, state, rtol=0, atol=1e-12)
    if s == 0:  # nothing but the null
        alone = sample(lambda x, t: model(x, t, torch.full_like(labels, NULL)), process, x, sampler, 5)
        torch.testing.assert_close(found, alone, rtol=0, atol=1e-12)


def test_a_clipped_estimate_keeps_the_nulls_noise():
    output = Apart(torch.full_like(x, 9.0), torch.full_like(x, 0.5))
    x0, eps, _ = predict(lambda x, t: output, GaussianDiffusion(linear(1000), "x0"), x, 500, clip=True)
    assert torch.equal(x0, torch.ones_like(x))
    torch.testing.assert_close(eps, GaussianDiffusion(linear(1000), "x0").eps(output.renoise, x, 500))
