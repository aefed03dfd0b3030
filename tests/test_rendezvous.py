"""Ranks that meet, wait and fail before they have a process group: real processes, real sockets."""

import os
import time
from pathlib import Path

import pytest

from dtrain.chaos.forked import context, fork_ranks
from dtrain.distributed import free_port
from tests.digits import tiny


def _run(log: str, delay: float, arguments: list[str]) -> None:
    """One rank: `dtrain ARGUMENTS` after a while, its output in a file."""
    import sys

    time.sleep(delay)
    terminal = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    sys.argv = ["dtrain", *arguments]
    from dtrain.cli import main

    main()


def run(
    folder: Path, *ranks: tuple[float, list[str]], environment: dict[str, str] | None = None
) -> list[tuple[int, list[str], float]]:
    """(exit code, lines of output, seconds) of each rank; `ranks` are (delay, arguments)."""
    logs = [str(folder / f"rank-{rank}.log") for rank in range(len(ranks))]
    began = time.monotonic()
    processes = fork_ranks(_run, [(log, *rank) for log, rank in zip(logs, ranks, strict=True)], environment)
    found = []
    for process, log in zip(processes, logs, strict=True):
        process.join(90)
        seconds = time.monotonic() - began
        lines = Path(log).read_text().splitlines() if Path(log).exists() else []
        found.append((process.exitcode, lines, seconds))
        process.kill()
    return found


@pytest.fixture
def config(digits, tmp_path):
    (tmp_path / "tiny.yaml").write_text(tiny(digits, tmp_path / "runs", "train.steps=2").dump())
    return str(tmp_path / "tiny.yaml")


def test_a_mistake_of_one_rank_alone_ends_all_in_one_line_of_rank_0_that_names_it(config, tmp_path):
    """As where a folder is not mounted on one node: the other rank waits for a group that never comes."""
    bad = ["train", config, f"data.shards={tmp_path}/not/mounted"]
    for number, ranks in enumerate([((0, ["train", config]), (0, bad)), ((0.5, bad), (0, ["train", config]))]):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = run(folder, *ranks)
        assert [code for code, _, _ in found] == [2, 2]
        assert max(seconds for *_, seconds in found) < 30
        (line,) = found[0][1]
        assert found[1][1] == []
        assert "there is no manifest" in line
        assert ("rank 1 of 2 on " in line) == (number == 0)


def test_a_mistake_of_all_ranks_is_said_once(config, tmp_path):
    bad = (0, ["train", config, "data.batch_size=25"])
    found = run(tmp_path, bad, bad)
    assert [code for code, _, _ in found] == [2, 2]
    assert [lines for _, lines, _ in found] == [
        ["dtrain: data.batch_size 25 does not divide by 2 ranks; the nearest that does is 24"],
        [],
    ]


def test_a_wrong_option_on_one_rank_ends_the_others_too(config, tmp_path):
    found = run(tmp_path, (0, ["train", config]), (0, ["train", config, "--no-such-option"]))
    assert [code for code, _, _ in found] == [2, 2]
    assert "rank 1 of 2 on " in found[0][1][0]
    assert "--no-such-option" in found[0][1][0]


def test_whoever_waits_says_for_whom(config, tmp_path):
    """Four ranks of which only the first and the last are there for a while."""
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    logs = {rank: str(tmp_path / f"{rank}.log") for rank in (0, 3)}
    started = [
        context.Process(target=_as_rank, args=(environment | {"RANK": str(rank)}, log, config))
        for rank, log in logs.items()
    ]
    for process in started:
        process.start()
    line = f"dtrain: waiting for ranks 1–2 of 4 at 127.0.0.1:{environment['MASTER_PORT']}"
    end = time.monotonic() + 40
    while line not in (Path(logs[0]).read_text() if Path(logs[0]).exists() else ""):
        assert time.monotonic() < end
        time.sleep(0.2)
    for process in started:  # all before any is waited for: the last would tell of the first's end
        process.kill()
    for process in started:
        process.join()
    assert Path(logs[0]).read_text().splitlines() == [line]
    assert Path(logs[3]).read_text() == ""


def _as_rank(environment: dict[str, str], log: str, config: str) -> None:
    from dtrain import rendezvous

    os.environ.update(environment)
    rendezvous.PATIENCE = 1.0
    _run(log, 0, ["train", config])


def test_a_rank_that_finds_no_rank_0_says_so_itself(config, tmp_path, monkeypatch):
    """It has a mistake of its own to tell, and nobody to tell it to."""
    environment = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    from dtrain import rendezvous

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(rendezvous, "ANSWER", 1.0)
    said = []
    monkeypatch.setattr(rendezvous, "_say", said.append)
    rendezvous.cannot_come(1, 2, "the folder is not mounted")
    (line,) = said
    assert line.startswith("rank 1 of 2 on ")
    assert line.endswith(": the folder is not mounted")


@pytest.mark.parametrize("command", ["index", "verify", "status"])
def test_a_rank_left_over_in_the_environment_silences_no_command_that_is_never_distributed(
    digits, tmp_path, monkeypatch, command
):
    monkeypatch.chdir(tmp_path)
    left_over = {"RANK": "3", "WORLD_SIZE": "4"}
    log = tmp_path / "log"
    process = context.Process(target=_left_over, args=(left_over, str(log), [command, f"{tmp_path}/none"]))
    process.start()
    process.join(30)
    assert process.exitcode == 2
    (line,) = log.read_text().splitlines()
    assert line.startswith("dtrain: ")


def _left_over(environment: dict[str, str], log: str, arguments: list[str]) -> None:
    os.environ.update(environment)
    _run(log, 0, arguments)
