"""A denoising GAN of the digits, small enough for a second or two, and the same by plain PyTorch."""

import pytest
import torch
from torch.nn.functional import softplus

from dtrain.data.shards.manifest import load_all
from dtrain.data.stream import Completion, StepDataset
from dtrain.models.build import build
from dtrain.models.layers import initialize
from dtrain.models.step_critic import StepCritic
from dtrain.randomness import key_of
from dtrain.tracking.journal import read
from tests.digits import tiny
from tests.training.by_hand import move

GAN = "diffusion={process: ddgan, latent: 7, r1: 0.5, r1_every: 2, critic: {width: 8, lr: 3.0e-4, betas: [0.5, 0.9]}}"
SHORT = ("optim.lr=2e-4", "optim.betas=[0.5, 0.9]", "eval.steps=4", "ema.0.decay=0.5", "train.keep_last=9")
NAMES = ("loss", "loss_critic", "critic_real", "critic_fake", "r1", "grad_norm", "grad_norm_critic")


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


def assert_as_by_hand(config, expected):
    names = ("loss", "loss_critic", "critic_real", "critic_fake", "r1")
    assert [line.keys() for line in metrics(config, names)] == [line.keys() for line in expected]
    for ours, theirs in zip(metrics(config, names), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-5)
