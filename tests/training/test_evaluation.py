"""The evaluation within training: equal at any world size, made up for when it was cut off, and what is shown of it."""

import json

import pytest
import torch

from dtrain.diffusion.process import build as build_process
from dtrain.evaluation.generate import Generator
from dtrain.run import RunDirectory
from dtrain.tracking.journal import Journal, events, read
from tests.digits import losses, tiny
from tests.longer import longer
from tests.ranks import run_ranks
from tests.training.runs import train, trained


def evaluations(config):
    return {
        e["step"]: e["metrics"]["fd_pixels"] for e in events(config.run.path / "journal.jsonl") if e["event"] == "eval"
    }


@pytest.mark.parametrize("step", [longer(8), 20])
def test_an_evaluation_that_was_cut_off_is_made_up_for(digits, tmp_path, step):
    often = ("train.checkpoint_every=4", "eval.every=8")
    whole = tiny(digits, tmp_path / "whole", *often)
    trained(whole, 2)
    config = tiny(digits, tmp_path, *often)
    with pytest.raises(RuntimeError, match="died"):
        run_ranks(train, 2, config, environment={"DTRAIN_FAULTS": f"sigkill_all at=eval:journal skip={step // 9}"})
    assert step not in evaluations(config)
    trained(config, 2)
    assert evaluations(config) == evaluations(whole)
    assert RunDirectory(config.run.path).outcome() == {"outcome": "finished", "step": 20, "attempt": 2}


def test_a_stop_at_the_last_step_leaves_its_evaluation_to_the_next_start(digits, tmp_path):
    config = tiny(digits, tmp_path, "eval.every=20")
    run_ranks(train, 2, config, environment={"DTRAIN_FAULTS": "sigterm at=step step=20 rank=1"})
    assert RunDirectory(config.run.path).outcome()["outcome"] == "stopped"
    assert len(losses(config)) == 20
    assert evaluations(config) == {}
    trained(config, 2)
    assert RunDirectory(config.run.path).outcome()["outcome"] == "finished"
    assert list(evaluations(config)) == [20]


def test_evaluations_and_grids_are_the_same_on_one_rank_and_two(digits, tmp_path):
    results = []
    for world_size in (1, 2):
        config = tiny(digits, tmp_path / str(world_size), "train.steps=10", "eval.every=5")
        trained(config, world_size)
        lines = [e for e in read(config.run.path / "journal.jsonl") if e["event"] == "eval"]
        assert [e["step"] for e in lines] == [5, 10]
        results.append([e["metrics"]["fd_pixels"] for e in lines])
        for line in lines:
            assert line["context"]["n"] == 48
            assert line["context"]["ema"] == "ema_0"
            assert (config.run.path / line["context"]["artifact"]).stat().st_size > 500
    assert results[0] == pytest.approx(results[1], rel=1e-3)
    assert json.loads((config.run.path / "outcome.json").read_text())["outcome"] == "finished"


def test_the_grid_is_drawn_in_blocks_that_an_evaluation_has_room_for(digits, tmp_path):
    from PIL import Image

    from dtrain.models.build import build
    from dtrain.training.evaluation import draw_grid

    drawn = []
    for batch_size in (12, 80):
        config = tiny(digits, tmp_path, f"eval.batch_size={batch_size}")
        torch.manual_seed(0)
        model, rows = build(config), []
        model.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(len(inputs[0])))
        draw_grid(
            Generator.of(model, build_process(config.diffusion), config, torch.device("cpu")),
            config,
            tmp_path / "grid.png",
        )
        assert max(rows) == batch_size
        drawn.append(torch.tensor(list(Image.open(tmp_path / "grid.png").tobytes())))
    assert (drawn[0] - drawn[1]).abs().max() <= 1  # a batch of another shape rounds differently


def test_what_is_said_at_the_end_has_bars_where_bars_say_something(digits, tmp_path):
    from dtrain.training.record.summary import summary

    config = tiny(digits, tmp_path)
    run = RunDirectory(config.run.path)
    run.make_folders()
    run.save_config(config)
    journal = Journal(run.journal_file)
    context = {"ema": "ema_0", "n": 48, "steps": 5, "sampler": "ddim"}
    for step, value in enumerate([0.0, float("nan"), float("inf"), 2.0, -1.0, 4.0]):
        journal.append("eval", step, 0, {"fd_pixels": value}, context)
        lines = summary(run.path).splitlines()[1:]
        assert len(lines) == step + 1
    assert [line.count("█") for line in lines] == [0, 0, 0, 20, 0, 40]
