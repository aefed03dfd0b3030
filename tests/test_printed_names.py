"""Names that others chose are shown on a terminal, and not obeyed by it; tracebacks are shown without secrets."""

import subprocess
import sys

import pytest

from dtrain.terminal import printable
from tests.command_line import command
from tests.data.shard_files import labelled_pictures, write_shards
from tests.ranks import run_ranks

ESCAPE = "\x1b]0;mine\x07\x1b[2J"  # sets the window's title, and clears it
SHOWN = r"\x1b]0;mine\x07\x1b[2J"


@pytest.fixture
def hostile(tmp_path):
    """A folder of shards with such a name, and a shard whose name forges a line of output."""
    folder = tmp_path / f"shards{ESCAPE}"
    _, second = write_shards(folder, labelled_pictures(20))
    second.rename(second.with_name("b\nall is well\u202e.tar"))
    return folder


def test_index_and_verify_show_names_with_their_control_characters_escaped(hostile):
    ((code, indexed),) = run_ranks(command, 1, "index", hostile)
    assert code == 0
    for shard in hostile.glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:-1])
    ((code, verified),) = run_ranks(command, 1, "verify", hostile)
    assert code == 1
    assert r"b\nall is well\u202e.tar has" in verified
    for printed, lines in ((indexed, 1), (verified, 3)):
        assert len(printed.splitlines()) == lines
        assert printed.count(SHOWN) == lines
        assert all(line.isprintable() for line in printed.splitlines())
    shard.rename(shard.with_name("a\udcff.tar"))
    ((code, refused),) = run_ranks(command, 1, "index", hostile)
    assert (code, refused.count("\n")) == (2, 1)
    assert r"a\udcff.tar has a name that is no UTF-8, which a manifest cannot keep; rename it" in refused


def test_errors_tables_and_what_may_not_be_opened_show_them_too(hostile, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs" / f"mine{ESCAPE}"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("data: {}\n")
    jobs = [["index", hostile / "none*"], ["status"], ["checkpoints", "list", run], ["verify", run], ["report", run]]
    for arguments in jobs:
        ((_, printed),) = run_ranks(command, 1, *arguments)
        assert SHOWN in printed, arguments
        assert all(line.isprintable() for line in printed.splitlines())


def test_any_text_becomes_one_printable_line():
    assert printable("a\nb\tc\x85\u2028é 猫") == r"a\nb\tc\x85\u2028é 猫"
    assert printable("\ud800") == r"\ud800"


FAILING = """
import threading
from dtrain.training.record.output import clean_tracebacks
clean_tracebacks()
def fail():
    raise OSError("no route to https://me:hunter2@host/x?sig=hunter3")
thread = threading.Thread(target=fail)
thread.start(); thread.join()
fail()
"""


def test_a_traceback_tells_all_but_secrets():
    done = subprocess.run([sys.executable, "-c", FAILING], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("OSError: no route to https://host/x?•••\n") == 2
    assert done.stderr.count("Traceback (most recent call last):\n") == 2
    assert "hunter" not in done.stderr
