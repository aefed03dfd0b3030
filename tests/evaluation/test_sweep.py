"""Sweeps: every combination once, going on where one stopped, and the tables made of them."""

import json
import time

import numpy as np
import pytest

from dtrain.errors import UserError
from dtrain.evaluation.combinations import checkpoints_of, combinations, configured
from dtrain.evaluation.generate import Generator
from dtrain.evaluation.sweep import Row, best, heat_map, summary, sweep, table
from dtrain.run import RunDirectory
from tests.command_line import command, failing
from tests.digits import tiny
from tests.ranks import run_ranks, start_ranks

AXES = {"checkpoint": [2, 4], "ema": [0, "raw"], "eta": [0, 1.0], "steps": [2, 3]}


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    few = ("train.steps=4", "train.checkpoint_every=2", "eval.validation_images=4", "diffusion.timesteps=50")
    config = tiny(digits, tmp_path_factory.mktemp("runs"), *few)
    run_ranks(_train, 1, config)
    return config


def _train(config):
    from dtrain.training.run_training import train

    return train(config)


def _sweep(config, axes, pause=0.0):
    """(lines, blocks drawn)."""
    drawn, draw = [], Generator.draw

    def counted(self, ids, labels, how, *more):
        drawn.append(ids[0])
        time.sleep(pause)
        return draw(self, ids, labels, how, *more)

    Generator.draw = counted
    return sweep(RunDirectory(config.run.path), config, axes), len(drawn)


def _evaluate(config, step, weights):
    from dtrain.evaluation.combinations import configured
    from dtrain.evaluation.evaluate import evaluate
    from dtrain.evaluation.opened import open_generator
    from dtrain.evaluation.reference import Reference

    config = configured(config, {"ema": weights.removeprefix("ema_")})
    generator = open_generator(RunDirectory(config.run.path), config, "cpu", step).generator
    return evaluate(generator, config, Reference.open(config, "cpu"))[0]


def test_a_killed_sweep_goes_on_and_every_number_is_that_of_its_own_evaluation(trained):
    path = trained.run.path / "sweep.jsonl"
    started = start_ranks(_sweep, 1, trained, AXES, 0.02)
    end = time.monotonic() + 60
    while not path.exists() or path.read_text().count("\n") < 5:
        assert time.monotonic() < end
        time.sleep(0.01)
    for process, _ in started:
        process.kill()
        process.join()
    whole = path.read_text()
    path.write_text(whole + '{"key": "to')  # the last line in part
    done = whole.count("\n")
    assert 5 <= done < 16
    ((lines, drawn),) = run_ranks(_sweep, 1, trained, AXES)
    blocks = -(-trained.eval.num_samples // trained.eval.batch_size)
    assert (16 - done - 1) * blocks <= drawn <= (16 - done) * blocks
    assert [line["setting"] for line in lines] == combinations(AXES)
    assert len(lines) == 16
    assert not (trained.run.path / "evaluations").exists()
    assert [json.loads(t)["key"] for t in path.read_text().splitlines() if t.endswith("}")] == [
        line["key"] for line in lines
    ]
    chosen = next(line for line in lines if line["setting"] == {"checkpoint": 2, "ema": "raw", "eta": 1.0, "steps": 3})
    at = trained.model_copy(update={"eval": trained.eval.model_copy(update={"ema": None, "eta": 1.0, "steps": 3})})
    assert run_ranks(_evaluate, 1, at, 2, "raw") == [chosen["metrics"]]

    wider = AXES | {"steps": [2, 3, 4], "checkpoint": [4], "ema": [0]}
    ((lines, drawn),) = run_ranks(_sweep, 1, trained, wider)
    assert (len(lines), drawn) == (6, 2 * blocks)  # only the new steps
    twos = run_ranks(_sweep, 2, trained, wider | {"guidance": [1.5]})
    assert twos[0][0] == twos[1][0]
    assert len(twos[0][0]) == 6


def test_values_and_checkpoints_that_cannot_be_are_refused_before_anything_is_drawn(trained):
    run = RunDirectory(trained.run.path)
    assert checkpoints_of(run, "all") == [2, 4]
    for wanted in ("3", "2,4O", "2,", ""):
        with pytest.raises(UserError, match=rf"--checkpoints {wanted}: .* has 2, 4; or say `all`"):
            checkpoints_of(run, wanted)
    assert "'2,,3' is not a list of values" in failing("sweep", trained.run.path, "--steps", "2,,3")
    assert "give the sweep something to vary" in failing("sweep", trained.run.path)
    assert "'[2' is not a list of values" in failing("sweep", trained.run.path, "--steps", "[2")
    before = len((trained.run.path / "sweep.jsonl").read_text())
    assert "`eval.steps` on the command line is 'many'" in failing(
        "sweep", trained.run.path, "--steps", "2,many", "--guidance", "9"
    )
    assert len((trained.run.path / "sweep.jsonl").read_text()) == before


def test_a_sweep_of_what_the_model_says_computes_anew_for_other_images(trained):
    bpds = []
    for images in (8, 16):
        e = trained.eval.model_copy(update={"validation_images": images, "metrics": ["bpd"]})
        ((lines, _),) = run_ranks(_sweep, 1, trained.model_copy(update={"eval": e}), {"checkpoint": [4]})
        bpds.append(lines[0]["metrics"]["bpd"])
    assert bpds[0] != bpds[1]
    ((code, text),) = run_ranks(command, 1, "sweep", trained.run.path, "--metrics", "bpd,fd", "--checkpoints", "2,4")
    assert code == 0, text
    assert "best bpd: " in text


def test_seeds_are_averaged_and_the_best_setting_is_named(trained, tmp_path):
    arguments = ("--steps", "2,3", "--eta", "0,1", "--seeds", "0,1", "--n", "24", "--out", tmp_path / "heat.png")
    ((code, text),) = run_ranks(command, 1, "sweep", trained.run.path, *arguments)
    assert code == 0
    lines = text.splitlines()
    assert lines[0].split() == ["eta", "steps", "fd_pixels"]
    found = {tuple(line.split()[:2]): float(line.split()[2]) for line in lines[1:5]}
    assert set(found) == {(eta, steps) for eta in "01" for steps in "23"}
    winner = min(found, key=found.get)
    assert lines[5] == f"best fd_pixels: {found[winner]:.4f} at eta {winner[0]}, steps {winner[1]}  (24 samples)"
    stored = [json.loads(t) for t in (trained.run.path / "sweep.jsonl").read_text().splitlines() if t.endswith("}")]
    seeds = [
        line["metrics"]["fd_pixels"]
        for line in stored
        if line["context"]["n"] == 24 and (line["context"]["eta"], line["context"]["steps"]) == (1.0, 3)
    ]
    assert len(set(seeds)) == 2
    assert found["1", "3"] == pytest.approx(np.mean(seeds), abs=1e-4)
    assert f"± {np.std(seeds, ddof=1):.4f}" in text

    ((code, text),) = run_ranks(command, 1, "sweep", trained.run.path, *arguments[:2], "--n", "24", "--bootstrap", "2")
    assert code == 0
    assert text.split()[:4] == ["steps", "fd_pixels", "fd_pixels_low", "fd_pixels_high"]


def test_the_heat_map_has_a_cell_for_every_setting_in_its_place(tmp_path):
    """Read back from the picture: the cell of the highest value is the darkest, of the lowest the brightest."""
    from PIL import Image

    rows = [
        Row({"eta": eta, "steps": steps}, {"fd_pixels": eta * 10 + 1 / steps, "recall_pixels": eta}, {})
        for eta in (0.0, 1.0)
        for steps in (5, 10, 20)
    ]
    assert best(rows, "fd_pixels").setting == {"eta": 0.0, "steps": 20}
    assert best(rows, "recall_pixels").setting["eta"] == 1.0
    assert heat_map(rows, "fd_pixels", tmp_path / "h.png")
    pixels = np.asarray(Image.open(tmp_path / "h.png").convert("RGB")).astype(int)
    purple, yellow = (68, 1, 84), (253, 231, 36)  # viridis' ends
    of = [np.argwhere(np.abs(pixels - colour).max(2) <= 6) for colour in (purple, yellow)]
    assert all(len(places) > 200 for places in of)
    assert of[0][:, 0].mean() > of[1][:, 0].mean()  # η = 1 below η = 0
    assert of[0][:, 1].mean() < of[1][:, 1].mean()  # S = 5 left of S = 20
    assert not heat_map(rows[:1], "fd_pixels", tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_averages_of_several_widths_are_a_curve(digits, tmp_path):
    from PIL import Image

    rows = [Row({"ema": f"sigma_{width}"}, {"fd_pixels": width}, {}) for width in (0.2, 0.05, 0.1)]
    assert heat_map(rows, "fd_pixels", tmp_path / "curve.png")
    pixels = np.asarray(Image.open(tmp_path / "curve.png").convert("RGB")).astype(int)
    blue = np.argwhere(np.abs(pixels - (31, 119, 180)).max(2) <= 6)
    assert blue[:, 0][blue[:, 1].argmin()] > blue[:, 0][blue[:, 1].argmax()] + 50  # it rises from left to right
    at = configured(tiny(digits, tmp_path, "ema=[{sigma_rel: 0.05}]"), {"ema": "sigma_0.1"})
    assert at.eval.ema == {"sigma_rel": 0.1}


def test_the_summary_takes_seeds_together_and_nothing_else():
    lines = [
        {"setting": {"steps": steps, "seed": seed}, "metrics": {"fd_pixels": steps + seed}}
        for steps in (5, 10)
        for seed in (0, 2)
    ]
    rows = summary(lines)
    assert [(r.setting, r.metrics["fd_pixels"]) for r in rows] == [({"steps": 5}, 6.0), ({"steps": 10}, 11.0)]
    assert rows[0].std["fd_pixels"] == pytest.approx(np.sqrt(2))
    assert table(rows).splitlines()[1].split() == ["5", "6.0000", "±", "1.4142"]


@pytest.mark.parametrize("out", ["nowhere/heat.png", "heat.odd"])
def test_a_picture_that_cannot_be_written_ends_all_ranks_in_one_line_behind_the_table(trained, tmp_path, out):
    arguments = ("sweep", trained.run.path, "--steps", "2,3", "--n", 24, "--out", tmp_path / out)
    told = run_ranks(command, 2, *arguments)
    assert [code for code, _ in told] == [2, 2]
    assert told[1][1] == ""
    assert f"dtrain: cannot write {tmp_path / out}: " in told[0][1].splitlines()[-1]
    assert "best fd_pixels: " in told[0][1]
