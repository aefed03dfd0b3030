"""The critic of an autoencoder: its terms by plain PyTorch, its weight of one step before, at any number of ranks."""

import itertools

import pytest
import torch

from dtrain.data.shards.manifest import load_all
from dtrain.data.stream import Completion, StepDataset
from dtrain.errors import UserError
from dtrain.models.build import build
from dtrain.models.layers import initialize
from dtrain.models.patch_critic import PatchCritic
from dtrain.randomness import key_of
from tests.longer import longer, mostly_longer
from tests.ranks import run_ranks
from tests.training.by_hand import move
from tests.training.critic import assert_same, metrics, series, with_critic
from tests.training.runs import train

STEPS = 8


def by_hand(config, steps):
    """Plain PyTorch: both losses and the weight of every step, the gradients by autograd at the last convolution."""
    section = config.objective.critic
    model, critic = build(config), PatchCritic(1, section.width, section.layers)
    initialize(critic, key_of(f"{config.run.seed}/critic"))
    own, other = (
        torch.optim.AdamW(network.parameters(), lr=1.0, betas=betas, weight_decay=0.0)
        for network, betas in ((model, config.optim.betas), (critic, section.betas))
    )
    data, complete, ratio, found = StepDataset(config, load_all(config.data), 0, 1, 0), Completion(config), 0.0, []

    for step in range(steps):
        batch = complete(data[step])
        x, share = batch["image"], min(1, (step + 1) / config.optim.warmup_steps)
        pixels, mean, log_variance, _ = model(x, batch["posterior"])
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum() / x.numel()
        error, judged = (pixels - x).abs().mean(), step >= section.from_step
        loss, line, next_ratio = error + 0.01 * kl, {}, ratio
        if judged:
            judgement = -critic(pixels).mean()
            last = model.decoder.conv_out.weight
            of_error, of_critic = (torch.autograd.grad(one, last, retain_graph=True)[0] for one in (error, judgement))
            loss = loss + section.weight * ratio * judgement
            line["critic_ratio"], next_ratio = ratio, (of_error.norm() / (of_critic.norm() + 1e-4)).item()
        line["loss"] = loss.item()
        move(model, own, loss, share * config.optim.lr)
        if judged:
            with torch.no_grad():
                pixels = model(x, batch["posterior"]).pixels
            hinge = 0.5 * (torch.relu(1 - critic(x)).mean() + torch.relu(1 + critic(pixels)).mean())
            line["loss_critic"] = hinge.item()
            move(critic, other, hinge, share * section.lr)
        ratio = next_ratio
        found.append(line)
    return found


def seen(config):
    names = ("loss", "critic_ratio", "loss_critic")
    return [{name: line[name] for name in names if name in line} for line in metrics(config)]


@pytest.fixture(scope="module")
def expected(digits, tmp_path_factory):
    return by_hand(with_critic(digits, tmp_path_factory.mktemp("plain")), STEPS)


SHAPES = list(itertools.product((0, 1, 2, 3), (1, 2), ("null", "6")))


@pytest.mark.parametrize(("stage", "ranks", "micro"), mostly_longer(SHAPES, [(0, 1, "null"), (3, 2, "6")]))
def test_its_losses_and_its_weight_are_those_of_plain_pytorch(digits, tmp_path, expected, stage, ranks, micro):
    how = f"deepspeed.zero_stage={stage}", f"train.micro_batch={micro}", f"train.steps={STEPS}"
    config = with_critic(digits, tmp_path, *how)
    run_ranks(train, ranks, config)
    ours = seen(config)
    assert [line.keys() for line in ours] == [line.keys() for line in expected]
    assert expected[2]["critic_ratio"] == 0 < expected[3]["critic_ratio"]
    for line, theirs in zip(ours, expected, strict=True):
        assert line == pytest.approx(theirs, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("steps", [12, longer(50)])
def test_steps_are_the_same_on_two_ranks_in_micro_batches(digits, tmp_path, steps):
    one, two = ((tmp_path / name, steps, *shape) for name, shape in {"a": (0, 1, "null"), "b": (2, 2, "4")}.items())
    assert_same(series(digits, *two), series(digits, *one))


def test_killed_between_checkpoints_it_goes_on_bit_for_bit(digits, tmp_path):
    """Also with other checkpoints than the run that was left alone: the weight of one step before is in each."""
    alone = with_critic(digits, tmp_path, "train.steps=9", "run.name=alone", "train.micro_batch=6")
    killed = with_critic(digits, tmp_path, "train.steps=9", "train.checkpoint_every=4", "train.micro_batch=6")
    run_ranks(train, 2, alone)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train, 2, killed, environment={"DTRAIN_FAULTS": "sigkill_all at=step:update step=6"})
    run_ranks(train, 2, killed)
    names = "loss", "mse", "critic_ratio", "loss_critic", "grad_norm", "grad_norm_critic"
    ours, theirs = ([{name: line.get(name) for name in names} for line in metrics(one)] for one in (killed, alone))
    assert ours == theirs


def test_a_refused_step_leaves_its_weight_as_it_was(digits, tmp_path):
    whole, poisoned = (with_critic(digits, tmp_path, "train.steps=6", f"run.name={name}") for name in ("whole", "nan"))
    run_ranks(train, 2, whole)
    run_ranks(train, 2, poisoned, environment={"DTRAIN_FAULTS": "nan images=96:120"})  # the fifth batch
    theirs, ours = seen(whole), seen(poisoned)
    assert ours[:4] == theirs[:4]
    assert ours[4]["critic_ratio"] == theirs[4]["critic_ratio"] > 0
    assert ours[4]["loss"] != theirs[4]["loss"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"critic": "{layers: 2}"}, "layers 2 leaves no patch of data.image_size 8; take less"),
        ({"perceptual": "{kind: lpips, file: x}"}, "data.image_size 8 is too small for objective.perceptual lpips"),
        ({"critic": "{width: 6}"}, "multiple of 4"),
        ({"perceptual": "{kind: vgg}"}, "lpips"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(digits, tmp_path, keys, message):
    with pytest.raises(UserError, match=message):
        with_critic(digits, tmp_path, **keys)
