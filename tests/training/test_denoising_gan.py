"""A denoising GAN through the whole training: plain PyTorch's losses in every shape, kills, refusals, its samples."""

import itertools

import numpy as np
import pytest
import torch
from torch.nn.functional import softplus

import dtrain
from dtrain.data.shards.manifest import load_all
from dtrain.data.stream import Completion, StepDataset
from dtrain.errors import UserError
from dtrain.models.build import build
from dtrain.models.layers import initialize
from dtrain.models.step_critic import StepCritic
from dtrain.randomness import key_of
from dtrain.tracking.journal import read
from tests.digits import tiny
from tests.longer import mostly_longer
from tests.ranks import run_ranks
from tests.training.runs import train

GAN = "diffusion={process: ddgan, latent: 7, r1: 0.5, r1_every: 2, critic: {width: 8, lr: 3.0e-4, betas: [0.5, 0.9]}}"
SHORT = ("optim.lr=2e-4", "optim.betas=[0.5, 0.9]", "eval.steps=4", "ema.0.decay=0.5", "train.keep_last=9")
NAMES = ("loss", "loss_critic", "critic_real", "critic_fake", "r1", "grad_norm", "grad_norm_critic")
STEPS = 10


def against_critic(digits, folder, *overrides):
    return tiny(digits, folder, GAN, *SHORT, *overrides)


def metrics(config, names=NAMES):
    lines = [line["metrics"] for line in read(config.run.path / "journal.jsonl") if line["event"] == "train"]
    return [{name: line[name] for name in names if name in line} for line in lines]


def by_hand(config, steps):
    """Plain PyTorch, the chain's formulas written out: losses, scores and the penalty of every step."""
    section, timesteps = config.diffusion, torch.arange(1, 5, dtype=torch.float64)
    kept = torch.exp(-0.1 / 4 - 19.9 * (2 * timesteps - 1) / 32)
    alpha_bar = torch.cat([torch.ones(1).double(), kept.cumprod(0)])  # of t = 0 … 4
    model, critic = build(config), StepCritic(8, 1, section.critic.width, 10, alone=False)
    initialize(critic, key_of(f"{config.run.seed}/critic"))
    own, other = (
        torch.optim.AdamW(network.parameters(), lr=1.0, betas=(0.5, 0.9), weight_decay=0.0)
        for network in (model, critic)
    )
    data, complete, found = StepDataset(config, load_all(config.data), 0, 1, 0), Completion(config), []

    def move(network, optimizer, loss, rate):
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

    for step in range(steps):
        batch = complete(data[step])
        x, y = batch["image"], torch.where(batch["drop"] < 0, 10, batch["label"])
        t = 1 + (4 * batch["time"]).long()  # 1 … 4
        now, before = (alpha_bar[n].float().view(-1, 1, 1, 1) for n in (t, t - 1))
        x_p = before.sqrt() * x + (1 - before).sqrt() * batch["noise"]
        x_t = (now / before).sqrt() * x_p + (1 - now / before).sqrt() * batch["step_noise"]

        def drawn(now=now, before=before, x_t=x_t, t=t, y=y, batch=batch):
            told = torch.cat([t[:, None] - 1.0, batch["latent"]], dim=1)
            x_0 = model(x_t, told.float(), y=y)
            beta = 1 - now / before
            mean = (before.sqrt() * beta * x_0 + (1 - beta).sqrt() * (1 - before) * x_t) / (1 - now)
            return mean + (beta * (1 - before) / (1 - now)).sqrt() * batch["reverse_noise"]

        share = min(1, (step + 1) / config.optim.warmup_steps)
        critic.requires_grad_(False)
        loss = softplus(-critic(drawn(), x_t, t - 1, y)).mean()
        move(model, own, loss, share * config.optim.lr)
        critic.requires_grad_(True)
        with torch.no_grad():
            fake = drawn()
        real, drawn_scores = critic(x_p.requires_grad_(), x_t, t - 1, y), critic(fake, x_t, t - 1, y)
        loss_critic = (softplus(-real) + softplus(drawn_scores)).mean()
        line = {"critic_real": real.mean().item(), "critic_fake": drawn_scores.mean().item()}
        if step % 2 == 0:
            (slope,) = torch.autograd.grad(real.sum(), x_p, create_graph=True)
            squared = slope.square().sum((1, 2, 3)).mean()
            loss_critic, line["r1"] = loss_critic + 0.25 * squared, squared.item()
        move(critic, other, loss_critic, share * section.critic.lr)
        found.append({"loss": loss.item(), "loss_critic": loss_critic.item(), **line})
    return found


@pytest.fixture(scope="module")
def expected(digits, tmp_path_factory):
    return by_hand(against_critic(digits, tmp_path_factory.mktemp("plain")), STEPS)


SHAPES = list(itertools.product((0, 1, 2, 3), (1, 2), ("null", "6")))


@pytest.mark.parametrize(("stage", "ranks", "micro"), mostly_longer(SHAPES, [(0, 1, "null"), (2, 2, "6"), (3, 2, "6")]))
def test_its_losses_are_those_of_plain_pytorch(digits, tmp_path, expected, stage, ranks, micro):
    shape = f"deepspeed.zero_stage={stage}", f"train.micro_batch={micro}", f"train.steps={STEPS}"
    config = against_critic(digits, tmp_path, *shape)
    run_ranks(train, ranks, config)
    names = ("loss", "loss_critic", "critic_real", "critic_fake", "r1")
    assert [line.keys() for line in metrics(config, names)] == [line.keys() for line in expected]
    for ours, theirs in zip(metrics(config, names), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)


POINTS = ("step step=6", "step:update step=6", "step:moved step=6", "save:write step=4", "save:rename step=4")


@pytest.mark.parametrize("point", mostly_longer(dict.fromkeys(POINTS), ["step:moved step=6"]))
def test_killed_at_any_point_it_goes_on_bit_for_bit(digits, tmp_path, point):
    how = "train.steps=9", "train.checkpoint_every=4", "train.micro_batch=6", "deepspeed.zero_stage=2"
    alone, killed = (against_critic(digits, tmp_path, *how, f"run.name={name}") for name in ("alone", "killed"))
    run_ranks(train, 2, alone)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train, 2, killed, environment={"DTRAIN_FAULTS": f"sigkill_all at={point}"})
    run_ranks(train, 2, killed)
    assert metrics(killed) == metrics(alone)


def test_two_ranks_at_stage_2_go_on_as_one_at_stage_3(digits, tmp_path):
    long = "train.steps=8", "train.micro_batch=6"
    alone = against_critic(digits, tmp_path, *long, "run.name=alone")
    run_ranks(train, 1, alone)
    run_ranks(train, 2, against_critic(digits, tmp_path, *long, "train.steps=4", "deepspeed.zero_stage=2"))
    resumed = against_critic(digits, tmp_path, *long, "deepspeed.zero_stage=3")
    run_ranks(train, 1, resumed)
    for ours, theirs in zip(metrics(resumed), metrics(alone), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.fixture(scope="module")
def finished(digits, tmp_path_factory):
    config = against_critic(digits, tmp_path_factory.mktemp("finished"), "train.steps=6", "eval.every=6")
    run_ranks(train, 1, config)
    return config


def test_it_draws_with_numbers_of_its_own_the_same_in_every_block(digits, finished):
    run = dtrain.load(finished.run.path)
    ours, again = run.sample(6, seed=1), run.sample(6, seed=1)
    assert ours.shape == (6, 8, 8, 1)
    assert np.array_equal(ours, again)
    assert np.abs(ours.astype(int) - run.sample(6, seed=2)).max() > 0
    (line,) = [line for line in read(finished.run.path / "journal.jsonl") if line["event"] == "eval"]
    assert line["context"]["sampler"] == "ancestral"
    assert line["context"]["steps"] == 4
    assert not [name for name in line["metrics"] if name.startswith("loss")]


def test_what_cannot_go_with_it_is_refused_in_one_line(digits, finished, tmp_path):
    cases = {
        "eval.guidance=2": "draws samples and no means to lead; take 1",
        "eval.steps=3": "must be diffusion.timesteps, 4",
        "eval.sampler=ddim": "does not walk a ddgan process; take ancestral",
        "eval.metrics=[bpd]": "is the bound of a gaussian process",
        "eval.spacing=quad": "ddgan, which takes every timestep",
        "conditions.text={}": "its critic judges the class alone",
        "model.adapt={of: runs/x}": "frozen base, which is told no latent",
        "diffusion.timesteps=9": "less than or equal to 8",
    }
    for override, message in cases.items():
        with pytest.raises(UserError, match=message) as error:
            against_critic(digits, tmp_path, override)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="each of its steps draws anew"):
        dtrain.load(finished.run.path).invert(np.zeros((1, 8, 8, 1), np.uint8))


def test_its_steps_are_its_timesteps_unless_the_config_says_so(digits, tmp_path):
    assert tiny(digits, tmp_path, "diffusion={process: ddgan, timesteps: 2}", "eval={}").eval.steps == 2
