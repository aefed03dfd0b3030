"""The networks that a process is made of, such as a learned schedule, out of a checkpoint or an exported file."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from dtrain.checkpoint.averages import Combination
from dtrain.checkpoint.export import load_weights
from dtrain.checkpoint.format import Checkpoint
from dtrain.checkpoint.parameters import full_name
from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.objectives.build import build
from dtrain.objectives.objective import Objective


def objective_of(config: Config, filled: Callable[[str, nn.Module], nn.Module]) -> Objective:
    """The config's objective, whose process has weights. filled: of a network by its name, on the CPU, with its own."""
    objective = build(config)
    with torch.device("cpu"):
        networks = {name: objective.networks[name]() for name in objective.of_process}
    return objective.standing_on({name: filled(name, network).eval() for name, network in networks.items()})


def objective_in(checkpoint: Checkpoint | Combination, config: Config, key: str) -> Objective:
    """With a checkpoint's weights `key`, raw or averaged as the backbone's. Raises UserError where it holds none."""
    return objective_of(config, lambda name, network: load_weights(checkpoint, network, key, name))


def objective_with(weights: dict[str, Tensor], config: Config, file: str) -> Objective:
    """With the weights of a file, by their full names. Raises UserError for one that lacks some, or has others."""
    left = dict(weights)

    def filled(name: str, network: nn.Module) -> nn.Module:
        found = {local: left.pop(full_name(name, local), None) for local, _ in network.named_parameters()}
        try:
            network.load_state_dict({local: value for local, value in found.items() if value is not None})
        except RuntimeError as e:
            raise UserError(f"{file} does not hold the {name} of its config: {str(e).splitlines()[-1]}") from None
        return network

    objective = objective_of(config, filled)
    if left:
        raise UserError(f"{file} has `{min(left)}`, and its config has no such network; export the checkpoint again")
    return objective
