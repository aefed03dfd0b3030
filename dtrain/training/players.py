"""Several optimizers in one step, each in its turn: the players of a training as one state, and who may move when."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn

from dtrain import distributed
from dtrain.checkpoint.format import Checkpoint
from dtrain.checkpoint.frozen_base import NAME as BASE
from dtrain.checkpoint.frozen_base import Base, open_base
from dtrain.checkpoint.parameters import BACKBONE, check_same, check_weights
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.models.build import allocate
from dtrain.objectives.objective import Objective
from dtrain.training.player import Player
from dtrain.training.zero_state import Piece


class Players:
    """Players in the order of their turns. A checkpoint of a training holds the state of all of them.

    The run's count of optimizer steps is the first player's; the others count their own (`state`). frozen: name →
    fingerprint of networks that stand beside the players and are in no checkpoint either. base: the one that the
    backbone stands on.
    """

    def __init__(self, players: Sequence[Player], frozen: Mapping[str, str] | None = None, base: Base | None = None):
        self._frozen, self._base = dict(frozen or {}), base
        self._players = {player.name: player for player in players}
        self._owner = {network: player for player in players for network in player.networks}
        assert len(self._players) == len(players), "two players have the same name"
        assert len(self._owner) == sum(len(p.networks) for p in players), "a network has two players"
        assert len({p.micro_batch for p in players}) == 1
        self.first, *self._further = players

    def __iter__(self) -> Iterator[Player]:
        """In the order of their turns."""
        return iter(self._players.values())

    def __getitem__(self, name: str) -> Player:
        return self._players[name]

    # -- turns -------------------------------------------------------------------------------------------------------

    def networks_for(self, name: str) -> dict[str, Callable]:
        """Every network's forward in the turn of the player called `name`."""
        return {
            network: player.network(network) if player.name == name else player.beside(network)
            for network, player in self._owner.items()
        }

    @contextmanager
    def turn(self, name: str) -> Iterator[None]:
        """From a player's first forward to the end of its last backward: the weights of all others get no gradient."""
        with ExitStack() as others:
            for player in self:
                if player.name != name:
                    others.enter_context(player.frozen())
            yield

    # -- state -------------------------------------------------------------------------------------------------------

    @property
    def micro_batch(self) -> int:
        return self.first.micro_batch

    @property
    def optimizer_steps(self) -> int:
        return self.first.optimizer_steps

    @property
    def options(self) -> dict[str, Any]:
        """DeepSpeed's of the first player; behind them, where there are further players, theirs by name."""
        further = {player.name: player.options for player in self._further}
        return self.first.options | ({"players": further} if further else {})

    def pieces(self, whole: bool = False) -> list[Piece]:
        """Every piece this rank holds, live; see `ZeroState.pieces`."""
        return [piece for player in self for piece in player.pieces(whole)]

    def tensor_sizes(self) -> dict[str, int]:
        """Name → number of elements of every global tensor a checkpoint holds."""
        return {name: size for player in self for name, size in player.tensor_sizes().items()}

    def numel(self) -> dict[str, int]:
        """Parameter → number of elements."""
        return {name: size for player in self for name, size in player.numel().items()}

    def load(self, checkpoint: Checkpoint) -> None:
        """Fill this rank's pieces from a checkpoint of any shape; `refresh` must follow on all ranks.

        An EMA profile that the checkpoint lacks begins as its weights. Raises Damaged, or UserError for other networks.
        """
        check_same(checkpoint, self.numel())
        for player in self:
            player.fill(checkpoint)

    def load_weights(self, checkpoint: Checkpoint, key: str = "fp32") -> None:
        """Begin with a checkpoint's weights, EMAs as these and moments zero; `refresh` must follow on all ranks.

        key: "fp32", the raw ones, or of one of its averages "ema_0". A network beside the backbone that the checkpoint
        lacks begins as in any new run. Raises Damaged, or UserError for another model.
        """
        check_weights(checkpoint, self.numel(), key)
        for player in self:
            player.fill_weights(checkpoint, key)

    def set_weights(self, model: nn.Module, network: str = BACKBONE) -> None:
        """Begin with a whole model's weights, EMAs as these and moments zero; `refresh` must follow on all ranks."""
        self._owner[network].set_weights(model, network)

    def refresh(self, optimizer_steps: int) -> None:
        """After the pieces were overwritten: make the networks' own weights equal them and set the steps' counts.

        optimizer_steps: of the first player; those of others are what `load_state` or `reset` has said.
        """
        for player in self:
            player.refresh(optimizer_steps if player is self.first else player.optimizer_steps)

    def reset(self) -> None:
        """Back to the initial weights, EMAs as these, moments zero, no step taken. On all ranks."""
        for player in self:
            player.reset()

    def gather(self, key: str, into: nn.Module, network: str = BACKBONE) -> nn.Module:
        """Copy a network's whole weights (key "fp32") or an EMA ("ema_0") into a plain module on every rank.

        A collective: every rank calls it. Frozen parameters and buffers are copied as they are.
        """
        return self._owner[network].gather(key, into, network)

    @property
    def held(self) -> dict[str, str]:
        """Network → fingerprint, of those that no checkpoint holds."""
        held = {network: held.fingerprint for player in self for network, held in player.held.items()}
        base = {} if self._base is None else {BASE: self._base.fingerprint}
        return held | self._frozen | base

    def check_base(self) -> None:
        """Raises UserError where the base is no longer what was read at the start."""
        if self._base is not None:
            self._base.check()

    def check_held(self, theirs: Any) -> None:
        """Raises UserError where a checkpoint was trained with other held networks: network → fingerprint."""
        for network in self.held | (theirs if isinstance(theirs, dict) else {}):
            if self.held.get(network) != (found := theirs.get(network) if isinstance(theirs, dict) else None):
                raise UserError(
                    f"it was trained with another {network}, whose weights it does not hold: {found or 'none'} there, "
                    f"{self.held.get(network, 'none')} here"
                )

    def state(self) -> dict[str, int]:
        """Plain data for a checkpoint, beside the first player's count of optimizer steps: the further players'."""
        return {player.name: player.optimizer_steps for player in self._further}

    def load_state(self, state: Any) -> None:
        """Raises UserError where it is not what `state` gives for these players."""
        names = {player.name for player in self._further}
        if not (
            isinstance(state, dict)
            and state.keys() == names
            and all(type(steps) is int and 0 <= steps < 1 << 63 for steps in state.values())
        ):
            raise UserError(
                f"a checkpoint's optimizer steps of players other than {self.first.name} are {state!r}, "
                f"here they would be of {sorted(names)}"
            )
        for player in self._further:
            player.count_steps(state[player.name])


def build(config: Config, objective: Objective, micro_batch: int) -> Players:
    """The players that an objective asks for: one a turn, with the networks that it moves. A collective.

    Raises UserError where what pictures control cannot be read.
    """
    base = distributed.agree(open_base, config, distributed.device())
    backbone = partial(allocate, config) if base is None else lambda: allocate(config).stand_on(base.module)
    networks = {BACKBONE: backbone, **objective.networks}
    return Players(
        [
            Player(
                config,
                micro_batch,
                {network: networks[network] for network in turn.networks},
                name=name,
                optim=turn.optim,
                averaged=turn.averaged,
                lr_factors=turn.lr_factors,
                differentiates=turn.differentiates,
                held=turn.held,
            )
            for name, turn in objective.turns.items()
        ],
        objective.frozen,
        base,
    )
