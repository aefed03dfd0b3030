"""Muon: against singular values and PyTorch's own, the same in every shape, and nothing moves in a refused step."""

import itertools

import numpy as np
import pytest
import torch

from dtrain.checkpoint.format import Checkpoint
from dtrain.config import load
from dtrain.errors import UserError
from dtrain.models.build import build
from dtrain.training.muon import ITERATION, is_matrix, orthogonal
from tests.digits import CONFIG, losses, tiny
from tests.longer import mostly_longer
from tests.ranks import run_ranks
from tests.training.control import evaluations, newest
from tests.training.elastic import rewritten
from tests.training.jit import ALL, of_jit
from tests.training.networks import pack_pairs, told_in_words
from tests.training.players import build_player, differing, run_steps, state
from tests.training.runs import train, trained

SHAPES = list(itertools.product((1, 2), range(4)))
MUON = ("optim.name=muon", "optim.weight_decay=0.1")


def by_singular_values(matrix):
    """The iteration on them alone, in float64."""
    u, s, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    s = s / max(np.sqrt((s**2).sum()), 1e-7)
    for _ in range(5):
        s = ITERATION[0] * s + ITERATION[1] * s**3 + ITERATION[2] * s**5
    return u * s @ v


@pytest.mark.parametrize("shape", [(8, 8), (24, 8), (8, 24), (96, 288)])
def test_a_matrix_is_made_orthogonal_as_its_singular_values_say_and_as_pytorch_does(shape):
    x = np.random.default_rng(0).standard_normal(shape)
    found = orthogonal(torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), by_singular_values(x), rtol=0, atol=1e-12)
    values = np.linalg.svd(found.numpy(), compute_uv=False)
    assert values.max() < 1.3
    assert np.median(values) > 0.6
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = torch.from_numpy(x).float()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0, momentum=0, adjust_lr_fn="match_rms_adamw").step()
    theirs = weight.detach().double() / (-0.2 * max(shape) ** 0.5)  # in bfloat16
    assert float((theirs - found).norm() / found.norm()) < 0.03
    assert not orthogonal(torch.zeros(4, 6)).any()


def weights_of_player(config):
    """On a rank: gathered weights after three steps."""
    player = build_player(config)
    run_steps(player, config, (1, 2, 3))
    module = player.gather("fp32", build(config))
    return {name: p.detach().numpy().copy() for name, p in module.named_parameters()}


@pytest.mark.parametrize(("ranks", "stage"), mostly_longer(SHAPES, [(1, 1), (2, 3)]))
def test_three_steps_are_those_of_the_equations(digits, tmp_path, ranks, stage):
    """By hand on a plain module: clipped gradients, momentum, singular values in float64; all else by AdamW."""
    config = tiny(digits, tmp_path, *MUON, f"deepspeed.zero_stage={stage}")
    found = {name: torch.from_numpy(p) for name, p in run_ranks(weights_of_player, ranks, config)[0].items()}
    module = build(config)
    named = {name: p for name, p in module.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in named.items() if is_matrix(name, tuple(p.shape))}
    assert {name.partition("blocks.0.")[2] for name in matrices} == {
        *("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight", "adaLN_modulation.1.weight")
    }
    adam = torch.optim.AdamW([p for name, p in named.items() if name not in matrices], lr=1e-3, weight_decay=0.1)
    momentum = {name: np.zeros(p.shape) for name, p in matrices.items()}
    for step in (1, 2, 3):
        rng = np.random.default_rng(step)
        x = torch.from_numpy(rng.standard_normal((24, 1, 8, 8), dtype=np.float32))
        t, y = torch.from_numpy(rng.integers(0, 1000, 24)), torch.from_numpy(rng.integers(0, 10, 24))
        module.zero_grad()
        (module(x, t, y) - x).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(named.values(), config.optim.gradient_clip)
        adam.step()
        for name, p in matrices.items():
            gradient = p.grad.double().numpy()
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient
            update = by_singular_values(0.95 * momentum[name] + 0.05 * gradient)
            moved = (1 - 1e-3 * 0.1) * p.detach().double().numpy() - 1e-3 * 0.2 * max(p.shape) ** 0.5 * update
            p.data = torch.from_numpy(moved).float()
    start = dict(build(config).named_parameters())
    for name, p in named.items():
        torch.testing.assert_close(found[name], p.detach(), rtol=0, atol=2e-6, msg=name)
    assert all((found[name] - start[name]).abs().max() > 1e-4 for name in matrices)


def refused(config):
    """On a rank: what differs after a step that is refused, and after one that is taken."""
    player = build_player(config)
    run_steps(player, config, (1, 2))
    before = state(player)
    run_steps(player, config, [3], limit=0.0)
    moved = differing(before, state(player))
    run_steps(player, config, [4])
    return moved, differing(before, state(player))


@pytest.mark.parametrize(("ranks", "stage"), mostly_longer(SHAPES, [(1, 0), (2, 2)]))
def test_a_refused_step_moves_nothing_no_momentum_either(digits, tmp_path, ranks, stage):
    found = run_ranks(refused, ranks, tiny(digits, tmp_path, *MUON, f"deepspeed.zero_stage={stage}"))
    assert [moved for moved, _ in found] == [[]] * ranks
    then = {name for _, moved in found for name, _ in moved}
    assert {"blocks.0.attn.qkv.weight:exp_avg", "blocks.0.attn.qkv.weight:fp32"} <= then
    assert "blocks.0.attn.qkv.weight:exp_avg_sq" not in then


@pytest.fixture(scope="module")
def reference(digits, tmp_path_factory):
    config = of_jit(digits, tmp_path_factory.mktemp("muon"), *ALL, *MUON, "deepspeed.zero_stage=0")
    trained(config, 1)
    return config


@pytest.mark.parametrize(("ranks", "stage"), mostly_longer(SHAPES[1:], [(2, 3)]))
def test_losses_and_distances_are_the_same_on_other_ranks_and_stages(digits, tmp_path, reference, ranks, stage):
    config = of_jit(digits, tmp_path, *ALL, *MUON, f"deepspeed.zero_stage={stage}")
    assert trained(config, ranks) == pytest.approx(losses(reference), rel=1e-5)
    assert evaluations(config)[16] == pytest.approx(evaluations(reference)[16], rel=1e-3)
    adam = of_jit(digits, tmp_path / "adam", *ALL, "optim.weight_decay=0.1", f"deepspeed.zero_stage={stage}")
    if ranks == 2 and stage == 3:
        assert trained(adam, ranks)[-1] != pytest.approx(losses(reference)[-1], rel=1e-4)


@pytest.mark.campaign
@pytest.mark.parametrize(("ranks", "stage"), [(1, 3), (2, 1)])
def test_joint_attention_is_trained_alike_on_other_ranks_and_stages(tmp_path, ranks, stage):
    pairs, own = pack_pairs(tmp_path / "pairs"), (*MUON, "train.steps=16", "optim.warmup_steps=0")
    alone, other = (
        trained(told_in_words(pairs, tmp_path / name, "mmdit", *own, f"deepspeed.zero_stage={of}"), of_ranks)
        for name, of_ranks, of in (("alone", 1, 0), ("other", ranks, stage))
    )
    assert other == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize(("ranks", "stage"), mostly_longer(SHAPES, [(2, 2)]))
def test_it_goes_on_bit_for_bit(digits, tmp_path, ranks, stage):
    own = (*MUON, f"deepspeed.zero_stage={stage}")
    whole, stopped = (of_jit(digits, tmp_path / run, *own) for run in ("whole", "stopped"))
    run_ranks(train, ranks, whole)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train, ranks, stopped, environment={"DTRAIN_FAULTS": "sigkill at=step step=10"})
    run_ranks(train, ranks, stopped)
    ours, theirs = newest(stopped), newest(whole)
    for tensor in theirs.tensors:
        assert np.array_equal(ours.tensor(tensor), theirs.tensor(tensor)), tensor
    assert losses(stopped) == losses(whole)


@pytest.mark.parametrize(("ranks", "stage"), mostly_longer(SHAPES, [(1, 3)]))
def test_another_shape_takes_over_its_state_exactly(digits, tmp_path, ranks, stage):
    config = of_jit(digits, tmp_path, *MUON, "deepspeed.zero_stage=1", "train.steps=4")
    run_ranks(train, 2, config)
    kept = newest(config)
    other = of_jit(digits, tmp_path, *MUON, f"deepspeed.zero_stage={stage}", "train.steps=4")
    run_ranks(rewritten, ranks, other)
    again = Checkpoint.open(config.run.path / "checkpoints" / "step-00000099")
    assert kept.meta["step"] == 4
    assert again.tensors.keys() == kept.tensors.keys()
    assert kept.tensor("blocks.1.attn.qkv.weight:exp_avg").any()
    for tensor in kept.tensors:
        assert np.array_equal(again.tensor(tensor), kept.tensor(tensor)), tensor


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.momentum=0.9"], r"momentum 0.9 is muon's, and name is adamw"),
        (
            ["optim.name=muon", "model={name: unet, width: 8, multipliers: [1, 2], attention: []}"],
            r"optim.name muon moves the matrices of transformer blocks, and model.name is unet; take adamw",
        ),
        (["optim.name=muon", "model.adapt={of: runs/base}"], r"optim.name muon cannot go with model.adapt"),
        (["optim.name=muon", "deepspeed.offload=optimizer"], r"deepspeed.offload optimizer keeps their parts off it"),
    ],
)
def test_what_muon_cannot_go_with_is_refused_in_a_line(overrides, message):
    with pytest.raises(UserError, match=message) as error:
        load(CONFIG, overrides)
    assert "\n" not in str(error.value)


def test_a_run_keeps_its_optimizer(reference):
    """Adam would divide by second moments that Muon has never made."""
    from dtrain.run import RunDirectory
    from dtrain.training.identity import reconcile

    other = reference.model_copy(update={"optim": reference.optim.model_copy(update={"name": "adamw"})})
    with pytest.raises(UserError, match=r"optim.name was 'muon', is 'adamw'"):
        reconcile(RunDirectory(reference.run.path), other)
