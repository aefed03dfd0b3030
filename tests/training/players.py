"""A player on a rank without the loop: built, moved some steps, and its state."""

import numpy as np
import torch


def build_player(config):
    """The run's player, its micro-batch what this number of ranks leaves."""
    from dtrain import distributed
    from dtrain.training.division import rows_per_rank
    from dtrain.training.player import Player

    _, micro = rows_per_rank(config.data.batch_size, config.train.micro_batch, distributed.world_size())
    return Player.of(config, micro)


def batch_losses(player, config, step):
    """Squared error of each row on this rank, one micro-batch at a time; the noise depends on the step only."""
    from dtrain import distributed

    rng = np.random.default_rng(step)
    size = config.data.batch_size
    x = torch.from_numpy(rng.standard_normal((size, 1, 8, 8), dtype=np.float32))
    t, y = torch.from_numpy(rng.integers(0, 1000, size)), torch.from_numpy(rng.integers(0, 10, size))
    rows = size // distributed.world_size()
    mine = slice(distributed.rank() * rows, (distributed.rank() + 1) * rows)
    parts = (values[mine].split(player.micro_batch) for values in (x, t, y))
    for x_part, t_part, y_part in zip(*parts, strict=True):
        yield (player(x_part, t_part, y_part) - x_part).square().flatten(1).mean(1)


def run_steps(player, config, steps, **limit):
    """Take these steps, or have them refused by a `limit`; returns the gradient norm of each."""
    norms = []
    for step in steps:
        for losses in batch_losses(player, config, step):
            player.backward(losses.mean())
        norms.append(float(player.step(1e-3, **limit)))
    return norms


def pieces_of(config, steps):
    """(name, start and values of each piece, sizes of all tensors, gradient norms) after so many steps."""
    player = build_player(config)
    norms = run_steps(player, config, range(1, steps + 1))
    pieces = [(p.name, p.start, p.values.float().clone().numpy()) for p in player.pieces()]
    return pieces, player.tensor_sizes(), norms


def state(player):
    """What a step may move on this rank: every piece, and the optimizer's step counts."""
    return {(p.name, p.start): p.values.clone() for p in player.pieces(whole=True)} | {
        ("step", i): player.optimizer.state[m]["step"].clone() for i, m in enumerate(player.state.masters())
    }


def differing(before, after):
    """The keys of two states whose values are not equal bit for bit."""
    assert before.keys() == after.keys()
    return [name for name in before if not np.array_equal(before[name].float().numpy(), after[name].float().numpy())]
