"""One step, read top to bottom:

    x_0 = first stage(batch),  y = conditions(batch),  t ~ U,  ε ~ N(0, I)
    each optimizer in turn:  gradient step on the mean of the objective's losses      (Ho et al. 2020, Algorithm 1)

Every random number comes with the batch (design, decision 2), so a step is a function of (weights, images seen).
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import tee

from dtrain import faults
from dtrain.batch import Batch, Condition, split
from dtrain.conditions.build import Conditions
from dtrain.draws import Draw
from dtrain.first_stage.pixels import FirstStage, x_0_of
from dtrain.objectives.objective import Losses, Objective
from dtrain.position import Position
from dtrain.training.players import Players


@dataclass(frozen=True)
class Step:
    """drawn: argument of the backbone → the random number of each row that it is, as keys of dropout are."""

    first_stage: FirstStage
    conditions: Conditions
    objective: Objective
    players: Players
    drawn: Mapping[str, Draw]

    def take(
        self,
        batch: Batch,
        at: Position,
        learning_rate: Callable[[str], float],
        judge: Callable[[str, float, float], bool],
        limit: Callable[[str], float],
        on_losses: Callable[[str, Batch, Losses], None],
        meanwhile: Callable[[], None] = lambda: None,
        spoilt: bool = False,
    ) -> tuple[dict[str, float], bool]:
        """(the gradient's norm in each turn that there was, whether the step was taken) of this rank's rows.

        A step is taken if every turn was. Where one is refused, those before it stay moved and those after it do not
        happen. learning_rate, limit: of a turn, by its name; limit: the largest norm that it may have. judge: whether a
        turn of this norm, under this limit, was taken. on_losses: sees the losses of each micro-batch. meanwhile:
        called once a turn, when its gradients are queued on the device and nobody has waited for them. spoilt: all
        losses are to be no numbers, for tests of just that.
        """
        turns = self.objective.turns
        norms, players = {}, [player for player in self.players if at.step >= turns[player.name].from_step]
        for player, parts in zip(players, tee(self._parts(batch), len(players)), strict=True):  # each is made once
            with self.players.turn(player.name):
                networks = self.players.networks_for(player.name)
                for part, given, condition in parts:
                    losses = self.objective.losses(player.name, self._drawing(networks, part), given, condition, at)
                    if spoilt:
                        losses = losses._replace(rows=losses.rows * float("nan"))
                    player.backward(losses.rows.mean())
                    on_losses(player.name, part, losses)
            meanwhile()
            faults.at("step:update")
            most = limit(player.name)
            norms[player.name] = player.step(learning_rate(player.name), most)
            faults.at("step:moved")
            if not judge(player.name, norms[player.name], most):
                return norms, False
        return norms, True

    def _parts(self, batch: Batch) -> Iterator[tuple[Batch, Batch, Condition]]:
        """Each micro-batch; the same with x_0; what its rows are told."""
        for part in split(batch, self.players.micro_batch):
            condition = self.conditions.of_batch(part)
            yield part, part | {"x_0": x_0_of(self.first_stage, part)}, condition

    def _drawing(self, networks: Mapping[str, Callable], part: Batch) -> Mapping[str, Callable]:
        """The networks, the backbone with the random numbers that it is to compute with."""
        drawn = {argument: part[draw.name] for argument, draw in self.drawn.items()}
        return {**networks, "backbone": partial(networks["backbone"], **drawn)}
