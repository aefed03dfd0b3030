"""The gradient's norm under ZeRO, and what is done by it: as DeepSpeed's own functions would, bit for bit."""

import numpy as np
import pytest
import torch

from dtrain.training.zero_norm import sum_of_squares
from tests.digits import tiny
from tests.longer import longer
from tests.ranks import run_ranks
from tests.training.players import build_player, run_steps, state


def test_the_sum_of_squares_is_numpys_in_float64():
    rng = np.random.default_rng(0)
    tensors = [rng.standard_normal(shape, dtype=np.float32) * 1e-3 for shape in [(3,), (2**16 + 5,), (700, 301), (1,)]]
    expected = sum(np.square(values.astype(np.float64)).sum() for values in tensors)
    found = sum_of_squares([torch.from_numpy(values) for values in tensors])
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found, expected, rtol=1e-13)
    assert sum_of_squares([torch.tensor([1.0, float("inf")])]).isinf()
    assert sum_of_squares([torch.tensor([1.0, float("nan")])]).isnan()


def steps_by(config, own: bool):
    """(norms, state, how often gradients were multiplied) of four steps; own: by DeepSpeed's functions alone."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    kind = DeepSpeedZeroOptimizer_Stage3 if config.deepspeed.zero_stage == 3 else DeepSpeedZeroOptimizer
    at_0 = config.deepspeed.zero_stage == 0
    multiplied = counted(torch.nn.utils, "clip_grads_with_norm_") if at_0 else counted(kind, "unscale_and_clip_grads")
    player = build_player(config)
    if own:
        for name in {"get_grad_norm_direct", "unscale_and_clip_grads"} & vars(player.zero).keys():
            delattr(player.zero, name)
    norms = run_steps(player, config, range(1, 5))
    return norms, {key: value.float().numpy() for key, value in state(player).items()}, len(multiplied)


def counted(owner, name):
    """A list that grows with each call of a function, in this process from now on."""
    calls, function = [], getattr(owner, name)
    setattr(owner, name, lambda *given, **named: calls.append(name) or function(*given, **named))
    return calls


@pytest.mark.parametrize("clip", [0.05, pytest.param(1e9, marks=pytest.mark.campaign)], ids=["clipped", "free"])
@pytest.mark.parametrize(("stage", "precision"), [longer(1, "fp32"), (2, "bf16"), (3, "fp32")])
def test_norms_and_steps_are_those_of_deepspeeds_functions_bit_for_bit(digits, tmp_path, stage, precision, clip):
    config = tiny(
        *(digits, tmp_path, f"deepspeed.zero_stage={stage}", f"deepspeed.precision={precision}"),
        *(f"optim.gradient_clip={clip}", "train.micro_batch=6"),
    )
    ours, theirs = run_ranks(steps_by, 2, config, False), run_ranks(steps_by, 2, config, True)
    for (norms, moved, _), (other_norms, other, _) in zip(ours, theirs, strict=True):
        assert norms == other_norms
        assert all(0.05 < norm < 1e9 for norm in norms)
        assert all(np.array_equal(moved[key], other[key]) for key in moved | other)


@pytest.mark.parametrize("stage", [longer(0), 1, 3])
def test_gradients_within_the_limit_are_not_multiplied(digits, tmp_path, stage):
    for clip, expected in (0.05, 4), (1e9, 0), (0, 0):
        config = tiny(digits, tmp_path, f"deepspeed.zero_stage={stage}", f"optim.gradient_clip={clip}")
        assert run_ranks(steps_by, 1, config, False)[0][2] == expected
