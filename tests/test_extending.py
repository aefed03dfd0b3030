"""The six examples of docs/extending.md, written to files as they stand there, in one training."""

import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from dtrain.checkpoint.format import Checkpoint
from dtrain.tracking.journal import read
from tests.command_line import command
from tests.data.shard_files import data_set, picture
from tests.ranks import run_ranks

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
BLOCK = re.compile(r"^```python (\w+\.py)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

CONFIG = {
    "run": {"seed": 3},
    "data": {
        "shards": "train",
        "holdout": "holdout/manifest.json",
        "image_size": 8,
        "channels": 1,
        "batch_size": 12,
        "workers": 0,
        "fields": {"weather": {"kind": "numbers", "keys": ["warm", "wet"]}},
    },
    "first_stage": {"kind": "haar"},
    "conditions": {"point": {"dropout": 0.2}},
    "model": {"name": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 2, "num_classes": 3},
    "objective": {"kind": "against_critic", "weight": 0.02, "optim": {"lr": 3e-4, "betas": [0.5, 0.9]}},
    "optim": {"lr": 5e-4, "warmup_steps": 5},
    "ema": [{"decay": 0.9}],
    "train": {"steps": 20, "log_every": 1, "checkpoint_every": 12, "micro_batch": 3},
    "eval": {
        "every": 20,
        "num_samples": 24,
        "batch_size": 12,
        "sampler": "leap",
        "steps": 4,
        "guidance": 2.0,
        "features": "light",
        "validation_images": 12,
    },
    "tracking": {"enabled": False},
}


def samples(numbers):
    """Each with a class, a place and the weather of its number."""
    for i in numbers:
        place = np.array([i % 5 / 5, i % 7 / 7], dtype=np.float32)
        file = io.BytesIO()
        np.save(file, place)
        weather = json.dumps({"warm": i / 10, "wet": -i}).encode()
        yield {"png": picture(i, 8, 1), "cls": str(i % 3).encode(), "point.npy": file.getvalue(), "json": weather}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The examples as files, data and a config; the place to run in."""
    folder = tmp_path_factory.mktemp("extending")
    for name, text in BLOCK.findall(PAGE.read_text()):
        (folder / name).write_text(text)
    data_set(folder / "train", list(samples(range(48))), 24)
    data_set(folder / "holdout", list(samples(range(100, 124))), 24)
    (folder / "own.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def named(folder):
    return [f"--plugin={path}" for path in sorted(folder.glob("*.py"))]


def in_folder(folder, *arguments):
    os.chdir(folder)
    return command(*arguments)


def run(folder, ranks, *arguments):
    results = run_ranks(in_folder, ranks, folder, *arguments)
    assert results[0][0] == 0, results
    return results[0][1]


def metrics(folder, name, event="train"):
    return [line["metrics"] for line in read(folder / "runs" / name / "journal.jsonl") if line["event"] == event]


def test_the_page_has_a_file_for_each_kind_of_part():
    from dtrain.plugins import KINDS

    registered = re.findall(r'^plugins\.register\("(\w+)"', PAGE.read_text(), re.MULTILINE)
    assert sorted(registered) == sorted(KINDS)


def test_they_train_alike_at_stages_0_and_2_and_go_on_at_stage_3_on_another_number_of_ranks(folder):
    shapes = {
        "whole": ("deepspeed.zero_stage=0", "train.steps=20"),
        "parted": ("deepspeed.zero_stage=2", "train.steps=12"),
    }
    for name, shape in shapes.items():
        run(folder, 2, "train", "own.yaml", *named(folder), f"run.name={name}", *shape)
    tensors = Checkpoint.open(folder / "runs/parted/checkpoints/step-00000012").tensors
    assert {
        "critic/outer.weight:exp_avg",
        "conditions.point.weight:ema_0",
        "x_embedder.proj.weight:fp32",
    } <= tensors.keys()
    assert "critic/outer.weight:ema_0" not in tensors  # averages are the backbone's
    assert tensors["x_embedder.proj.weight:fp32"] == 32 * 4 * 2 * 2  # four channels of the Haar map
    run(folder, 1, "train", "own.yaml", *named(folder), "run.name=parted", "deepspeed.zero_stage=3", "train.steps=20")
    whole, parted = metrics(folder, "whole"), metrics(folder, "parted")
    assert len(whole) == len(parted) == 20
    for key in ("loss", "loss_critic", "grad_norm", "grad_norm_critic", "critic_real", "critic_fake"):
        assert [m[key] for m in parted] == pytest.approx([m[key] for m in whole], rel=1e-3, abs=1e-5), key
    assert len({m["critic_real"] for m in whole}) == 20  # the critic moves


def test_samples_of_the_own_sampler_and_features_are_evaluated_alike_in_training_and_after(folder):
    ((code, said),) = run_ranks(in_folder, 1, folder, "evaluate", "whole", *named(folder), "--json")
    assert code == 0, said
    after = json.loads(said.splitlines()[-1])["metrics"]["fd_light"]
    (within,) = metrics(folder, "whole", "eval")
    (line,) = [line for line in read(folder / "runs/whole/journal.jsonl") if line["event"] == "eval"]
    assert (line["context"]["first_stage"], line["context"]["sampler"]) == ("haar", "leap")
    assert after == pytest.approx(within["fd_light"], rel=1e-5)
    ((code, said),) = run_ranks(in_folder, 1, folder, "sample", "whole", *named(folder), "-n", "3", "--out", "some.npz")
    assert code == 0, said
    with np.load(folder / "some.npz") as drawn:
        assert drawn["images"].shape == (3, 8, 8, 1)


def test_a_name_in_a_config_imports_nothing(folder):
    """The package's own names only: exit code 2, one line, whatever lies in the folder."""
    ((code, said),) = run_ranks(in_folder, 1, folder, "train", "own.yaml", "run.name=other", "--check")
    assert code == 2
    assert "'numbers' is no field that is known here (none)" in said
    assert "--plugin or DTRAIN_PLUGINS" in said


def test_a_plug_in_that_cannot_be_imported_is_one_line(folder):
    (folder / "broken").mkdir(exist_ok=True)
    (folder / "broken" / "typo.py").write_text("import dtrain.nothing_such")
    for place, reason in (
        ("broken/typo.py", "No module named 'dtrain.nothing_such'"),
        ("gone.py", "there is no such file"),
    ):
        ((code, said),) = run_ranks(in_folder, 1, folder, "train", "own.yaml", f"--plugin={place}", "--check")
        assert code == 2
        assert reason in said
        assert len(said.strip().splitlines()) == 1


def test_ranks_that_were_given_different_files_under_one_name_do_not_begin(folder):
    shutil.copytree(folder, folder / "elsewhere", ignore=shutil.ignore_patterns("runs", "elsewhere", "broken"))
    changed = folder / "elsewhere" / "leap.py"
    changed.write_text(changed.read_text() + "\n# changed\n")
    results = run_ranks(on_own_files, 2, folder)
    assert {code for code, _ in results} == {2}
    assert "another code of the plug-in leap.py than rank 0" in results[0][1]


def on_own_files(folder):
    from dtrain import distributed

    own = folder / "elsewhere" if distributed.rank() else folder
    arguments = [f"--plugin={own / path.name}" for path in sorted(folder.glob("*.py"))]
    return in_folder(folder, "train", "own.yaml", "run.name=unequal", *arguments)
