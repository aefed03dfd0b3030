"""`dtrain init` on what people have: the config it writes starts, trains and evaluates as it is."""

import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from dtrain.config import load, validate
from dtrain.config.keys import keys
from dtrain.data.fields.headers import Header
from dtrain.data.fields.survey import Survey
from dtrain.errors import UserError
from dtrain.proposal.choices import Choices
from dtrain.proposal.facts import Facts, Machine
from dtrain.proposal.propose import propose
from dtrain.proposal.source import DataSet, held_out
from dtrain.proposal.text import Line, document
from dtrain.proposal.timing import Timing
from dtrain.tracking.journal import events
from tests.command_line import command
from tests.folders import contents
from tests.ranks import run_ranks


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # without Inception's weights
    monkeypatch.delenv("DTRAIN_WEIGHTS", raising=False)
    return tmp_path


def photograph(number: int, width: int, height: int, mode: str = "RGB") -> bytes:
    draws, file = np.random.default_rng(number), io.BytesIO()
    Image.fromarray(draws.integers(0, 256, (height, width, 3), dtype=np.uint8)).convert(mode).save(file, "JPEG")
    return file.getvalue()


def shard(path: Path, samples: list[tuple[bytes, int]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, (data, label) in enumerate(samples):
            for name, content in ((f"{path.stem}-{number:04d}.jpg", data), (f"{path.stem}-{number:04d}.cls", label)):
                content = content if isinstance(content, bytes) else str(content).encode()
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def shards(folder: Path, count: int = 8, samples: int = 24, by_class: bool = False) -> Path:
    """CIFAR-10's form: read-only tar files without a manifest."""
    folder.mkdir()
    for n in range(count):
        labels = [n % 4 if by_class else (n + i) % 4 for i in range(samples)]
        shard(folder / f"x-{n:03d}.tar", [(photograph(100 * n + i, 12, 14), label) for i, label in enumerate(labels)])
    for path in (*folder.iterdir(), folder):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def written(data, file: str = "mine.yaml", **how) -> tuple[object, list[str]]:
    """The config as `dtrain init` writes it, without timing; and the lines it says meanwhile."""
    said = []
    found = propose(str(data), how.get("size"), how.get("name"), how.get("gpus", 0), said.append, lambda done, of: None)
    Path(file).write_text(found.text("Not timed.", file))
    return load(file), said


def trains(file: str, *overrides: str) -> list[dict]:
    """The journal of a training by the command, as the config has it but for the overrides."""
    check, trained = (run_ranks(command, 1, "train", file, *more) for more in (("--check",), overrides))
    assert check[0][0] == 0, check[0][1]
    assert trained[0][0] == 0, trained[0][1]
    config = load(file, overrides)
    return events(config.run.path / "journal.jsonl")


SHORT = ("train.steps=6", "eval.every=6", "eval.num_samples=24", "eval.batch_size=24", "eval.steps=2")
SHORT += ("tracking.enabled=false", "data.batch_size=8")


def test_digits_are_packed_by_the_command_it_names_and_the_config_trains(work):
    config, said = written("sklearn:digits")
    assert said[0] == "dtrain pack sklearn:digits data/digits --holdout 360"
    assert (config.run.name, config.data.image_size, config.data.channels) == ("digits", 8, 1)
    assert (config.model.name, config.model.num_classes, config.model.frequency_shift) == ("dit", 10, 1)
    assert (config.eval.features, config.data.flip) == ("pixels", False)
    lines = trains("mine.yaml", *SHORT)
    assert [e["step"] for e in lines if e["event"] == "eval"] == [6]
    again, said = written("sklearn:digits")
    assert said == ["data/digits was packed from sklearn:digits before"]
    assert again.run.name == "digits-2"  # there is a run of the first name
    assert again.data == config.data


@pytest.mark.campaign
def test_shards_without_a_manifest_are_indexed_elsewhere_and_one_is_held_out(work):
    folder = shards(work / "read only")
    before = contents(folder)
    config, said = written(folder)
    assert contents(folder) == before
    assert len(said) == 1
    assert (config.data.manifest, config.data.holdout) == (
        "data/read-only/manifest.json",
        "data/read-only/holdout.json",
    )
    assert config.data.shards == config.data.holdout_shards == str(folder)
    assert (config.model.num_classes, config.data.image_size, config.data.channels) == (4, 12, 3)
    text = " ".join(Path("mine.yaml").read_text().replace("\n#", "").split())  # lines break where the path ends
    assert "168 pictures" in text
    assert "24 held out" in text
    trains("mine.yaml", *SHORT)
    assert written(folder, "b.yaml", name="read-only")[1] == []  # indexed already
    with pytest.raises(UserError, match=r"manifest.json is an index of shards that are not beside it; give init the"):
        written("data/read-only", "c.yaml")
    with pytest.raises(UserError, match=r"is of other shards than .*; give these another name with --name"):
        written(shards(work / "others", 3), "c.yaml", name="read-only")


def test_a_shard_of_sorted_data_is_not_held_out(work):
    config, said = written(shards(work / "sorted", by_class=True))
    assert "sorted by class" in said[1]
    assert config.data.holdout is None
    assert config.eval.every == 0
    assert "192 pictures" in Path("mine.yaml").read_text()


def test_an_npz_without_labels_is_unconditional(work):
    images = np.random.default_rng(0).integers(0, 256, (60, 9, 11, 3), dtype=np.uint8)
    np.savez("mine own.npz", images=images)
    config, said = written("mine own.npz")
    assert said[0] == "dtrain pack 'mine own.npz' data/mine-own --holdout 12"
    assert (config.model.name, config.model.num_classes, config.data.image_size) == ("unet", 0, 8)
    assert config.data.batch_size <= 48
    np.savez("mine own.npz", images=images[::-1])
    written("mine own.npz")  # what is packed stays as it is
    np.savez("other.npz", images=images)
    with pytest.raises(UserError, match=r"data/mine-own exists and was not packed from other.npz; .*--name"):
        written("other.npz", name="mine-own")


@pytest.mark.campaign
def test_photographs_of_mixed_sizes_are_shrunk_and_it_says_so(work):
    for n in range(40):
        for place in (work / "photos" / f"{n}.jpg", work / "classes" / "ab"[n % 2] / f"{n}.jpg"):
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(photograph(n, 40 + n, 90 - n))
    config, said = written("photos")
    assert said[0] == "dtrain pack photos data/photos --holdout 8"
    assert (config.model.name, config.model.num_classes) == ("unet", 0)
    assert config.data.image_size == 32
    assert config.data.flip
    said = r"of 32 images looked at, all are shrunk to 32 \(shorter sides 4\d to 6\d pixels\)"
    assert re.search(said, Path("mine.yaml").read_text())
    small, _ = written("photos", "small.yaml", size=8)
    assert small.data.image_size == 8
    trains("small.yaml", *SHORT)
    (work / "classes").rename("data/classes")
    classes, said = written("data/classes", "classes.yaml")
    assert said[0] == "dtrain pack data/classes data/classes-shards --holdout 8"
    assert (classes.run.name, classes.data.shards) == ("classes", "data/classes-shards/train")
    assert classes.model.num_classes == 2
    assert "# 2 classes: 0 a, 1 b" in Path("classes.yaml").read_text()


def test_what_pack_left_is_taken_by_folder_by_split_and_by_manifest(digits, work):
    shutil.copytree(digits, "packed")
    configs = [
        written(data, f"{n}.yaml")[0] for n, data in enumerate(("packed", "packed/train", "packed/train/manifest.json"))
    ]
    assert all(config.data.holdout == "packed/holdout/manifest.json" for config in configs)
    assert {config.run.name for config in configs} == {"packed"}
    (work / "packed/holdout").rename("away")
    config, _ = written("packed", "d.yaml")
    assert config.eval.every == 0
    assert "dtrain pack packed/train/manifest.json data/packed-split --holdout 1000" in Path("d.yaml").read_text()


@pytest.mark.parametrize("data", ["nowhere", "s3://bucket/x.tar", "nothing-*.tar", "."])
def test_what_is_no_data_is_refused_in_one_line_and_nothing_is_left(work, data):
    ((code, text),) = run_ranks(command, 1, "init", data)
    assert code == 2, text
    assert len(text.splitlines()) == 1
    assert not (work / "data").exists()


def facts(samples: int, side: int, grey: bool, classes: int) -> Facts:
    seen = Survey([Header(side, side + 3, grey)] * 5)
    return Facts(samples, held_out(samples), seen, classes > 0, classes, None, True)


def test_every_size_on_every_machine_gives_a_config_that_is_valid():
    known = {key.name.replace("[]", "") for key in keys()}
    data = DataSet("x", "data/x/train", holdout="data/x/holdout/manifest.json")
    for gpus in (0, 1, 3, 8):
        for size in (*range(1, 34), 48, 64, 96, 100, 256, 257):
            for samples, classes in ((3, 0), (240, 2), (1_281_167, 1000)):
                chosen = Choices(data, facts(samples, size, size % 2 == 0, classes), Machine(gpus, 16), size)
                text = document(["x"], chosen.sections("x"))
                config = validate(yaml.safe_load(text), f"{size} on {gpus}")
                assert config.data.batch_size % (gpus or 1) == 0
                assert config.data.batch_size <= max(samples, gpus)
                assert max(map(len, text.splitlines())) <= 120
                assert 1 / (1 - config.ema[0].decay) <= config.train.steps / 9
                given = {f"{s}.{key}" for s, v in yaml.safe_load(text).items() if isinstance(v, dict) for key in v}
                assert given <= known


def test_loader_processes_are_as_many_as_dev_shm_has_room_for():
    data = DataSet("x", "data/x/train")
    pictures, batch = facts(100_000, 64, False, 10), 128
    one = batch * 3 * 64 * 64 + 5 * 4096  # images; mirrored, k, label, time and drop
    for room, workers in ((None, 8), (2**40, 8), (5 * one, 2), (5 * one - 1, 1), (3 * one - 1, 0)):
        chosen = Choices(data, pictures, Machine(1, 16, room), 64)
        assert chosen.batch == batch
        assert yaml.safe_load(document(["x"], chosen.sections("x")))["data"]["workers"] == workers
    small = yaml.safe_load(
        document(["x"], Choices(data, facts(500, 32, False, 2), Machine(0, 2, 2**18), 32).sections("x"))
    )
    assert small["data"]["workers"] == 0


def test_values_read_back_as_they_were_chosen():
    chosen = {"a": [Line("path", "/x: y #z", "why"), Line("lr", 1e-4), Line("list", [1, 2]), Line("flip", False)]}
    text = document(["A sentence. " * 20, "  dtrain train " + "x" * 150], chosen)
    assert yaml.safe_load(text) == {"a": {"path": "/x: y #z", "lr": 1e-4, "list": [1, 2], "flip": False}}
    assert "#   dtrain train " + "x" * 150 in text.splitlines()


def test_the_line_about_time_adds_up():
    line = Timing(step=0.9, steps=25, evaluation=60.0, reference=60.0, load=0.2).minutes(1000, 250)
    assert line == (
        "About 20 minutes here: 1,000 steps of 0.9 s, timed over 25; 4 evaluations of 60 s, from a few samples; "
        "the held-out pictures once, 60 s."
    )
    assert "busy with other work (3.0 programs a core)" in Timing(0.9, 25, 60.0, 60.0, 3.0).minutes(1000, 250)


def test_the_command_writes_nothing_but_yaml_and_times_the_training_itself(digits, work):
    shutil.copytree(digits, "digits")
    code = "from dtrain.proposal import timing; timing.SECONDS = 2; from dtrain.cli import main; main()"
    with open("mine.yaml", "w") as out:
        done = subprocess.run(
            [sys.executable, "-c", code, "init", "digits"], stdout=out, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("dtrain: ") for line in done.stderr.splitlines()), done.stderr
    text = Path("mine.yaml").read_text()
    assert "#   dtrain train mine.yaml\n" in text
    assert "# About " in text
    assert "2,000 steps of" in text
    assert load("mine.yaml").run.name == "digits"
    assert sorted(os.listdir()) == ["cache", "digits", "mine.yaml"] or sorted(os.listdir()) == ["digits", "mine.yaml"]
