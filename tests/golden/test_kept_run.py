"""A run directory as it was written on 28 November 2026 goes on, is evaluated, exported and reported, for ever.

`kept/runs/kept` was trained for 6 steps on 2 ranks from `kept/kept.yaml`, on the shards of `data/`.
`kept/expected.json` holds what the code of that day made of it: `python -m tests.golden.test_kept_run` writes it anew.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from dtrain.config import load
from dtrain.config.earlier import EARLIER
from dtrain.report.runs import Run
from dtrain.run import RunDirectory
from dtrain.training.check import check_start
from dtrain.training.identity import continued
from tests.command_line import command
from tests.digits import losses
from tests.golden.compare import same_value
from tests.golden.runner import HERE, machine
from tests.ranks import run_ranks
from tests.training.runs import train

EXPECTED = HERE / "kept" / "expected.json"


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A copy of the run, in the folder that it was started from."""
    return place(tmp_path, monkeypatch.chdir)


def place(folder: Path, chdir) -> RunDirectory:
    shutil.copytree(HERE / "kept", folder, dirs_exist_ok=True)
    shutil.copytree(HERE / "data", folder / "data")
    chdir(folder)
    return RunDirectory("runs/kept")


def figures(run: RunDirectory) -> dict:
    """What today's code makes of the run: an evaluation, samples, exported weights, and four further steps."""
    ((code, said),) = run_ranks(command, 1, "evaluate", "kept", "--json")
    assert code == 0, said
    found = {"evaluation": json.loads(said.splitlines()[-1])["metrics"]["fd_pixels"]}
    ((code, said),) = run_ranks(command, 1, "sample", "kept", "--n", "10", "--out", "samples.npz")
    assert code == 0, said
    with np.load("samples.npz") as samples:
        found["samples"] = samples["images"].flatten().tolist()
    ((code, said),) = run_ranks(command, 1, "checkpoints", "export", "kept", "--ema", "1", "--out", "out")
    assert code == 0, said
    digest = hashlib.sha256()
    for name, values in sorted(load_file("out/model.safetensors").items()):
        digest.update(name.encode() + values.tobytes())
    found["exported"] = digest.hexdigest()
    run_ranks(train, 2, load("kept.yaml", ["train.steps=10"]))
    return found | {"losses": losses(run.config())}


def test_it_goes_on_is_evaluated_sampled_and_exported_as_on_the_day_it_was_written(kept):
    expected, now = json.loads(EXPECTED.read_text()), figures(kept)
    assert now["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert now["exported"] == expected["exported"]  # no arithmetic but a copy
    assert now["evaluation"] == pytest.approx(expected["evaluation"], rel=1e-3)
    assert np.abs(np.subtract(now["samples"], expected["samples"])).max() <= 1  # a level, where a rounding differs
    if machine() == expected["machine"]:
        assert same_value("fd_pixels", now.pop("evaluation"), expected["evaluation"])
        assert now == {key: expected[key] for key in expected.keys() - {"machine", "evaluation"}}


def test_it_is_reported_listed_and_verified(kept):
    for arguments in (["report", "kept"], ["checkpoints", "verify", "kept"], ["checkpoints", "list", "kept"]):
        ((code, said),) = run_ranks(command, 1, *arguments)
        assert code == 0, said
    page = (kept.path / "report.html").read_text()
    assert "fd_pixels" in page
    assert "81.3" in page  # the distance that its own journal has


def of_branch(section: str, tag: str, value: str) -> dict:
    """What the kept run would say of this section and its sampling, had it this branch: a golden config's, as old."""
    golden = [yaml.safe_load(path.read_text()) for path in sorted((HERE / "configs").glob("*.yaml"))]
    found = next(tree for tree in golden if tree[section].get(tag) == value)
    start = yaml.safe_load(Path("kept.yaml").read_text()) | {section: found[section]}
    Path("kept.yaml").write_text(yaml.safe_dump(start))
    return {section: found[section], "eval": found["eval"]}


@pytest.mark.parametrize("key", EARLIER)
def test_a_key_that_its_config_lacks_means_what_was_done_before_the_key_existed(kept, key):
    """For whoever samples, evaluates, reports and trains."""
    row = EARLIER[key]
    section, _, name = key.partition(".")
    tree = yaml.safe_load(kept.config_file.read_text())
    if row.where is not None and tree[section].get(row.where[0]) != row.where[1]:
        tree |= of_branch(section, *row.where)
    tree.get(section, {}).pop(name, None)  # it is older than some keys
    kept.config_file.write_text(yaml.safe_dump(tree))

    def value_in(config):
        tree = config.model_dump(mode="json")[section]
        return tree[name] if name else tree

    assert value_in(kept.config()) == row.value  # sample, evaluate, sweep, export
    assert Run.read("kept").setting(key) == row.value  # report
    started = continued(kept, load("kept.yaml"))
    assert value_in(started) == row.value  # train, and --check
    assert check_start(load("kept.yaml"), 2).startswith("runs/kept goes on")


def test_several_keys_of_a_section_that_its_config_lacks_each_keep_their_earlier_meaning(kept):
    tree = yaml.safe_load(kept.config_file.read_text())
    for key in ("spike_factor", "compile", "activation_checkpointing"):
        del tree["train"][key]
    for key in ("crop", "arrays", "on_error"):
        del tree["data"][key]
    kept.config_file.write_text(yaml.safe_dump(tree))
    started = continued(kept, load("kept.yaml", ["data.on_error=replace"]))
    assert (started.train.spike_factor, started.data.exif, started.data.on_error) == (0, "ignore", "replace")
    assert started.train.steps == load("kept.yaml").train.steps


def test_a_new_default_binds_new_runs_only_and_what_a_user_names_binds_all(kept, monkeypatch):
    """`train.spike_factor` is such a key: before it existed no step was refused for its norm."""
    tree = yaml.safe_load(kept.config_file.read_text())
    del tree["train"]["spike_factor"]
    kept.config_file.write_text(yaml.safe_dump(tree))
    assert continued(kept, load("kept.yaml")).train.spike_factor == 0
    assert continued(kept, load("kept.yaml", ["train.spike_factor=10"])).train.spike_factor == 10
    other = RunDirectory("runs/other")
    assert continued(other, load("kept.yaml", ["run.name=other"])).train.spike_factor == 10


def test_a_run_keeps_a_default_that_has_changed_since_unless_another_value_is_named(kept):
    """The default of eval.batch_size was 250; other blocks round otherwise, so that a curve would move by that."""
    tree = yaml.safe_load(kept.config_file.read_text())
    wanted = tree | {"eval": {key: value for key, value in tree["eval"].items() if key != "batch_size"}}
    Path("unnamed.yaml").write_text(yaml.safe_dump(wanted))
    for began, size in ((250, 250), (100, 64)):  # 100 was named then, and is named no more
        tree["eval"]["batch_size"] = began
        kept.config_file.write_text(yaml.safe_dump(tree))
        assert kept.config().eval.batch_size == began  # sample, evaluate
        assert continued(kept, load("unnamed.yaml", ["run.name=kept"])).eval.batch_size == size
        assert continued(kept, load("unnamed.yaml", ["run.name=kept", "eval.batch_size=12"])).eval.batch_size == 12
    other = RunDirectory("runs/other")
    assert continued(other, load("unnamed.yaml", ["run.name=other"])).eval.batch_size == 64


if __name__ == "__main__":
    import os
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = {"machine": machine()} | figures(place(Path(folder), os.chdir))
        EXPECTED.write_text(json.dumps(made) + "\n")
