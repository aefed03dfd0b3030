"""A checkpoint knows no shape: stages, world sizes, precisions and offload, written in one and resumed in another."""

import numpy as np
import pytest

from dtrain.tracking.journal import events
from tests.digits import tiny
from tests.longer import longer
from tests.ranks import run_ranks
from tests.training.elastic import resume_elsewhere, shape, tensors, write
from tests.training.runs import train, trained

STEPS = 40
# (stage, ranks) written and read: each stage and each number of ranks as both. A campaign takes all 144 pairs.
PAIRS = [((0, 2), (1, 3)), ((1, 1), (2, 2)), ((2, 2), (3, 3)), ((3, 3), (0, 1))]


@pytest.fixture(scope="module")
def reference(digits, tmp_path_factory):
    return trained(tiny(digits, tmp_path_factory.mktemp("reference"), *shape(0), f"train.steps={STEPS}"), 1)


@pytest.mark.parametrize(("written", "read"), PAIRS, ids=lambda s: f"stage{s[0]}-{s[1]}ranks")
def test_a_checkpoint_of_one_shape_goes_on_in_another(digits, tmp_path, reference, written, read):
    folder = write(digits, tmp_path / "written", shape(written[0]), written[1])
    got, loaded = resume_elsewhere(digits, folder, tmp_path / "read", shape(read[0]), read[1], STEPS)
    saved = tensors(folder)
    assert saved.keys() == loaded.keys()
    assert all(np.array_equal(saved[name], loaded[name]) for name in saved)  # weights, moments, EMAs: exact
    assert got == pytest.approx(reference, abs=1e-5)


BF16 = "deepspeed.precision=bf16"
AUTOCAST = "deepspeed.precision=bf16_autocast"
OFFLOAD = "deepspeed.offload=optimizer"
ALL = "deepspeed.offload=all"


@pytest.mark.parametrize(
    ("written", "read", "tolerance"),
    [
        (shape(0), shape(3, BF16), 1e-2),
        longer(shape(3, BF16), shape(1, BF16), 1e-3),
        longer(shape(2, BF16), shape(3, ALL, BF16), 1e-3),
        longer(shape(1, BF16), shape(2, BF16), 1e-3),
        (shape(2, OFFLOAD), shape(3, ALL), 1e-5),
        longer(shape(3, ALL), shape(1, OFFLOAD), 1e-5),
        longer(shape(3, OFFLOAD), shape(0), 1e-5),
        longer(shape(0, AUTOCAST), shape(3, AUTOCAST), 1e-3),
        longer(shape(2, AUTOCAST), shape(1, AUTOCAST), 1e-3),
    ],
    ids=lambda v: "-".join(x.split("=")[1] for x in v) if isinstance(v, list) else None,
)
def test_precision_and_offload_change_hands_too(digits, tmp_path, written, read, tolerance):
    folder = write(digits, tmp_path / "written", written, 2)
    got, loaded = resume_elsewhere(digits, folder, tmp_path / "read", read, 1, 25)
    whole = trained(tiny(digits, tmp_path / "whole", *read, "train.steps=25"), 1)
    saved = tensors(folder)
    trainable = [n for n in saved if not n.startswith("pos_embed")]  # a bf16 model holds its frozen positions in bf16
    assert all(np.array_equal(saved[name], loaded[name]) for name in trainable)
    assert got == pytest.approx(whole, abs=tolerance)


@pytest.mark.parametrize(
    "overrides",
    [
        longer(shape(1, BF16)),
        longer(shape(3, BF16)),
        longer(shape(0, AUTOCAST)),
        shape(3, AUTOCAST),
        longer(shape(2, OFFLOAD)),
        shape(3, ALL),
        longer(shape(0, "train.activation_checkpointing=true")),
        longer(shape(3, "train.activation_checkpointing=true")),
        shape(3, "deepspeed.extra={zero_optimization: {sub_group_size: 2000, stage3_param_persistence_threshold: 0}}"),
    ],
    ids=lambda v: "-".join(x.partition("=")[2][:14] for x in v),
)
def test_every_way_to_save_memory_trains_like_the_plain_one(digits, tmp_path, reference, overrides):
    got = trained(tiny(digits, tmp_path, *overrides, "train.steps=20", "train.micro_batch=4"), 2)
    tolerance = 1e-5 if "bf16" not in str(overrides) else 2e-2
    assert got == pytest.approx(reference[:20], abs=tolerance)


def test_initial_weights_are_the_same_at_every_stage_and_exact_under_bf16(digits, tmp_path):
    from tests.training.players import pieces_of

    def start(overrides, world_size):
        out = {}
        for pieces, sizes, _ in run_ranks(pieces_of, world_size, tiny(digits, tmp_path, *overrides), 0):
            for name, first, values in pieces:
                out.setdefault(name, np.zeros(sizes[name], np.float32))[first : first + len(values)] = values
        return out

    plain = start(shape(0), 1)
    for overrides in (shape(3), shape(3, BF16), shape(1, BF16), shape(3, ALL)):
        other = start(overrides, 2)
        for name, values in plain.items():
            if not (BF16 in overrides and name.startswith("pos_embed")):
                np.testing.assert_array_equal(other[name], values, err_msg=f"{name} {overrides}")


def test_profiles_may_come_and_go(digits, tmp_path):
    """A new EMA begins as the weights it is given; those that stay go on exactly."""
    folder = write(digits, tmp_path / "written", [*shape(2), "ema=[{decay: 0.9}]"], 2)
    more = [*shape(3), "ema=[{decay: 0.9}, {decay: 0.5}]"]
    _, loaded = resume_elsewhere(digits, folder, tmp_path / "more", more, 1, 12)
    saved = tensors(folder)
    for name in (n for n in saved if n.endswith(":fp32") and not n.startswith("pos_embed")):
        np.testing.assert_array_equal(loaded[name.replace("fp32", "ema_0")], saved[name.replace("fp32", "ema_0")])
        np.testing.assert_array_equal(loaded[name.replace("fp32", "ema_1")], saved[name])
    _, fewer = resume_elsewhere(digits, folder, tmp_path / "fewer", [*shape(1), "ema=[]", "eval.ema=null"], 1, 12)
    assert not [n for n in fewer if "ema" in n]
    lines = events(tmp_path / "more/tiny/journal.jsonl")
    assert "ema" in [e for e in lines if e["event"] == "config"][-1]["context"]["changed"]


def test_another_batch_size_goes_on_through_the_same_images(digits, tmp_path):
    """Stopped at 10 steps of 24 images, gone on with 12 a step: images 240, 252, … and not a step count times 12."""
    folder = write(digits, tmp_path / "written", shape(2), 2)
    got, _ = resume_elsewhere(digits, folder, tmp_path / "read", [*shape(0), "data.batch_size=12"], 1, 12)
    lines = [e for e in events(tmp_path / "read/tiny/journal.jsonl") if e["event"] == "train"]
    assert [e["images"] for e in lines][-2:] == [252, 264]
    assert len(got) == 12


def test_a_new_run_begins_with_anothers_weights(digits, tmp_path):
    folder = write(digits, tmp_path / "written", shape(3), 2)
    config = tiny(digits, tmp_path, "run.name=fine", f"run.init_from={folder}/tiny", "train.steps=1", "optim.lr=1e-12")
    run_ranks(train, 2, config)
    from dtrain.checkpoint.directory import complete
    from dtrain.checkpoint.format import Checkpoint

    begun = Checkpoint.open(complete(config.run.path / "checkpoints")[-1])
    saved = tensors(folder)
    for name in (n for n in saved if n.endswith(":fp32")):
        np.testing.assert_allclose(begun.tensor(name), saved[name], atol=1e-9)
        if not name.startswith("pos_embed"):
            np.testing.assert_allclose(begun.tensor(name.replace("fp32", "ema_0")), saved[name], atol=1e-9)
    assert begun.meta["step"] == 1


def begun_from(config, places):
    """The largest difference of this rank's first weights from rank 0's, where ranks look at different places."""
    from dtrain import distributed
    from dtrain.training.player import Player
    from dtrain.training.players import Players
    from dtrain.training.start import _begin_from

    engine = Player.of(config, 12)
    mine = config.run.model_copy(update={"init_from": places[distributed.rank()]})
    _begin_from(Players([engine]), config.model_copy(update={"run": mine}))
    weights = np.concatenate([p.detach().numpy().flatten() for _, p in engine.state.trainable])
    return np.abs(weights - distributed.gather_objects(weights)[0]).max()


def test_all_ranks_begin_with_the_checkpoint_that_rank_0_found_newest(digits, tmp_path):
    """Rank 1 looks a moment later, when the other run has committed another."""
    early, late = (write(digits, tmp_path / name, shape(0), 1) / "tiny" for name in ("early", "late"))
    run_ranks(train, 1, tiny(digits, tmp_path / "late", *shape(0), "train.steps=15"))
    config = tiny(digits, tmp_path, *shape(0), "run.name=fine")
    assert run_ranks(begun_from, 2, config, [str(early), str(late)]) == [0, 0]


def test_another_model_is_refused_by_name(digits, tmp_path):
    folder = write(digits, tmp_path / "written", shape(2), 1)
    other = tiny(digits, tmp_path, "run.name=wide", f"run.init_from={folder}/tiny", "model.width=64")
    with pytest.raises(RuntimeError, match=r"step-\d+ is of another model: model.width is 32 there, 64 here"):
        run_ranks(train, 1, other)
    assert not other.run.path.exists()  # it is seen before anything is made
    with pytest.raises(RuntimeError, match=r"is of another model: blocks.0.adaLN_modulation.1.bias has 192 elements"):
        run_ranks(begun_from, 1, other, [other.run.init_from])
