"""Mistakes people make: one clear line, exit code 2, nothing overwritten."""

import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import typer

import dtrain
from dtrain.chaos import forked
from dtrain.data.shards.indexing import index
from tests.command_line import command, failing
from tests.digits import tiny
from tests.folders import contents
from tests.printed import commands
from tests.ranks import run_ranks


@pytest.fixture
def work(digits, tmp_path, monkeypatch):
    """A folder to work in, with its own copy of the digits and a config."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(digits, tmp_path / "digits")
    (tmp_path / "tiny.yaml").write_text(tiny(tmp_path / "digits", tmp_path / "runs", "train.steps=3").dump())
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "tiny.yaml", "model.dept=3"], "unknown key `model.dept` on the command line; did you mean"),
        (["train", "tiny.yaml", "train.steps=many"], "`train.steps` on the command line is 'many'"),
        (["train", "absent.yaml"], "cannot read the config absent.yaml: No such file or directory"),
        (["train", "tiny.yaml", "run.name="], "run.name is empty on the command line"),
        (["train", "my cfg.yaml"], "my cfg.yaml would name the run after itself, and a name has letters"),
        (["train", "latin.yaml"], "cannot read the config latin.yaml: 'utf-8' codec can't decode byte 0xfc"),
        (["plan", "tiny.yaml", "--gpu-memory", "inf"], "--gpu-memory, --peak-tflops and --watts are finite numbers"),
        (["train", "tiny.yaml", "--steps", "-1"], "settings are given as key.sub=value"),
        (["train", "tiny.yaml", "train.steps=-1"], "`train.steps` on the command line is -1"),
        (["train", "tiny.yaml", "data.batch_size=25", "run.name=new"], "does not divide by 2 ranks; the nearest"),
        (["train", "tiny.yaml", "data.streams=5000"], "data.streams 5000 exceeds the 1437 samples"),
        (["train", "tiny.yaml", "data.shards=nowhere"], "nowhere/manifest.json"),
        (["train", "tiny.yaml", "run.dir=/proc/nowhere"], "cannot write the run directory /proc/nowhere/tiny"),
        (["train"], "Missing argument 'CONFIG'"),
        (["sample", "nowhere"], "no run at nowhere or runs/nowhere"),
        (
            ["evaluate", "nowhere", "--steps", "-1"],
            "Invalid value for '--steps': Input should be greater than or equal to 1",
        ),
        (["frobnicate"], "No such command 'frobnicate'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2_on_two_ranks(work, arguments, message):
    Path("my cfg.yaml").write_text("data: {shards: x}")
    Path("latin.yaml").write_bytes("run: {name: Gr\xfcn}".encode("latin-1"))
    before = contents(work)
    assert message in failing(*arguments, world_size=2)
    assert contents(work) == before


def test_a_run_that_made_no_step_binds_nobody_to_its_mistake(work):
    (work / "digits/train/manifest.json").unlink()
    index(str(work / "digits/train"))  # which names no classes: that there are ten is seen when they are read
    line = failing("train", "tiny.yaml", "model.num_classes=5")
    assert "model.num_classes is 5, so labels go from 0 to 4, but cls is none of these in " in line
    ((code, text),) = run_ranks(command, 1, "train", "tiny.yaml")
    assert code == 0, text
    assert "another identity" in failing("train", "tiny.yaml", "model.depth=2")


def test_missing_and_short_shards_are_named(work):
    shard = sorted((work / "digits/train").glob("*.tar"))[3]
    shard.write_bytes(shard.read_bytes()[:-1024])
    line = failing("train", "tiny.yaml", world_size=2)
    assert shard.name in line
    assert "1,024 bytes shorter than its manifest says" in line
    shard.unlink()
    assert shard.name in failing("train", "tiny.yaml", world_size=2)
    assert not (work / "runs").exists()


def test_data_without_labels_are_refused_by_the_check_and_the_start_alike(work):
    (work / "bare").mkdir()
    with tarfile.open(work / "bare" / "shard.tar", "w") as tar:
        info = tarfile.TarInfo("00000.png")
        tar.addfile(info)
    assert run_ranks(command, 1, "index", "bare")[0][0] == 0
    for more in ((), ("--check",)):
        line = failing("train", "tiny.yaml", "data.shards=bare", *more, world_size=2)
        assert "model.num_classes is 10, but bare/manifest.json has no `cls` field" in line
    assert not (work / "runs").exists()


def test_an_image_that_does_not_decode_is_named(work):
    """A shard with a broken image, indexed as it is: the manifest is right, the picture is not."""
    folder = work / "broken"
    folder.mkdir()
    with tarfile.open(folder / "shard.tar", "w") as tar:
        for i in range(48):
            for suffix, data in (("png", b"not a picture at all"), ("cls", b"3")):
                info = tarfile.TarInfo(f"{i:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert run_ranks(command, 1, "index", "broken")[0][0] == 0
    line = failing("train", "tiny.yaml", "data.shards=broken", "data.workers=1")
    assert "shard.tar" in line
    assert ".png" in line
    assert '"user_error"' in (work / "runs/tiny/outcome.json").read_text()


def test_another_data_set_or_identity_is_refused_and_nothing_is_overwritten(work):
    assert run_ranks(command, 1, "train", "tiny.yaml")[0][0] == 0
    before = contents(work / "runs")
    assert run_ranks(command, 1, "pack", "sklearn:digits", "other", "--holdout", 360, "--seed", 1)[0][0] == 0
    line = failing("train", "tiny.yaml", "data.shards=other/train", "train.steps=5", world_size=2)
    assert "was trained on another data set" in line
    line = failing("train", "tiny.yaml", "model.depth=2", "run.seed=4", world_size=2)
    assert "run.seed was 0, is 4; model.depth was 1, is 2" in line
    assert contents(work / "runs") == before


def test_a_run_is_sampled_and_evaluated_by_name(work):
    import json

    import numpy as np
    from PIL import Image

    assert run_ranks(command, 1, "train", "tiny.yaml")[0][0] == 0
    code, text = run_ranks(command, 1, "evaluate", "tiny", "--n", 40, "--steps", 3, "--json")[0]
    assert code == 0
    result = json.loads(text.splitlines()[-1])
    assert result["step"] == 3
    assert result["context"]["n"] == 40
    assert result["metrics"]["fd_pixels"] > 0
    assert run_ranks(command, 2, "sample", "tiny", "--n", 30, "--guidance", 2, "--out", "a.npz")[0][0] == 0
    assert run_ranks(command, 1, "sample", "tiny", "--n", 30, "--guidance", 2, "--out", "b.npz")[0][0] == 0
    a, b = np.load("a.npz"), np.load("b.npz")
    assert a["images"].shape == (30, 8, 8, 1)
    assert a["images"].dtype == np.uint8
    assert a["labels"].dtype == np.int64
    assert a["labels"].tolist() == [i % 10 for i in range(30)]
    difference = np.abs(a["images"].astype(int) - b["images"])
    assert difference.max() <= 1
    assert (difference == 0).mean() > 0.999
    assert run_ranks(command, 1, "sample", "tiny", "-n", 20, "--out", "g.png")[0][0] == 0
    picture = Image.open("g.png")
    assert picture.size == (4 * (10 * 9 - 1), 4 * (2 * 9 - 1))
    assert "must end in .png or .npz" in failing("sample", "tiny", "--out", "x.jpg")
    assert "has 10 classes" in failing("sample", "tiny", "--label", 10)
    assert "has no checkpoint of step 9; there are: 3" in failing("sample", "tiny", "--step", 9)


def test_help_and_the_library_import_no_torch():
    code = (
        "import sys, dtrain, dtrain.cli, dtrain.config, dtrain.data.shards.manifest, dtrain.data.order.order\n"
        "import dtrain.run, dtrain.tracking.tracker, dtrain.checkpoint.format\n"
        "assert not {'torch', 'deepspeed', 'mlflow', 'torchvision'} & set(sys.modules)\n"
        "sys.argv = ['dtrain', '--help']\n"
        "try: dtrain.cli.main()\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'deepspeed'} & set(sys.modules)\n"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert all(name in shown for name in ("train", "pack", "index", "evaluate", "sample", "sync"))


def shown(*arguments: str, **environment: str) -> str:
    """What `dtrain …` prints, in a process of its own."""
    code = "from dtrain.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_name_without_a_command_is_the_help(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    assert shown() == shown("--help")
    assert shown("checkpoints") == shown("checkpoints", "--help")
    assert shown("--version") == f"dtrain {dtrain.__version__}\n"


def test_the_shell_completes_commands_and_runs(work, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    for run in ("digits-a", "digits-b", "other"):
        (work / "runs" / run).mkdir(parents=True)
        (work / "runs" / run / "config.yaml").touch()

    def completed(words: str) -> list[str]:
        place = {"COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        return shown(_DTRAIN_COMPLETE="complete_bash", **place).split()

    assert completed("dtrain ev") == ["evaluate"]
    assert completed("dtrain evaluate dig") == ["digits-a", "digits-b"]


def every_command() -> list[tuple[str, ...]]:
    from dtrain.cli import app

    groups = typer.main.get_command(app).commands
    return [(n, m) for n, g in groups.items() if hasattr(g, "commands") for m in g.commands] + [
        (n,) for n, g in groups.items() if not hasattr(g, "commands")
    ]


def test_every_commands_help_ends_in_an_example_that_parses():
    from dtrain.cli import app

    assert len(every_command()) >= 21
    for names in every_command():
        command = typer.main.get_command(app)
        for name in names:
            command = command.commands[name]
        last = command.get_help(typer.Context(command)).splitlines()[-1]
        assert f"{last} ".startswith(f"  Example: dtrain {' '.join(names)} "), last
        (example,) = commands(last.removeprefix("  Example: "), "help")
        command.make_context(names[-1], list(example.words[1 + len(names) :]))


def on_a_taken_port(log: str) -> None:
    os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY), 2)
    os.dup2(2, 1)
    sys.argv = ["dtrain", "train", "tiny.yaml"]
    from dtrain.cli import main

    main()


def test_a_taken_port_is_one_line_on_rank_0_and_the_others_end_when_they_are_told_to(work):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        ranks = forked.fork_ranks(on_a_taken_port, [("0.log",), ("1.log",)], {"MASTER_PORT": str(port)})
        ranks[0].join(60)
        ranks[1].terminate()  # as the launcher does
        ranks[1].join(10)
    assert [rank.exitcode for rank in ranks] == [2, -signal.SIGTERM]
    (line,) = Path("0.log").read_text().splitlines()
    assert line.startswith(f"dtrain: port {port} of ")
    assert re.search(r"deepspeed --master_port \d+ \.\.\.$", line)
    assert Path("1.log").read_text() == ""
    assert not (work / "runs").exists()
