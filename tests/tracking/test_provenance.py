"""What a run's record says it was started with."""

import shlex
import shutil
import subprocess

import pytest

from dtrain.tracking.provenance import code, command_line, provenance


def test_a_command_line_can_be_given_to_a_shell_again():
    typed = ["launch/train.py", "configs/my config.yaml", "eval.metrics=[fd, kd]", "optim.lr=1e-3", "data.shards=$HOME"]
    assert shlex.split(command_line([typed[0], "--local_rank=1", *typed[1:]])) == typed


def test_a_program_is_called_as_the_shell_finds_it():
    assert command_line([shutil.which("ls"), "-l"]) == "ls -l"
    assert command_line(["/elsewhere/bin/ls", "-l"]) == "/elsewhere/bin/ls -l"


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("tracking.uri=https://joe:hunter@host/mlflow?sig=hunter", "tracking.uri=https://host/mlflow?•••"),
        ("deepspeed.extra.comet.api_key=hunter", "deepspeed.extra.comet.api_key=•••"),
        (
            "deepspeed.extra={comet: {api_key: hunter, authToken: hunter, project: p}}",
            "deepspeed.extra={comet: {api_key: •••, authToken: •••, project: p}}",
        ),
        (
            "data.mix=[{name: a, shards: 's3://id:hunter@b/{0..9}.tar'}]",
            "data.mix=[{name: a, shards: 's3://b/{0..9}.tar'}]",
        ),
        ("data.shards=\"pipe:curl -H 'X-Key: hunter' https://h/x.tar\"", "data.shards=pipe:•••"),
        ("deepspeed.extra={comet: {api_key: hunter", "deepspeed.extra=•••"),
        ("data.shards=s3://bucket/{000..009}.tar", "data.shards=s3://bucket/{000..009}.tar"),
    ],
)
def test_no_secret_of_a_command_line_is_kept(typed, shown):
    assert shlex.split(command_line(["train.py", "c.yaml", typed, "train.steps=2"])) == [
        "train.py",
        "c.yaml",
        shown,
        "train.steps=2",
    ]


def test_an_attempt_is_recorded_with_its_command_line(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["launch/train.py", "--local_rank=0", "c.yaml", "run.name=x"])
    found = provenance(tmp_path, 1, {})
    assert (found["command"], found["command_line"]) == ("train.py", "launch/train.py c.yaml run.name=x")


def test_a_repository_that_names_programs_in_its_configuration_has_none_of_them_run(tmp_path):
    """fsmonitor, an external diff, a text converter and a filter, each of which would leave a file behind."""
    ran, repository = tmp_path / "ran", tmp_path / "repository"
    ran.mkdir()
    repository.mkdir()

    def git(*arguments):
        subprocess.run(["git", "-C", str(repository), *arguments], check=True, capture_output=True)

    git("init", "--quiet")
    (repository / "code.py").write_text("before\n")
    git("add", "code.py")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first")
    (repository / "code.py").write_text("after\n")
    (repository / ".gitattributes").write_text("*.py diff=evil filter=evil\n")
    for key in ("core.fsmonitor", "diff.external", "diff.evil.textconv", "diff.evil.command", "filter.evil.clean"):
        git("config", key, f"touch {ran}/{key}; cat")
    git("config", "filter.evil.required", "true")
    commit, difference = code([repository])
    assert len(commit) == 40
    assert "-before" in difference
    assert "+after" in difference
    assert list(ran.iterdir()) == []
    subprocess.run(["git", "-C", str(repository), "diff", "HEAD"], capture_output=True)
    assert list(ran.iterdir())  # what an ordinary git does there
