"""Small networks trained against each other, or one beside the other, by players and by plain PyTorch.

`train` takes the steps on the ranks that there are; `plain` the same ones on the whole batch in one process.
"""

import itertools
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import linear, silu, softplus

from dtrain.config import Config
from dtrain.models.layers import Linear, normal
from tests.digits import tiny

BATCH, PIXELS = 8, 16
CRITIC_LR, DECAY, FACTOR = 0.5, 0.9, 4  # the critic's lr over the backbone's
STEPS = 10  # that are compared
KEYS = ("fp32", "exp_avg", "exp_avg_sq", "ema_0")


class Toy(nn.Module):
    """Rows (n, 16) and times (n,) → (n, out)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.first, self.last = Linear(PIXELS + 1, width), Linear(width, out)

    def forward(self, x, t):
        x = torch.cat([x, t[:, None]], 1).to(self.first.weight.dtype)
        return self.last(silu(self.first(x)))

    @staticmethod
    def initial_value(name, shape, seed):
        return normal(name, shape, seed, std=0.3)


class Growing(Linear):
    """Its answer grows with each of its inputs."""

    def forward(self, x):
        return linear(x, softplus(self.weight), self.bias)


class Schedule(nn.Module):
    """gamma(t), which grows from −4 to 4 (Kingma et al. 2021, appendix H). No outer bias: the ends would cancel it.

    A weight is used only within its layer's forward: compiled at stage 3 it is empty elsewhere.
    """

    def __init__(self):
        super().__init__()
        self.straight, self.up, self.down = Growing(1, 1, bias=False), Growing(1, 5), Growing(5, 1, bias=False)

    def forward(self, t):
        low, gamma, high = (self._growing(u[:, None]) for u in (torch.zeros_like(t), t, torch.ones_like(t)))
        return -4 + 8 * (gamma - low) / (high - low)  # (n, 1)

    def _growing(self, t):
        return self.straight(t) + self.down(torch.sigmoid(self.up(t)))

    initial_value = staticmethod(Toy.initial_value)


class Toys(NamedTuple):
    networks: dict[str, tuple[str, ...]]  # player → its networks
    losses: object  # (player, networks, batch) → (n,)


ALLOCATE = {"backbone": partial(Toy, 33, PIXELS), "critic": partial(Toy, 24, 1), "schedule": Schedule}


def adversarial_losses(player, networks, batch):
    x, noise, t = batch
    critic, backbone = networks["critic"], networks["backbone"]
    if player == "main":
        return softplus(-critic(backbone(noise, t), t))[:, 0]
    with torch.no_grad():
        fake = backbone(noise, t)
    return (softplus(-critic(x, t)) + softplus(critic(fake, t)))[:, 0]


def joint_losses(_, networks, batch):
    x, noise, t = batch
    gamma = networks["schedule"](t)
    noised = torch.sigmoid(-gamma).sqrt() * x + torch.sigmoid(gamma).sqrt() * noise
    predicted = networks["backbone"](noised, gamma[:, 0] / 4)
    return (predicted - noise).square().mean(1) * (1 + torch.sigmoid(gamma[:, 0]))


ADVERSARIAL = Toys({"main": ("backbone",), "critic": ("critic",)}, adversarial_losses)
JOINT = Toys({"main": ("backbone", "schedule")}, joint_losses)
KINDS = {"adversarial": ADVERSARIAL, "joint": JOINT}


def config_of(digits, folder, stage: int, *overrides: str) -> Config:
    return tiny(
        *(digits, folder, f"data.batch_size={BATCH}", "train.micro_batch=2", f"deepspeed.zero_stage={stage}"),
        *(
            "optim.weight_decay=0.1",
            "optim.gradient_clip=0.5",
            "optim.lr=1e-4",
            f"ema=[{{decay: {DECAY}}}]",
            *overrides,
        ),
    )


def batch_of(step: int) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(step)
    return [
        torch.randn(BATCH, PIXELS, generator=g),
        torch.randn(BATCH, PIXELS, generator=g),
        torch.rand(BATCH, generator=g),
    ]


# -- by players --------------------------------------------------------------------------------------------------------


def players_of(toys: Toys, config: Config, **more):
    """more: of the further players."""
    from dtrain.training.player import Player
    from dtrain.training.players import Players

    players = []
    for name, networks in toys.networks.items():
        further = {"optim": config.optim.model_copy(update={"betas": (0.5, 0.9)}), "averaged": False, **more}
        factors = {"schedule": FACTOR} if "schedule" in networks else None
        allocate = {network: ALLOCATE[network] for network in networks}
        players.append(Player(config, 2, allocate, name=name, lr_factors=factors, **(further if players else {})))
    return Players(players)


def take(toys: Toys, players, config: Config, step: int, refuse: str | None = None) -> dict[str, float]:
    """The turns of one step, up to one that is refused on purpose: the gradient norm of each."""
    from dtrain import distributed

    rows, norms = BATCH // distributed.world_size(), {}
    mine = [values[distributed.rank() * rows :][:rows] for values in batch_of(step)]
    for player in players:
        with players.turn(player.name):
            networks = players.networks_for(player.name)
            for part in zip(*(values.split(players.micro_batch) for values in mine), strict=True):
                player.backward(toys.losses(player.name, networks, part).float().mean())
        limit = 1e-9 if player.name == refuse else 1e9
        lr = config.optim.lr * (1 if player.name == "main" else CRITIC_LR)
        norms[player.name] = player.step(lr, limit)
    return norms


def copies(players, whole: bool = False) -> dict:
    return {(p.name, p.start): p.values.float().clone().numpy() for p in players.pieces(whole)}


def train(toys: Toys, config: Config, steps: range, load_from=None, save_to=None, **more):
    """(this rank's pieces, the norms of all steps, pieces right after loading)."""
    from dtrain import distributed
    from dtrain.checkpoint.format import Checkpoint
    from dtrain.checkpoint.writer import Writer

    players, loaded = players_of(toys, config, **more), None
    if load_from is not None:
        checkpoint = Checkpoint.open(load_from)
        players.load(checkpoint)
        players.load_state(checkpoint.meta["players"])
        players.refresh(checkpoint.meta["optimizer_steps"])
        loaded = copies(players)
    norms = [take(toys, players, config, step) for step in steps]
    if save_to is not None:
        writer = Writer(save_to, distributed.rank(), distributed.world_size())
        meta = {"step": len(steps), "images": 0, "optimizer_steps": players.optimizer_steps, "players": players.state()}
        writer.begin(len(steps), players.pieces(), players.tensor_sizes(), meta)
        writer.wait()
        distributed.barrier()
        if distributed.rank() == 0:
            writer.commit()
    assert {player.optimizer_steps for player in players} == {steps.stop}
    return copies(players), norms, loaded


def whole(all_pieces: list[dict]) -> dict[str, np.ndarray]:
    """Global tensors from the pieces of all ranks, each element given exactly once."""
    tensors = {}
    for (name, start), values in sorted(
        itertools.chain(*(pieces.items() for pieces in all_pieces)), key=lambda p: p[0]
    ):
        before = tensors.setdefault(name, [])
        assert start == sum(map(len, before)), f"{name} has a hole, or an element twice, at {start}"
        before.append(values)
    return {name: np.concatenate(values) for name, values in tensors.items()}


# -- by plain PyTorch --------------------------------------------------------------------------------------------------


def plain(toys: Toys, config: Config, steps: int) -> tuple[dict[str, np.ndarray], list[dict[str, float]]]:
    """(global tensors by the names of a checkpoint, the norms of all steps)."""
    from dtrain.models.layers import initialize
    from dtrain.randomness import key_of

    modules = {network: ALLOCATE[network]() for networks in toys.networks.values() for network in networks}
    optimizers, averages, norms = {}, {}, []
    for network, module in modules.items():
        initialize(module, config.run.seed if network == "backbone" else key_of(f"{config.run.seed}/{network}"))
    for player, networks in toys.networks.items():
        groups = [{"params": modules[n].parameters(), "factor": FACTOR if n == "schedule" else 1} for n in networks]
        betas = config.optim.betas if player == "main" else (0.5, 0.9)
        optimizers[player] = torch.optim.AdamW(groups, betas=betas, weight_decay=config.optim.weight_decay)
    for p in (p for network in toys.networks["main"] for p in modules[network].parameters()):
        averages[p] = p.detach().clone()
    for step in range(steps):
        norms.append({})
        for player, optimizer in optimizers.items():
            mine = [p for group in optimizer.param_groups for p in group["params"]]
            gradients = torch.autograd.grad(toys.losses(player, modules, batch_of(step)).mean(), mine)
            for p, gradient in zip(mine, gradients, strict=True):
                p.grad = gradient
            norms[-1][player] = nn.utils.clip_grad_norm_(mine, config.optim.gradient_clip).item()
            for group in optimizer.param_groups:
                group["lr"] = config.optim.lr * (1 if player == "main" else CRITIC_LR) * group["factor"]
            optimizer.step()
        for p, average in averages.items():
            average.lerp_(p.detach(), 1 - DECAY)
    tensors = {}
    for player, networks in toys.networks.items():
        for network, (local, p) in ((n, one) for n in networks for one in modules[n].named_parameters()):
            name, state = local if network == "backbone" else f"{network}/{local}", optimizers[player].state[p]
            tensors[f"{name}:fp32"] = p
            tensors |= {f"{name}:{key}": state[key] for key in KEYS[1:3]}
            tensors |= {f"{name}:ema_0": averages[p]} if p in averages else {}
    return {name: values.detach().numpy().ravel() for name, values in tensors.items()}, norms


def distances(ours: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """‖ours − expected‖ / ‖expected‖ of each tensor."""
    assert ours.keys() == expected.keys()
    return {n: float(np.linalg.norm(ours[n] - v) / np.linalg.norm(v)) for n, v in expected.items()}


def by_plain_pytorch(digits, folder) -> dict[str, tuple]:
    """Kind → what `plain` gives after the steps that are compared."""
    return {kind: plain(toys, config_of(digits, folder, 0), STEPS) for kind, toys in KINDS.items()}


def assert_close(results, expected) -> None:
    """Every tensor and every norm of `train` on all ranks within a relative 1e-5 of plain PyTorch's.

    Within 5e-5 of squared gradients: a tensor of one number, whose gradient is a sum that cancels, rounds by the CPU.
    """
    (tensors, norms), ours = expected, whole([pieces for pieces, _, _ in results])
    bounds = {name: 5e-5 if name.endswith("exp_avg_sq") else 1e-5 for name in tensors}
    far = {name: distance for name, distance in distances(ours, tensors).items() if distance > bounds[name]}
    assert far == {}
    for _, measured, _ in results:
        for one, other in zip(measured, norms[-len(measured) :], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
