"""Progressive distillation on Gaussian data, where the teacher's two steps are a closed form, in float64."""

from itertools import pairwise

import pytest
import torch

from dtrain.config.distillation import Distillation as Section
from dtrain.diffusion.flow import RectifiedFlow
from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.samplers import sample
from dtrain.diffusion.schedule import named
from dtrain.objectives.denoising import Denoising
from dtrain.objectives.distillation import Distillation
from dtrain.objectives.objective import Frozen
from dtrain.position import Position
from tests.diffusion.gaussian_data import STD, normals

N, ROWS = 4, 64  # steps of the student, whose times and their halves float32 holds exactly
SCHEDULE = named("cosine", 1000, True)
PROCESSES = {
    "flow": RectifiedFlow(),
    "flow of x0": RectifiedFlow(prediction="x0"),
    "v": GaussianDiffusion(SCHEDULE, "v"),
    "x0": GaussianDiffusion(SCHEDULE, "x0"),
}
SAMPLER = {"flow": "euler", "flow of x0": "euler", "v": "ddim", "x0": "ddim"}
MEANS = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64)  # of two classes, and where nothing is told


def column(values):
    return torch.tensor(values, dtype=torch.float64).view(-1, 1, 1, 1)


def levels(process, told):
    """α and σ of what rows are told, (n, 1, 1, 1) each."""
    return [column(one) for one in zip(*(process.level_told(time) for time in told.tolist()), strict=True)]


def answer(process, x0, eps, alpha, sigma):
    """What a network of this prediction says of x_0 and ε, written out."""
    return {"velocity": eps - x0, "x0": x0, "v": alpha * eps - sigma * x0}[process.prediction]


def posterior_mean(x, alpha, sigma, mean):
    """E[x_0 | x_t] of x_0 ~ N(mean, STD²)."""
    return mean + alpha * STD**2 / (alpha**2 * STD**2 + sigma**2) * (x - alpha * mean)


def exact(process):
    """The perfect network, whose rows have times of their own. y (n,): whose mean."""

    def network(x, told, y=None):
        alpha, sigma = levels(process, told)
        mean = MEANS[0] if y is None else MEANS[y].view(-1, 1, 1, 1)
        x0 = posterior_mean(x, alpha, sigma, mean)
        return answer(process, x0, (x - alpha * x0) / sigma, alpha, sigma)

    return network


def two_steps(process, x, number, estimate):
    """x_s of x = x_t by two DDIM steps from the place `number` of the walk. estimate(x, α, σ) → x̂_0."""
    half = [*process.walk(2 * N, "trailing"), process.clean][2 * number : 2 * number + 3]
    for here, there in pairwise(half):
        (alpha, sigma), (alpha_next, sigma_next) = process.level(here), process.level(there)
        x0 = estimate(x, alpha, sigma)
        x = alpha_next * x0 + sigma_next * (x - alpha * x0) / sigma
    return x


def one_step_answer(process, x, x_s, number):
    """What a network must say at x = x_t, so that one step from there ends at x_s."""
    walk = [*process.walk(N, "trailing"), process.clean]
    (alpha, sigma), (alpha_s, sigma_s) = process.level(walk[number]), process.level(walk[number + 1])
    x0 = (x_s - sigma_s / sigma * x) / (alpha_s - sigma_s / sigma * alpha)
    return answer(process, x0, (x - alpha * x0) / sigma, alpha, sigma)


def objective(process, network, **keys):
    made = Distillation(
        Denoising(process),
        Section(kind="distillation", teacher="x", steps=N, **keys),
        lambda condition: {"y": torch.full_like(condition["y"], 2)},
        lambda device: Frozen(network, "its own"),
    )
    made.open(torch.device("cpu"))
    return made


def batch():
    """Rows whose draws fall on every place of the walk."""
    time = (torch.arange(ROWS) + 0.5).double() / ROWS
    return {"x_0": normals(ROWS, 1, 2, 2), "noise": normals(ROWS, 1, 2, 2, seed=1), "time": time}


def losses(made, student, condition):
    return made.losses("main", {"backbone": student}, batch(), condition, Position())


@pytest.mark.parametrize("name", PROCESSES)
def test_the_target_is_what_one_step_must_say_to_end_where_two_do(name):
    process = PROCESSES[name]
    given, seen = batch(), {}
    number = (given["time"] * N).long()
    walk = [*process.walk(N, "trailing")]

    def silent(x, told):
        seen["x"] = x
        return torch.zeros_like(x)

    found = losses(objective(process, exact(process)), silent, {})
    expected, places = [], []
    for row, place in enumerate(number.tolist()):
        alpha, sigma = process.level(walk[place])
        x = alpha * given["x_0"][row] + sigma * given["noise"][row]
        torch.testing.assert_close(seen["x"][row], x, rtol=0, atol=1e-12)
        x_s = two_steps(process, x, place, lambda x, a, s: posterior_mean(x, a, s, MEANS[0]))
        target = one_step_answer(process, x, x_s, place)
        if name == "flow of x0":  # the loss is of the velocity, in which x_0 counts 1/t
            target = target / walk[place]
        expected.append(target.square().mean())
        places.append(walk[place] if "flow" in name else (walk[place] + 0.5) / 1000)
    torch.testing.assert_close(found.rows, torch.stack(expected), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.place, torch.tensor(places, dtype=torch.float64))
    assert set(number.tolist()) == set(range(N))


def taught(process):
    """The student that says just that."""
    told = [float(process.model_time(t, torch.zeros(1))[0]) for t in process.walk(N, "trailing")]

    def network(x, time):
        found = torch.empty_like(x)
        for place, one in enumerate(told):
            rows = time.double() == one
            x_s = two_steps(process, x[rows], place, lambda x, a, s: posterior_mean(x, a, s, MEANS[0]))
            found[rows] = one_step_answer(process, x[rows], x_s, place)
        return found

    return network


@pytest.mark.parametrize("name", PROCESSES)
def test_the_student_without_loss_draws_in_n_steps_what_the_teacher_draws_in_2_n(name):
    process, x_T = PROCESSES[name], normals(50, 1, 2, 2, seed=7)
    student = taught(process)
    assert losses(objective(process, exact(process)), student, {}).rows.max() < 1e-23
    own, theirs = (sample(one, process, x_T, SAMPLER[name], n) for one, n in ((student, N), (exact(process), 2 * N)))
    torch.testing.assert_close(own, theirs, rtol=0, atol=1e-12)
    coarse = sample(exact(process), process, x_T, SAMPLER[name], N)
    assert (coarse - theirs).abs().max() > 1e-2  # the teacher itself draws something else in as few


def test_of_a_flow_that_stands_still_the_student_learns_to_stand_still():
    still = lambda x, told: torch.zeros_like(x)  # noqa: E731
    found = losses(objective(PROCESSES["flow"], still), still, {})
    assert found.rows.abs().max() < 1e-24


def test_guidance_of_the_teacher_is_in_the_target_where_a_row_is_told_something():
    process, scale, y = PROCESSES["flow"], 2.5, torch.arange(ROWS) % 3  # 2: told nothing
    given, number = batch(), (batch()["time"] * N).long()
    found = losses(objective(process, exact(process), guidance=scale), lambda x, t, y: torch.zeros_like(x), {"y": y})
    for row, place in enumerate(number.tolist()):
        t = process.walk(N)[place]
        x = (1 - t) * given["x_0"][row] + t * given["noise"][row]
        mean = MEANS[y[row]]

        def led(x, alpha, sigma, mean=mean):
            away = posterior_mean(x, alpha, sigma, MEANS[2])
            return away + scale * (posterior_mean(x, alpha, sigma, mean) - away)

        target = one_step_answer(process, x, two_steps(process, x, place, led), place)
        torch.testing.assert_close(found.rows[row], target.square().mean(), rtol=1e-12, atol=1e-12)


def test_a_teacher_in_bfloat16_is_near_itself_and_the_student_stays_as_it_is():
    layer = torch.nn.Conv2d(1, 1, 3, padding=1).requires_grad_(False)
    network = lambda x, t: layer(x.float())  # noqa: E731
    dtypes = []

    def student(x, t):
        dtypes.append(layer(x.float()).dtype)
        return torch.zeros_like(x)

    exact, rounded = (
        losses(objective(PROCESSES["flow"], network, precision=one), student, {}).rows for one in ("fp32", "bf16")
    )
    assert 0 < ((rounded - exact) / exact).abs().max() < 0.1
    assert dtypes == [torch.float32] * 2
