"""The only door to DeepSpeed: an optimizer and the networks it moves, in an engine of their own.

Most trainings have one player, which moves the backbone. A small network that is trained with the backbone, by the same
loss, is another network of the same player; networks trained against each other have a player each.
"""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from dtrain import distributed
from dtrain.checkpoint.format import Checkpoint
from dtrain.checkpoint.parameters import BACKBONE, full_name, split_name
from dtrain.config import Config
from dtrain.config.training import Optim
from dtrain.errors import UserError
from dtrain.models.build import allocate
from dtrain.models.compiled import compile_blocks
from dtrain.models.layers import initialize
from dtrain.objectives.objective import Held
from dtrain.randomness import key_of
from dtrain.training import ema, muon, zero_norm
from dtrain.training.deepspeed_import import deepspeed
from dtrain.training.networks import Networks
from dtrain.training.options import NO_CLIPPING, deepspeed_options
from dtrain.training.safety.refusal import Refusal
from dtrain.training.zero_blocks import fetched_by_blocks
from dtrain.training.zero_state import MOMENTS, Piece, ZeroState

LARGEST = sys.float_info.max


class Player:
    """Networks under DeepSpeed ZeRO with one AdamW (or Muon and it), a group of parameters a network, and with EMAs.

    `network(name)` is called for a forward, `backward` takes each micro-batch's loss, then comes `step`.

    networks: name → a function that allocates the module, its weights not yet written, whose `initial_value(name,
    shape, seed)` says what they begin as: with seed `run.seed` for the backbone, for another network with one that
    follows from `run.seed` and its name. optim, zero_stage: by default the config's. averaged: whether the EMAs of the
    config are kept. lr_factors: network → what its learning rate is multiplied with, where it is not 1. differentiates:
    as of `Turn`. held: of the networks, those that the optimizer does not move and no checkpoint holds.

    Raises UserError for what DeepSpeed would do silently wrong, and for weights of a held network that are another's.
    """

    def __init__(
        self,
        config: Config,
        micro_batch: int,
        networks: Mapping[str, Callable[[], nn.Module]],
        *,
        name: str = "main",
        optim: Optim | None = None,
        averaged: bool = True,
        lr_factors: Mapping[str, float] | None = None,
        zero_stage: int | None = None,
        differentiates: bool = False,
        held: Mapping[str, Held] | None = None,
    ):
        optim, stage = optim or config.optim, config.deepspeed.zero_stage if zero_stage is None else zero_stage
        stage = min(stage, 2) if differentiates else stage
        deepspeed_section = config.deepspeed.model_copy(update={"zero_stage": stage})
        config = config.model_copy(update={"optim": optim, "deepspeed": deepspeed_section})
        self.held = dict(held or {})
        moved = [network for network in networks if network not in self.held]
        factors = dict.fromkeys(moved, 1.0) | dict(lr_factors or {})
        assert list(factors) == moved, f"{name}: {lr_factors} names other networks than {moved}"
        _refuse(config, name, list(networks))
        self.name, self.stage, self.micro_batch, self._differentiates = name, stage, micro_batch, differentiates
        self.profiles = config.ema if averaged else []
        self.clip = optim.gradient_clip or NO_CLIPPING
        self.optimizer_steps = 0
        self.begun: dict[str, int] = {}  # average → the optimizer step it began after, where it was not the first
        with torch.device("meta"):
            plans = {network: networks[network]() for network in moved}
        parameters = [(full_name(n, local), p) for n, plan in plans.items() for local, p in plan.named_parameters()]
        self.shapes = {full: tuple(p.shape) for full, p in parameters}
        numel = sum(p.numel() for _, p in parameters if p.requires_grad)
        self.options = options = deepspeed_options(config, distributed.world_size(), micro_batch, numel)

        # At stage 3 every layer is partitioned as soon as it is allocated, so no rank ever holds the whole model.
        deepspeed.init_distributed(verbose=False)  # takes the process group that is there
        with deepspeed.zero.Init(config_dict_or_path=options) if stage == 3 else nullcontext():
            self.networks = {network: allocated() for network, allocated in networks.items()}
        for network in self.held:
            self.networks[network].requires_grad_(False)
        self._seeds = {n: config.run.seed if n == BACKBONE else key_of(f"{config.run.seed}/{n}") for n in networks}
        for network, module in self.networks.items():
            if stage != 3 and network not in self.held:
                initialize(module, self._seeds[network])
            module.activation_checkpointing = config.train.activation_checkpointing
        named = {n: list(self.networks[n].named_parameters()) for n in moved}
        groups = [[(full_name(n, local), p) for local, p in named[n] if p.requires_grad] for n in named]
        frozen = [(full_name(n, local), p) for n in named for local, p in named[n] if not p.requires_grad]
        groups, self._factors = muon.split(optim, groups, factors.values(), self.shapes)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for _, p in group], "lr": optim.lr * factor}
                for group, factor in zip(groups, self._factors, strict=True)
            ],
            lr=optim.lr,
            betas=optim.betas,
            weight_decay=optim.weight_decay,
            fused=optim.fused or None,  # None is PyTorch's own choice, False would forbid foreach on a GPU
        )
        alone = next(iter(self.networks.values())) if len(networks) == 1 else None
        with fetched_by_blocks(self.networks.values()) if stage == 3 else nullcontext():
            self.engine, self.zero, _, _ = deepspeed.initialize(
                model=alone or Networks(self.networks), optimizer=self.optimizer, config=options
            )
        if stage:
            zero_norm.own_ways(self.zero, stage)
        averages = ema.ema_keys(self.profiles)
        self.state = ZeroState(
            *(stage, self.zero, self.optimizer, [one for group in groups for one in group], frozen, averages),
            held=[(full_name(n, local), p) for n in self.held for local, p in self.networks[n].named_parameters()],
        )
        for network, source in self.held.items():
            self.state.write(_of_source(network, source, self.networks[network]))
        if stage == 3 or config.deepspeed.precision == "bf16":
            self._write_initial_weights()
        self._refusal = Refusal(self.optimizer, self._norm)
        muon.attach(self.optimizer, self.state, optim, self.shapes)
        ema.attach(self.optimizer, self.profiles, self._refusal.refuses, self._step_of)
        if differentiates:
            pass  # what is compiled is not differentiated twice
        elif config.train.compile == "blocks":
            compile_blocks(self.networks.values())
        elif config.train.compile:
            self.engine.compile()
        self._autocast = config.deepspeed.precision == "bf16_autocast"
        self._idle = set(moved)  # networks that no loss of this step has gone through

    @classmethod
    def of(cls, config: Config, micro_batch: int) -> "Player":
        """The player of a training that has one: it moves the config's backbone."""
        return cls(config, micro_batch, {BACKBONE: lambda: allocate(config)})

    # -- stepping ----------------------------------------------------------------------------------------------------

    def __call__(self, *args, **kwargs) -> Tensor:
        """The forward of the only network."""
        (name,) = self.networks
        return self.network(name)(*args, **kwargs)

    def network(self, name: str) -> Callable:
        """A network's forward in this player's own turn: what descends from it goes into `backward`.

        `torch.autograd.grad` of what went through the engine is wrong at stages 1 and 3 now and then: take it of a
        detached copy and give `backward` a surrogate, or say that the turn `differentiates`, which then goes past it.
        Without gradient it goes past the engine and its autocast: differences would be noise.
        """
        assert name in self.networks, f"{name} is not a network of {self.name}"

        def forward(*args, **kwargs):
            given = args if len(self.networks) == 1 else (name, *args)
            if not torch.is_grad_enabled():
                return self.engine.module(*given, **kwargs)
            self._idle.discard(name)
            if not self._differentiates:
                return self.engine(*given, **kwargs)
            with torch.autocast(distributed.device().type, torch.bfloat16, enabled=self._autocast):
                return self.engine.module(*given, **kwargs)

        return forward

    def beside(self, name: str) -> Callable:
        """A network's forward in another player's turn, where this player is `frozen`.

        It goes past the engine, which would count it as a step of its own. The engine enters autocast by itself, its
        module does not.
        """
        assert name in self.networks, f"{name} is not a network of {self.name}"

        def forward(*args, **kwargs):
            is_frozen = not self.state.trainable[0][1].requires_grad
            assert is_frozen or not torch.is_grad_enabled(), f"a gradient would come to {name} past its engine"
            with torch.autocast(distributed.device().type, torch.bfloat16, enabled=self._autocast):
                module = self.engine.module
                return module(*args, **kwargs) if len(self.networks) == 1 else module(name, *args, **kwargs)

        return forward

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """From the first forward to the end of the backward of another player's turn: no gradient comes to the weights.

        DeepSpeed would take one for a gradient of this player's own step, or stop with an error.
        """
        for _, p in self.state.trainable:
            p.requires_grad_(False)
        try:
            yield
        finally:
            for _, p in self.state.trainable:
                p.requires_grad_(True)

    def backward(self, loss: Tensor) -> None:
        """Add one micro-batch's gradient. DeepSpeed divides by the number of micro-batches itself.

        A loss that is not finite makes the whole gradient so, and with it the norm that every rank gets: the factor is
        exactly 1 otherwise, and nobody waits for its value.
        """
        self.engine.backward(loss * (1 + 0 * loss.detach()))
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-batch; moves nothing

    def step(self, lr: float, limit: float = LARGEST) -> float:
        """Clip, step, move the EMAs, after the last micro-batch's `backward`; the norm of the mean gradient, unclipped.

        A step whose norm is over `limit`, infinite or not a number moves nothing, bit for bit, on any rank: no weight,
        moment, average or step count. The norm is the same on all ranks, so they need not ask each other. lr: of
        networks whose factor is 1. Raises UserError where a network had no part in the losses: Adam would move it yet.
        """
        assert self.engine.is_gradient_accumulation_boundary(), "step() belongs after the last micro-batch"
        if self._idle:
            raise UserError(
                f"no loss of player {self.name} in this step came from its {' and '.join(sorted(self._idle))}, which "
                "Adam would move all the same; give what is trained at other steps a player of its own"
            )
        for group, factor in zip(self.optimizer.param_groups, self._factors, strict=True):
            group["lr"] = lr * factor
        if self.stage == 0:
            self._norm_at_0 = zero_norm.clip_at_0([p for _, p in self.state.trainable], self.clip)
        self._refusal.begin(limit)
        self.engine.step()
        self._idle = self.networks.keys() - self.held.keys()
        norm = self._norm()
        self.optimizer_steps += norm <= limit
        return norm

    def _step_of(self, average: str) -> int:
        """The number of the step that is being taken, counted from where the average began."""
        return self.optimizer_steps + 1 - self.begun.get(average, 0)

    def _norm(self) -> float:
        """The gradient norm of this step. DeepSpeed's own has been reduced by the time the optimizer is called."""
        return self._norm_at_0 if self.stage == 0 else float(self.zero._global_grad_norm)

    # -- state -------------------------------------------------------------------------------------------------------

    def pieces(self, whole: bool = False) -> list[Piece]:
        """Every piece this rank holds, live; see `ZeroState.pieces`."""
        return self.state.pieces(whole)

    def tensor_sizes(self) -> dict[str, int]:
        """Name → number of elements of every global tensor a checkpoint of this player holds."""
        numel = self.numel()
        sizes = {f"{name}:{key}": numel[name] for name, _ in self.state.trainable for key in self.state.keys}
        return sizes | {f"{name}:fp32": numel[name] for name, _ in self.state.frozen}

    def numel(self) -> dict[str, int]:
        """Parameter → number of elements."""
        return {name: int(np.prod(shape)) for name, shape in self.shapes.items()}

    def _write_initial_weights(self) -> None:
        """The exact initial weights into the fp32 masters and EMAs, where building the model could not put them."""

        def value_of(name: str) -> Tensor:
            network, local = split_name(name)
            if network in self.held:
                return None
            return self.networks[network].initial_value(local, self.shapes[name], self._seeds[network])

        self.state.zero_padding()
        self.state.write(value_of)
        self.refresh(optimizer_steps=0)

    def reset(self) -> None:
        """Back to the initial weights, EMAs as these, moments zero, no step taken. On all ranks."""
        self.state.zero_moments()
        self.begun = {}
        self._write_initial_weights()

    def set_weights(self, model: nn.Module, network: str = BACKBONE) -> None:
        """Begin with a whole model's weights, EMAs as these and moments zero; `refresh` must follow on all ranks."""
        weights = {full_name(network, name): p.detach() for name, p in model.named_parameters()}
        self.state.write(weights.get)

    def fill(self, checkpoint: Checkpoint) -> None:
        """The whole state from a checkpoint of any shape, of these networks; `refresh` must follow on all ranks.

        An EMA profile that the checkpoint lacks begins as its weights. Raises Damaged.
        """
        self.state.fill(
            checkpoint, lambda name, key: (name, key) if f"{name}:{key}" in checkpoint.tensors else (name, "fp32")
        )

    def fill_weights(self, checkpoint: Checkpoint, key: str = "fp32") -> None:
        """A checkpoint's weights `key` alone, EMAs as these; what it lacks stays as it is. Raises Damaged."""

        def source(name: str, own: str) -> tuple[str, str] | None:
            if own in MOMENTS or f"{name}:fp32" not in checkpoint.tensors:
                return None
            return name, key if f"{name}:{key}" in checkpoint.tensors else "fp32"  # frozen, or not averaged there

        self.state.fill(checkpoint, source)

    def refresh(self, optimizer_steps: int) -> None:
        """After the pieces were overwritten: make the model's own weights equal them and set Adam's step count."""
        self.count_steps(optimizer_steps)
        self.state.refresh()

    def count_steps(self, optimizer_steps: int) -> None:
        """Say how many steps the state has taken."""
        self.optimizer_steps = optimizer_steps
        self.state.count_steps(optimizer_steps)

    @torch.no_grad()
    def gather(self, key: str, into: nn.Module, network: str = BACKBONE) -> nn.Module:
        """Copy a network's whole weights (key "fp32") or an EMA ("ema_0") into a plain module on every rank.

        A collective: every rank calls it. Frozen parameters and buffers are copied as they are.
        """
        self.state.gather(key, {full_name(network, name): p for name, p in into.named_parameters()})
        buffers = dict(into.named_buffers())
        for name, b in self.networks[network].named_buffers():
            buffers[name].copy_(b)
        return into


def _of_source(network: str, source: Held, module: nn.Module) -> Callable[[str], Tensor | None]:
    """Full name → weight of a held network, None for others'. Raises UserError where they are another network's."""
    weights = source.weights()
    for name, p in module.named_parameters():
        shape = tuple(getattr(p, "ds_shape", p.shape))  # a partitioned one has another
        if name not in weights or tuple(weights[name].shape) != shape:
            there = f"has the shape {list(weights[name].shape)}" if name in weights else "is not there"
            raise UserError(f"the weights of {network} are another network's: {name}, {list(shape)} here, {there}")
    of = {full_name(network, name): weight for name, weight in weights.items()}
    return of.get


def _refuse(config: Config, player: str, networks: list[str]) -> None:
    """Raises UserError for what DeepSpeed would do silently wrong."""
    if config.deepspeed.precision != "bf16":
        return
    if len(networks) > 1:
        raise UserError(
            f"deepspeed.precision=bf16 would round the weights of {' and '.join(networks)}, which player {player} "
            "moves together; take bf16_autocast"
        )
    if config.deepspeed.zero_stage == 0:
        raise UserError(f"deepspeed.precision=bf16 drifts at stage 0, which player {player} needs; take bf16_autocast")
