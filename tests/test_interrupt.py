"""Ctrl-C on a real terminal: what is kept is said, the exit code tells how it ended, and there is no traceback."""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtrain.checkpoint.directory import complete, step_of
from dtrain.data.pack.pack import pack
from dtrain.run import RunDirectory
from dtrain.tracking.journal import events
from tests.command_line import command
from tests.digits import losses, tiny
from tests.ranks import run_ranks
from tests.terminal import Terminal
from tests.training.runs import LONG, trained


@pytest.fixture
def work(digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(config, path="tiny.yaml"):
    with open(path, "w") as f:
        f.write(config.dump())
    return RunDirectory(config.run.path)


def steps_of(run):
    return [e["step"] for e in events(run.journal_file) if e["event"] == "train"]


def steps_saved(run):
    return [step_of(path) for path in complete(run.checkpoints)]


def test_ctrl_c_stops_a_training_with_a_checkpoint_and_says_how_to_go_on(digits, work):
    run = written(tiny(digits, work / "runs", *LONG, "data.workers=1"))
    terminal = Terminal("train", "tiny.yaml")
    terminal.wait_for(lambda: len(steps_of(run)) > 5)
    terminal.press_ctrl_c()
    assert terminal.exit_code() == 75, terminal.said
    assert "stopping after this step, with a checkpoint; Ctrl-C again ends at once, without one" in terminal.said
    stopped_at = run.outcome()["step"]
    assert f"stopped after step {stopped_at}: Ctrl-C" in terminal.said
    assert "go on with: dtrain train tiny.yaml" in terminal.said
    assert "Traceback" not in terminal.said
    assert "nan" not in terminal.said
    assert steps_saved(run) == [stopped_at]
    assert len(steps_of(run)) == stopped_at
    steps = f"train.steps={stopped_at + 5}"
    assert trained(tiny(digits, work / "runs", steps), 1) == trained(tiny(digits, work / "whole", steps), 1)


@pytest.mark.parametrize("first", ["before the first step", "in a step that takes long"])
def test_ctrl_c_ends_a_training_at_once_where_nothing_is_lost_or_it_is_pressed_again(digits, work, first, monkeypatch):
    run = written(tiny(digits, work / "runs", *LONG))
    if first == "before the first step":
        monkeypatch.setenv("DTRAIN_FAULTS", "")
        terminal = Terminal("train", "tiny.yaml")
        terminal.wait_for(run.lock_file.exists)
        said = "ended before its first step; nothing is lost"
    else:
        monkeypatch.setenv("DTRAIN_FAULTS", "stall at=step step=4")
        terminal = Terminal("train", "tiny.yaml")
        terminal.wait_for(lambda: len(steps_of(run)) >= 2)
        terminal.press_ctrl_c()
        terminal.wait_for(lambda: "Ctrl-C again ends at once" in terminal.said)
        time.sleep(0.6)
        said = "ended at once; the run goes on from its newest checkpoint"
    terminal.press_ctrl_c()
    assert terminal.exit_code(timeout=5) == 130
    assert said in terminal.said
    assert "Traceback" not in terminal.said
    assert not run.lock_file.exists()
    monkeypatch.delenv("DTRAIN_FAULTS")
    assert trained(tiny(digits, work / "runs"), 1) == trained(tiny(digits, work / "whole"), 1)


def test_a_closed_terminal_stops_a_training_with_a_checkpoint(digits, work):
    run = written(tiny(digits, work / "runs", *LONG))
    terminal = Terminal("train", "tiny.yaml")
    terminal.wait_for(lambda: len(steps_of(run)) > 2)
    terminal.hang_up()
    assert terminal.exit_code() == 75, terminal.said
    assert steps_saved(run) == [run.outcome()["step"]]
    assert "stopped after step" in (run.logs / "rank-0.log").read_text()


def test_a_long_evaluation_within_a_training_gives_way_and_is_made_up_for(digits, work):
    often = ("train.steps=6", "eval.every=3", "eval.num_samples=48", "eval.steps=5")
    config = tiny(digits, work / "runs", *often)
    run = written(config)
    terminal = Terminal("train", "tiny.yaml", "eval.num_samples=1000000")
    terminal.wait_for(lambda: "evaluating" in terminal.said)
    time.sleep(0.3)
    terminal.press_ctrl_c()
    assert terminal.exit_code(timeout=20) == 75
    assert steps_saved(run) == [3]
    assert [e["event"] for e in events(run.journal_file) if e["event"] == "eval"] == []
    whole = tiny(digits, work / "whole", *often)
    assert trained(config, 1) == trained(whole, 1)
    assert evaluations(config) == evaluations(whole)


def evaluations(config):
    lines = events(config.run.path / "journal.jsonl")
    return {e["step"]: e["metrics"]["fd_pixels"] for e in lines if e["event"] == "eval"}


def test_ctrl_c_in_an_evaluation_says_what_is_kept_and_the_same_command_goes_on(digits, work):
    config = tiny(digits, work / "runs", "train.steps=2", "eval.steps=50")
    assert len(losses_of(config)) == 2
    run = RunDirectory(config.run.path)
    arguments = ("evaluate", "runs/tiny", "--n", "4800")
    terminal = Terminal(*arguments)
    terminal.wait_for(lambda: len(list((run.path / "evaluations").glob("*/block-*"))) >= 3)
    terminal.press_ctrl_c()
    assert terminal.exit_code(timeout=5) == 130
    kept = 12 * len(list((run.path / "evaluations").glob("*/block-*")))
    assert f"{kept} of 4,800 samples are kept; go on with: dtrain evaluate runs/tiny --n 4800" in terminal.said
    assert "Traceback" not in terminal.said
    assert "\x1b[?25h" in terminal._bytes.decode()  # the cursor is back


def losses_of(config):
    trained(config, 1)
    return losses(config)


@pytest.mark.campaign
def test_ctrl_c_in_a_sweep_says_which_results_are_kept(digits, work):
    config = tiny(digits, work / "runs", "train.steps=2")
    trained(config, 1)
    run = RunDirectory(config.run.path)
    terminal = Terminal("sweep", "tiny", "--steps", "2,3,50", "--n", "240")
    terminal.wait_for(lambda: (run.path / "sweep.jsonl").exists() and "combination 3 of 3: steps 50" in terminal.said)
    terminal.press_ctrl_c()
    assert terminal.exit_code(timeout=5) == 130
    assert "2 results are kept in runs/tiny/sweep.jsonl" in terminal.said
    assert "go on with: dtrain sweep tiny --steps 2,3,50 --n 240" in terminal.said
    assert "Traceback" not in terminal.said
    ((code, text),) = run_ranks(command, 1, "sweep", "tiny", "--steps", "2,3", "--n", "240")
    assert code == 0, text
    stored = [json.loads(line) for line in (run.path / "sweep.jsonl").read_text().splitlines()]
    assert [line["setting"]["steps"] for line in stored] == [2, 3]


def test_ctrl_c_in_packing_keeps_whole_shards_and_no_worker_shows_a_traceback(work):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3500, 32, 32, 3), dtype=np.uint8)
    np.savez("pictures.npz", images=images, labels=rng.integers(0, 10, 3500))
    terminal = Terminal("pack", "pictures.npz", "packed")
    terminal.wait_for(lambda: list(Path(".packed.partial", "train").glob("*.tar")))
    terminal.press_ctrl_c()
    assert terminal.exit_code(timeout=10) == 130
    again = "dtrain pack pictures.npz packed"
    assert f"shards that are whole are kept; go on with: {again}" in terminal.said
    assert "Traceback" not in terminal.said
    pack("pictures.npz", "packed")
    pack("pictures.npz", "whole")
    packed, whole = ({p.name: p.read_bytes() for p in Path(to, "train").iterdir()} for to in ("packed", "whole"))
    assert packed == whole


def test_ctrl_c_while_sampling_leaves_no_file_and_a_folder_says_what_it_holds(digits, work):
    trained(tiny(digits, work / "runs", "train.steps=1"), 1)
    before = set(os.listdir(work))
    terminal = Terminal("sample", "tiny", "--n", "12000", "--steps", "50", "--out", "many.npz")
    terminal.wait_for(lambda: re.search(r"[1-9]\d*/50000", terminal.said))
    terminal.press_ctrl_c()
    assert terminal.exit_code(timeout=5) == 130
    again = "dtrain sample tiny --n 12000 --steps 50 --out many.npz"
    assert f"no image was written; start again with: {again}" in terminal.said
    assert set(os.listdir(work)) == before

    terminal = Terminal("sample", "tiny", "--n", "12000", "--steps", "5", "--out", "many/")
    terminal.wait_for(lambda: len(list(Path("many").glob("*.png"))) > 30)
    terminal.press_ctrl_c()
    assert terminal.exit_code(timeout=5) == 130
    (count,) = re.findall(
        r"many holds the first ([0-9,]+) of 12,000 images, as its labels.csv says; remove", terminal.said
    )
    named = Path("many/labels.csv").read_text().splitlines()[1:]
    assert 0 < int(count.replace(",", "")) <= len(named) <= len(list(Path("many").glob("*.png")))
    for line in named:
        with Image.open(Path("many", line.split(",")[0])) as picture:
            picture.load()
