"""What one rank alone cannot read ends all ranks together, in one clear line."""

import itertools
import json
import os
from pathlib import Path

import pytest
import yaml

from dtrain.config import validate
from dtrain.errors import SharedError
from dtrain.tracking.journal import events
from tests.command_line import command
from tests.data.shard_files import data_set, labelled_pictures, short_run
from tests.longer import mostly_longer
from tests.ranks import join_ranks, run_ranks, start_ranks
from tests.training.runs import wait_for_step

ROOT = Path(__file__).parent.parent.parent


def config(folder: Path, steps: int, **data) -> dict:
    return short_run(folder, steps, on_error="raise", **data)


def error_of(plain: dict) -> str:
    """The error that all ranks raise together, or how the run ended."""
    from dtrain.training.run_training import train

    try:
        return train(validate(plain, "a test"))
    except SharedError as e:
        return str(e)


def outcome(folder: Path) -> dict:
    return json.loads((folder / "runs" / "run" / "outcome.json").read_text())


@pytest.fixture(scope="module")
def damaged(tmp_path_factory):
    """60 samples in shards, the 41st of which is no picture."""
    folder = tmp_path_factory.mktemp("damaged") / "data"
    pictures = labelled_pictures(60)
    pictures[41]["png"] = b"broken"
    data_set(folder, pictures)
    return folder


@pytest.mark.parametrize(("stage", "workers"), mostly_longer(itertools.product(range(4), (0, 2)), [(0, 0), (3, 2)]))
def test_a_sample_that_one_rank_cannot_use_ends_all_ranks_with_the_same_words(tmp_path, damaged, stage, workers):
    (tmp_path / "data").symlink_to(damaged)
    plain = config(tmp_path, 15, workers=workers) | {"deepspeed": {"zero_stage": stage}}
    first, second = run_ranks(error_of, 2, plain)
    assert first == second
    assert "png is not a JPEG" in first
    assert outcome(tmp_path) == outcome(tmp_path) | {"outcome": "user_error", "message": first}
    lines = [line for line in events(tmp_path / "runs/run/journal.jsonl") if line["event"] == "train"]
    assert all(line["metrics"]["loss"] < 10 for line in lines)  # the rows that stood in are in no curve
    assert not (tmp_path / "runs/run/lock").exists()


def test_a_shard_that_goes_while_a_run_reads_it_ends_all_ranks(tmp_path):
    data_set(tmp_path / "data", labelled_pictures(60))
    plain = config(tmp_path, 100_000)
    started = start_ranks(error_of, 2, plain)
    wait_for_step(validate(plain, "a test"), 5)
    for shard in (tmp_path / "data").glob("*.tar"):
        os.truncate(shard, 512)
    first, second = join_ranks(started)
    assert first == second
    assert "is cut off; restore the shard" in first
    assert outcome(tmp_path)["outcome"] == "user_error"


def test_the_line_is_said_once_and_every_rank_leaves_with_code_2(tmp_path, damaged):
    (tmp_path / "data").symlink_to(damaged)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config(tmp_path, 15)))
    ranks = run_ranks(command, 2, "train", tmp_path / "run.yaml")
    assert [code for code, _ in ranks] == [2, 2]
    said = "".join(text for _, text in ranks)
    assert said.count("dtrain: ") == 1
    assert said.count("png is not a JPEG") == 1
    assert "Traceback" not in said
