"""Samples that are no numbers: never a black picture with a distance, always an error that names them."""

import pytest
import torch

from dtrain.diffusion.process import build as build_process
from dtrain.errors import NotFinite
from dtrain.evaluation.generate import Generator
from dtrain.models.build import build
from dtrain.run import RunDirectory
from tests.command_line import command
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.training.runs import train

OVERFLOW = "3e38"  # guidance near float32's end


def test_the_error_names_the_samples_and_those_of_a_grid_by_their_place(digits, tmp_path):
    from dtrain.training.evaluation import draw_grid

    config = tiny(digits, tmp_path)
    model = build(config)
    model.y_embedder.embedding_table.weight.data[3] = torch.nan  # as where one class alone has diverged
    generator = Generator.of(model, build_process(config.diffusion), config, torch.device("cpu"))
    with pytest.raises(NotFinite, match=r"x_0 is not finite in 2 of 20 samples drawn together \(ids 103, 113\)"):
        generator.draw(list(range(100, 120)), torch.arange(20) % 10, config.eval)
    with pytest.raises(NotFinite, match=r"\(ids 3 of the grid\)"):
        draw_grid(generator, config, tmp_path / "grid.png")
    assert list(tmp_path.iterdir()) == []


def test_commands_end_in_that_line_and_a_sweep_leaves_the_combination_out(digits, tmp_path):
    config = tiny(digits, tmp_path, "train.steps=3")
    run_ranks(train, 1, config)
    run, out = RunDirectory(config.run.path), tmp_path / "all.npz"
    told = run_ranks(command, 2, "sample", run.path, "-n", 24, "--guidance", OVERFLOW, "--out", out)
    assert [code for code, _ in told] == [2, 2]
    (line,) = "".join(text for _, text in told).splitlines()  # rank 0 alone says it
    assert line.startswith("dtrain: x_0 is not finite in ")
    assert not out.exists()

    ((code, text),) = run_ranks(command, 1, "sweep", run.path, "--guidance", f"1,{OVERFLOW},2")
    assert code == 0, text
    (left_out,) = [line for line in text.splitlines() if "is left out" in line]
    assert f"combination 2 of 3: guidance {OVERFLOW} is left out: x_0 is not finite" in left_out
    assert (run.path / "sweep.jsonl").read_text().count("\n") == 2
    assert not (run.path / "evaluations").exists()
    ((code, text),) = run_ranks(command, 1, "sweep", run.path, "--guidance", OVERFLOW)
    assert (code, "x_0 is not finite" in text.splitlines()[-1]) == (2, True)
