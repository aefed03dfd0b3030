"""Averages of other widths, made of snapshots: the profiles, their fit, and what a run keeps for it."""

import math
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from dtrain.checkpoint.averages import KEY, combination, combined, reconstruct
from dtrain.checkpoint.directory import complete, step_of
from dtrain.checkpoint.export import load_weights, open_checkpoint
from dtrain.checkpoint.format import Checkpoint
from dtrain.checkpoint.snapshots import retire
from dtrain.config.averages import EMAProfile, gamma_of
from dtrain.errors import UserError
from dtrain.run import RunDirectory
from dtrain.training import ema
from tests.checkpoint.written import save
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.training.runs import train

STEPS, SNAPSHOTS, TRACKED = 2000, 16, (0.05, 0.1)
PROFILES = "ema=[{sigma_rel: 0.05}, {sigma_rel: 0.1}]"


def shares(sigma, steps, of=None):
    """What each of the weights after steps 1, 2, … counts in the average after `steps`, as a whole vector of `of`."""
    k, exponent = np.arange(1, steps + 1), gamma_of(sigma) + 1
    found = np.zeros(of or steps)
    found[:steps] = (k / steps) ** exponent - ((k - 1) / steps) ** exponent
    return found


@pytest.fixture(scope="module")
def trajectories():
    """(3, STEPS, 500): smooth, a random walk, and one that comes back to its mean."""
    rng, k = np.random.default_rng(0), np.arange(1, STEPS + 1)[:, None] / STEPS
    amplitude, rate, phase = rng.normal(size=500), rng.uniform(1, 4, 500), rng.uniform(0, 6, 500)
    steps, back = rng.normal(size=(STEPS, 500)), np.zeros((STEPS, 500))
    for n in range(1, STEPS):
        back[n] = 0.98 * back[n - 1] + steps[n]
    smooth = amplitude * (np.sin(rate * k + phase) + np.exp(-5 * k))
    return np.stack([smooth, steps.cumsum(0), back])


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory, trajectories):
    """Its directory and config: averages of the trajectories by their exact sums, kept as its checkpoints went."""
    config = tiny(digits, tmp_path_factory.mktemp("averages"), PROFILES, f"train.steps={STEPS}")
    directory = RunDirectory(config.run.path)
    directory.make_folders()
    directory.save_config(config)
    for step in range(STEPS // SNAPSHOTS, STEPS + 1, STEPS // SNAPSHOTS):
        tensors = {"frozen:fp32": np.arange(5, dtype=np.float32)}
        for number, trajectory in enumerate(trajectories):
            tensors[f"w{number}:fp32"] = trajectory[step - 1].astype(np.float32)
            for key, sigma in zip(("ema_0", "ema_1"), TRACKED, strict=True):
                tensors[f"w{number}:{key}"] = (shares(sigma, step) @ trajectory[:step]).astype(np.float32)
        cuts = [
            {n: (0, len(t) // 2) for n, t in tensors.items()},
            {n: (len(t) // 2, len(t)) for n, t in tensors.items()},
        ]
        meta = {"step": step, "images": 24 * step, "optimizer_steps": step, "config": config.model_dump(mode="json")}
        save(directory.checkpoints, tensors, cuts, step, meta)
        if step < STEPS:
            retire(directory, config, step)
    return directory, config


@pytest.mark.parametrize(("sigma", "gamma"), [(0.05, 16.97), (0.10, 6.94), (math.sqrt(1 / 12), 0.0)])
def test_the_exponent_of_a_width(sigma, gamma):
    found = gamma_of(sigma)
    assert found == pytest.approx(gamma, abs=5e-3)
    assert (found + 1) / ((found + 2) ** 2 * (found + 3)) == pytest.approx(sigma**2, rel=1e-12)


@pytest.mark.parametrize("sigma", [0.03, 0.05, 0.1, 0.25])
def test_the_recursion_is_the_sum_over_all_weights(trajectories, sigma):
    profile, exact, kept = EMAProfile(sigma_rel=sigma), np.zeros((3, 500)), torch.nn.Parameter(torch.zeros(1500))
    optimizer, step = torch.optim.AdamW([kept], lr=0.0), 0
    optimizer.state[kept]["ema_0"] = torch.full((1500,), 1e9)  # the initial weights: gone after the first step
    ema.attach(optimizer, [profile], lambda: False, lambda key: step)
    (move,) = optimizer._optimizer_step_post_hooks.values()
    for step in range(1, STEPS + 1):
        exact += profile.weight(step) * (trajectories[:, step - 1] - exact)
        with torch.no_grad():
            kept.copy_(torch.from_numpy(trajectories[:, step - 1].ravel()))
        move(optimizer)
    expected = np.einsum("k,nkd->nd", shares(sigma, STEPS), trajectories)
    scale = abs(expected).max()
    assert abs(exact - expected).max() < 1e-12 * scale
    assert abs(optimizer.state[kept]["ema_0"].numpy() - expected.ravel()).max() < 1e-6 * scale


def made(run, sigma, step=None):
    found = combination(*run, sigma, step)
    values = [np.empty(500, np.float32) for _ in range(3)]
    found.read_into((f"w{number}:{KEY}", 0, one) for number, one in enumerate(values))
    return np.stack(values)


@pytest.mark.parametrize(("sigma", "most"), [(0.05, 1e-6), (0.075, 1e-3), (0.1, 1e-6), (0.15, 2e-3), (0.2, 8e-3)])
def test_an_average_of_any_width_between_is_as_near_as_least_squares_can_be(run, trajectories, sigma, most):
    wanted = np.einsum("k,nkd->nd", shares(sigma, STEPS), trajectories)
    way = np.linalg.norm(trajectories[:, -1] - wanted, axis=1)
    assert (np.linalg.norm(made(run, sigma) - wanted, axis=1) <= most * way).all()

    steps = np.repeat(np.arange(1, SNAPSHOTS + 1) * STEPS // SNAPSHOTS, 2)
    profiles = np.stack([shares(s, n, STEPS) for s, n in zip(TRACKED * SNAPSHOTS, steps, strict=True)], axis=1)
    target, gammas = shares(sigma, STEPS), np.array([gamma_of(s) for s in TRACKED * SNAPSHOTS])
    weights = combined(steps.astype(float), gammas, float(STEPS), gamma_of(sigma))
    best = np.linalg.lstsq(profiles, target, rcond=None)[0]
    off, least = (np.linalg.norm(profiles @ one - target) for one in (weights, best))
    assert off <= 1.05 * least + 1e-12
    assert weights.sum() == pytest.approx(1, abs=1e-12)


def test_it_can_be_made_at_every_step_that_has_a_snapshot_and_at_no_other(run, trajectories):
    wanted = np.einsum("k,nkd->nd", shares(0.08, 1500), trajectories[:, :1500])
    way = np.linalg.norm(trajectories[:, 1499] - wanted, axis=1)
    assert (np.linalg.norm(made(run, 0.08, 1500) - wanted, axis=1) <= 2e-3 * way).all()
    with pytest.raises(UserError, match=r"no snapshot of step 1501; there are: 125, 250, .*, 2000$"):
        combination(*run, 0.08, 1501)


def test_it_is_written_as_the_weights_of_a_checkpoint_without_torch(run, tmp_path, monkeypatch):
    monkeypatch.setattr("dtrain.checkpoint.format.BLOCK", 1024)  # bytes: pieces over several blocks
    said = reconstruct(run[0], 0.13, None, tmp_path / "out")
    assert "sigma_rel 0.13 at step 2000, of 32 snapshots from step 125 on" in said
    written = Checkpoint.open(tmp_path / "out")
    written.verify()
    assert written.tensors == {"w0:fp32": 500, "w1:fp32": 500, "w2:fp32": 500, "frozen:fp32": 5}
    assert np.array_equal(np.stack([written.tensor(f"w{n}:fp32") for n in range(3)]), made(run, 0.13))
    assert written.tensor("frozen:fp32").tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="is there already"):
        reconstruct(run[0], 0.13, None, tmp_path / "out")
    code = "import sys; from dtrain.checkpoint import averages; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


AVERAGED = (
    *(PROFILES, "train.steps=8", "train.snapshot_every=2", "train.checkpoint_every=4", "train.keep_last=1"),
    *("deepspeed.zero_stage=2", "data.batch_size=12"),
)


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    config = tiny(digits, tmp_path_factory.mktemp("trained"), *AVERAGED)
    run_ranks(train, 2, config)
    return RunDirectory(config.run.path), config


def retire_alone(run, config, step):
    from dtrain import faults

    faults.arm(0, 1, [])
    retire(run, config, step)


def module_of(run, config, sigma, step=None):
    from dtrain.models.build import build

    return load_weights(combination(run, config, sigma, step), build(config), KEY)


def test_a_run_keeps_the_averages_of_its_checkpoints_and_gives_the_tracked_ones_back(trained):
    from dtrain.models.build import build

    run, config = trained
    # What the threads that remove checkpoints had no time for at the end is there as a whole checkpoint.
    kept = {step_of(path) for folder in (run.averages, run.checkpoints) for path in complete(folder)}
    assert kept == {2, 4, 6, 8}
    assert complete(run.averages)
    snapshot = Checkpoint.open(complete(run.averages)[0])
    assert {name.rpartition(":")[2] for name in snapshot.tensors} == {"ema_0", "ema_1", "fp32"}
    assert [name for name in snapshot.tensors if name.endswith(":fp32")] == ["pos_embed:fp32"]
    for number, sigma in enumerate(TRACKED):
        own = load_weights(open_checkpoint(run), build(config), f"ema_{number}")
        theirs = module_of(run, config, sigma)
        for (name, p), (_, q) in zip(own.named_parameters(), theirs.named_parameters(), strict=True):
            assert torch.allclose(p, q, rtol=1e-6, atol=1e-7), name


@pytest.mark.parametrize("point", ["save:write", "save:averages", "save:remove"])
def test_a_kill_while_a_checkpoint_goes_loses_no_average(trained, tmp_path, point):
    run = RunDirectory(shutil.copytree(trained[0].path, tmp_path / "run"))
    (*others, last), config = complete(run.checkpoints), trained[1]
    for path in (*others, *complete(run.averages)):
        shutil.rmtree(path)
    fault = {"DTRAIN_FAULTS": f"sigkill at={point}"}
    with pytest.raises(RuntimeError, match="exit code -9"):
        run_ranks(retire_alone, 1, run, config, step_of(last), environment=fault)
    there = [path for folder in (run.checkpoints, run.averages) for path in complete(folder)]
    assert [step_of(path) for path in there] == [8]
    if last.exists():  # the next save, or start, removes it again
        retire(run, config, 8)
    assert [step_of(path) for path in complete(run.averages)] == [8]
    Checkpoint.open(complete(run.averages)[0]).verify()


def test_a_run_that_was_stopped_has_the_same_averages_bit_for_bit(trained, digits, tmp_path):
    _, config = trained
    for steps in (3, 8):
        again = tiny(digits, tmp_path, *AVERAGED, f"train.steps={steps}")
        run_ranks(train, 2, again)
    pairs = zip(*(module_of(RunDirectory(c.run.path), c, 0.13).parameters() for c in (config, again)), strict=True)
    assert all(torch.equal(p, q) for p, q in pairs)


def test_a_profile_that_a_checkpoint_lacks_is_refused_or_begins_there_and_makes_no_others(digits, tmp_path):
    short = ("train.steps=2", "data.batch_size=12", "train.snapshot_every=1")
    run_ranks(train, 1, tiny(digits, tmp_path, *short, "ema=[{sigma_rel: 0.05}]"))
    more = (*short, PROFILES, "train.steps=4")
    with pytest.raises(RuntimeError, match=r"SharedError: .* has not the average ema.1 \(sigma_rel 0.1\), which goes"):
        run_ranks(train, 1, tiny(digits, tmp_path, *more))
    for last in (4, 5):  # it stays known over another start
        config = tiny(digits, tmp_path, *more, "train.ema_new=begin", f"train.steps={last}")
        run_ranks(train, 1, config)
    run = RunDirectory(config.run.path)
    assert open_checkpoint(run).meta["ema_begun"] == {"ema_1": 2}
    with pytest.raises(UserError, match=r"ema.1 began after step 2 \(train.ema_new=begin\)"):
        combination(run, config, 0.075)


def test_a_run_without_power_functions_keeps_none_and_says_so(finished_run):
    run = RunDirectory(finished_run.run.path)
    assert not run.averages.exists()
    with pytest.raises(UserError, match=r"has no power-function average: an average of sigma_rel 0.1 is made of two"):
        combination(run, finished_run, 0.1)
