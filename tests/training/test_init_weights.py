"""run.init_from and run.init_weights: what a start takes or refuses is what --check says before."""

from pathlib import Path

import numpy as np
import pytest
import torch

from dtrain.checkpoint.directory import complete
from dtrain.checkpoint.format import Checkpoint
from dtrain.config import load
from dtrain.errors import UserError
from dtrain.models.build import build
from dtrain.training.check import check_start
from tests.digits import CONFIG, tiny
from tests.ranks import run_ranks
from tests.training.runs import train


def first_weights(config) -> dict[str, np.ndarray]:
    """What the engine of a new run holds before its first step."""
    from dtrain.training.player import Player
    from dtrain.training.players import Players
    from dtrain.training.start import _begin_from

    engine = Player.of(config, 24)
    _begin_from(Players([engine]), config)
    return {name: p.detach().numpy().copy() for name, p in engine.state.trainable}


def sets(config) -> dict[str, dict[str, torch.Tensor]]:
    """Two sets of weights of the config's model."""
    seeds = {"ema": 11, "model": 12}
    return {
        kind: build(config.model_copy(update={"run": config.run.model_copy(update={"seed": seed})})).state_dict()
        for kind, seed in seeds.items()
    }


def test_a_start_begins_with_the_set_that_was_chosen_and_the_check_says_nothing_against_it(digits, tmp_path):
    both = sets(tiny(digits, tmp_path))
    torch.save(both, tmp_path / "w.ckpt")
    for kind, weights in both.items():
        config = tiny(digits, tmp_path, f"run.init_from={tmp_path}/w.ckpt", f"run.init_weights={kind}")
        assert "starts" in check_start(config, 1)
        (begun,) = run_ranks(first_weights, 1, config)
        assert all(np.array_equal(values, weights[name].numpy()) for name, values in begun.items())


def test_a_runs_averaged_weights_begin_another_run(digits, tmp_path):
    first = tiny(digits, tmp_path, "train.steps=8", "optim.lr=1e-2")
    run_ranks(train, 1, first)
    checkpoint = Checkpoint.open(complete(first.run.path / "checkpoints")[-1])
    place = f"run.init_from={first.run.path}"
    for more, key in (([], "fp32"), (["run.init_weights=model"], "fp32"), (["run.init_weights=ema"], "ema_0")):
        config = tiny(digits, tmp_path, "run.name=next", place, *more)
        assert "starts" in check_start(config, 1)
        (begun,) = run_ranks(first_weights, 1, config)
        for name, values in begun.items():
            assert np.array_equal(values.flatten(), checkpoint.tensor(f"{name}:{key}"))
    without = tiny(digits, tmp_path, "run.name=without", "train.steps=1", "ema=[]", "eval.ema=null")
    run_ranks(train, 1, without)
    config = tiny(digits, tmp_path, "run.name=next", f"run.init_from={without.run.path}", "run.init_weights=ema")
    for ask in (lambda: check_start(config, 1), lambda: run_ranks(first_weights, 1, config)):
        with pytest.raises((UserError, RuntimeError), match=r"holds no (averaged weights|weights ema_0)"):
            ask()


def test_the_check_refuses_what_the_start_would(digits, tmp_path):
    config = tiny(digits, tmp_path)
    both = sets(config)
    wide = build(tiny(digits, tmp_path, "model.width=64")).state_dict()
    (tmp_path / "folder").mkdir()
    for name, content in {"both.pt": both, "wide.pth": wide, "folder/w.bin": both["ema"], "w.tar": both["ema"]}.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "cut.bin").write_bytes((tmp_path / "wide.pth").read_bytes()[:999])
    for name, message in {
        "both.pt": "choose: run.init_weights=ema or run.init_weights=model",
        "wide.pth": r"has shape \(.*64.*\) in .*wide.pth, but \(.*32.*\) in the model",
        "cut.bin": "is damaged or no checkpoint",
        "w.tar": r"a file of weights is .pt, .pth, .bin, .ckpt or .safetensors",
        "folder": r"folder is no run; for the weights in it say .*folder/w.bin",
        "absent.ckpt": "there is no such file",
    }.items():
        began = tiny(digits, tmp_path, f"run.init_from={tmp_path}/{name}")
        with pytest.raises(UserError, match=message):
            check_start(began, 1)
        if name != "absent.ckpt":
            with pytest.raises(RuntimeError, match=message):
                run_ranks(first_weights, 1, began)
    assert not Path(config.run.path).exists()


def test_a_choice_of_weights_needs_weights_to_choose_from(digits):
    with pytest.raises(UserError, match=r"run.* init_weights ema chooses among the weights of init_from"):
        load(CONFIG, [f"data.shards={digits}/train", "run.init_weights=ema"])
