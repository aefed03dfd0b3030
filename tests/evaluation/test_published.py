"""`dtrain evaluate CONFIG --init FILE`: weights of a file are evaluated without a run."""

import json

import torch

from dtrain.checkpoint.export import export
from dtrain.run import RunDirectory
from tests.command_line import command
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.training.runs import train


def test_a_files_weights_are_evaluated_as_the_run_that_they_came_from(digits, tmp_path):
    config = tiny(digits, tmp_path, "train.steps=3", "eval.features=pixels")
    run_ranks(train, 1, config)
    export(RunDirectory(config.run.path), tmp_path / "out", None, 0, "fp32", "safetensors")
    file, written = tmp_path / "out" / "model.safetensors", tmp_path / "published.yaml"
    written.write_text(config.dump())
    ((code, said),) = run_ranks(command, 1, "evaluate", str(config.run.path), "--json")
    assert code == 0, said
    of_run = json.loads(said.splitlines()[-1])["metrics"]
    ((code, said),) = run_ranks(command, 1, "evaluate", str(written), "--init", str(file), "--json")
    assert code == 0, said
    assert json.loads(said.splitlines()[-1])["metrics"] == of_run
    assert f"{file}: fd_pixels" in said


def test_a_file_with_several_sets_asks_which_and_one_that_is_not_there_is_named(digits, tmp_path):
    config, written, file = tiny(digits, tmp_path, "eval.features=pixels"), tmp_path / "c.yaml", tmp_path / "two.pt"
    written.write_text(config.dump())
    torch.save({"ema": {"a": torch.zeros(1)}, "model": {"a": torch.zeros(1)}}, file)
    ((code, said),) = run_ranks(command, 1, "evaluate", str(written), "--init", str(file))
    assert (code, "choose" in said) == (2, True)
    ((code, said),) = run_ranks(command, 1, "evaluate", str(written), "--init", str(tmp_path / "none.pt"))
    assert code == 2
    assert "none.pt: there is no such file" in said
