import math
from statistics import NormalDist

import numpy as np
import pytest
import torch

from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.schedule import linear
from dtrain.diffusion.times import LogitNormal, SecondMoment, Uniform, by_noise_level, middles
from dtrain.objectives.denoising import Denoising
from tests.host_waits import HostWaits
from tests.objectives.rows import row_losses

grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
last = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)


def test_the_logit_normal_has_its_quantiles_and_stays_inside():
    times = LogitNormal(0.4, 0.8)
    normal = NormalDist(0.4, 0.8)
    for u in (1e-9, 0.01, 0.5, 0.9, 1 - 1e-9):
        expected = 1 / (1 + math.exp(-normal.inv_cdf(u)))
        assert float(times.place(torch.tensor([u], dtype=torch.float64))) == pytest.approx(expected, rel=1e-9)
    edge = LogitNormal(5.0, 50.0).place(last)
    assert float(edge[0]) >= 0
    assert float(edge[1]) < 1
    assert GaussianDiffusion(linear(1000)).time(edge).tolist() == [0, 999]


def test_uniform_is_the_draw_itself():
    assert Uniform().place(grid) is grid
    assert Uniform().weights(grid) is None


def filled(losses):
    times = SecondMoment(len(losses))
    for _ in range(10):
        times.observe(torch.arange(len(losses)), torch.as_tensor(losses, dtype=torch.float32))
    return times


def test_importance_is_uniform_until_every_timestep_has_ten_losses():
    times = SecondMoment(4)
    for _ in range(9):
        times.observe(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    times.observe(torch.tensor([0, 1, 2, 0, 0]), torch.ones(5))
    torch.testing.assert_close(times.place(grid), grid, rtol=0, atol=1e-8)
    torch.testing.assert_close(times.weights(grid), torch.ones_like(grid))
    times.observe(torch.tensor([3]), torch.ones(1))
    assert float((times.place(grid) - grid).abs().max()) > 0.05


def test_importance_visits_each_timestep_as_often_as_the_root_of_its_second_moment():
    losses = [1.0, 2.0, 0.5, 4.0]
    times = filled(losses)
    p = 0.999 * np.array(losses) / sum(losses) + 0.001 / 4
    np.testing.assert_allclose(times.probabilities(), p, rtol=1e-6)
    t = (times.place(grid) * 4).long()
    np.testing.assert_allclose(torch.bincount(t).numpy() / len(grid), p, atol=2e-5)


def test_importance_remembers_only_the_last_ten():
    times = filled([1.0, 1.0])
    for value in range(10):
        times.observe(torch.tensor([1, 1, 0]), torch.tensor([100.0, float(value), 1.0]))
    kept = [v for value in range(5, 10) for v in (100.0, float(value))]
    assert times.history[1].tolist() == kept
    root = np.sqrt(np.mean(np.square(kept)))
    np.testing.assert_allclose(times.probabilities()[1], 0.999 * root / (root + 1) + 0.0005, rtol=1e-6)


def test_importance_weights_keep_the_mean_loss_of_uniform_times():
    times = filled([1.0, 2.0, 0.5, 4.0, 0.0])
    values = torch.tensor([3.0, -1.0, 10.0, 0.25, 7.0]).double()
    place = times.place(grid)
    weighted = (times.weights(place) * values[(place * 5).long()]).mean()
    assert float(weighted) == pytest.approx(float(values.mean()), rel=2e-3)


@pytest.mark.parametrize("T", [3, 29, 1000])
def test_a_place_of_importance_is_within_its_timestep(T):
    times = filled(np.random.default_rng(T).random(T) ** 8)
    place = times.place(torch.cat([grid, last]))
    assert float(place.min()) >= 0
    assert float(place.max()) < 1
    edges = times.probabilities().cumsum(0)
    expected = np.searchsorted(edges.numpy() / float(edges[-1]), grid.numpy(), side="right")
    agree = (place[:-2] * T).long().numpy() == expected
    assert agree.mean() > 0.9999  # but for rounding at an edge


def test_importance_resumes_exactly_from_its_state_and_passes_over_losses_that_are_not_finite():
    times, twin = filled([1.0, 2.0, 0.5]), SecondMoment(3)
    times.observe(torch.tensor([0, 1]), torch.tensor([math.nan, math.inf]))
    assert times.history.isfinite().all()
    twin.load_state({k: v.clone() for k, v in times.state().items()})
    for each in (times, twin):
        each.observe(torch.tensor([2, 0]), torch.tensor([9.0, 0.1]))
    assert torch.equal(times.place(grid), twin.place(grid))
    with pytest.raises(ValueError, match="shape"):
        SecondMoment(4).load_state(times.state())


def one_after_the_other(times, t, losses):
    """What `observe` does, row by row."""
    for timestep, loss in zip(t.tolist(), losses.tolist(), strict=True):
        if not math.isfinite(loss):
            continue
        count = int(times.counts[timestep])
        if count == times.KEPT:
            times.history[timestep, :-1] = times.history[timestep, 1:].clone()
            times.history[timestep, -1] = loss
        else:
            times.history[timestep, count] = loss
            times.counts[timestep] = count + 1


@pytest.mark.parametrize("timesteps", [1, 7, 500])
def test_observing_a_batch_at_once_is_observing_its_rows_one_after_the_other(timesteps):
    generator = torch.Generator().manual_seed(timesteps)
    times, twin = SecondMoment(timesteps), SecondMoment(timesteps)
    for n in (0, 1, 3, 64, 5, 300, 64, 1, 2000, 64):
        t = torch.randint(0, timesteps, (n,), generator=generator)
        losses = torch.rand(n, generator=generator, dtype=torch.float64) ** 8
        losses[torch.rand(n, generator=generator) < 0.1] = math.nan
        losses[torch.rand(n, generator=generator) < 0.05] = math.inf
        times.observe(t, losses)
        one_after_the_other(twin, t, losses)
        assert torch.equal(times.history, twin.history)
        assert torch.equal(times.counts, twin.counts)
        assert torch.equal(times.place(grid[::100]), twin.place(grid[::100]))
    assert times.counts.max() == times.KEPT


def test_observing_and_visiting_on_a_device_never_make_the_host_wait():
    times, device = SecondMoment(20), torch.device("meta")
    t, losses = torch.zeros(6, dtype=torch.int64, device=device), torch.zeros(6, device=device)
    times.observe(t, losses)  # brings what is kept to the device
    with HostWaits() as waits:
        times.observe(t, losses)
        times.weights(times.place(losses.double()))
    assert waits.found == []


def test_an_objective_observes_the_unweighted_losses():
    times = filled([1.0, 3.0, 1.0, 3.0] * 10)
    objective = Denoising(GaussianDiffusion(linear(40)), times=times)
    x0, u = torch.zeros(64, 1, 2, 2), torch.rand(64, generator=torch.Generator().manual_seed(0)).double()
    noise = torch.ones_like(x0)
    weights = times.weights(objective.place(u))
    losses = row_losses(
        objective, lambda x, t, y: torch.zeros_like(x), x0, noise, u, {"y": torch.zeros(64, dtype=torch.long)}
    )
    torch.testing.assert_close(losses, weights.float())
    t = objective.process.time(objective.place(u))
    objective.observe(u, losses)
    for timestep in set(t.tolist()):
        new = min(10, int((t == timestep).sum()))
        torch.testing.assert_close(times.history[timestep, -new:], torch.ones(new))


def test_losses_are_summed_by_eighths_of_the_process():
    place, losses = torch.tensor([0.0, 0.124, 0.125, 0.99, 1.0]).double(), torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    sums, counts = by_noise_level(losses, place)
    assert sums.tolist() == [3, 4, 0, 0, 0, 0, 0, 24]
    assert counts.tolist() == [2, 1, 0, 0, 0, 0, 0, 2]
    of_middles = by_noise_level(torch.ones(8), torch.from_numpy(middles()))[1]
    assert of_middles.tolist() == [1] * 8
