"""What a process sets for itself before it computes."""

import gc
import socket
import subprocess
import sys
import weakref
from contextlib import suppress
from pathlib import Path

import pytest

from dtrain import distributed
from dtrain.errors import SharedFailure, message_of
from tests.ranks import run_ranks

FAULTS = """
import resource
import torch
from dtrain import distributed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(7 * 2**20) for _ in range(10)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

distributed.prepare()
faults()
print(faults())
"""


def test_the_memory_of_freed_tensors_is_used_again():
    """10 times 10 tensors of 28 MiB: each 7,168 pages, where they are asked of the system every time."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 7168


def refused():
    """What this rank hears of two things that one rank alone may not open."""
    from dtrain import distributed
    from dtrain.errors import SharedError

    def forbidden(rank):
        if distributed.rank() == rank:
            raise PermissionError(13, "Permission denied", "secret")

    said = []
    for ask in (lambda: distributed.on_rank_0(forbidden, 0), lambda: distributed.agree(forbidden, 1)):
        try:
            ask()
        except SharedError as e:
            said.append(str(e))
    return said


def test_what_one_rank_may_not_open_all_ranks_refuse():
    line = "cannot open secret: Permission denied; ask its owner, or name another place"
    assert run_ranks(refused, 2) == [[line, line]] * 2


def failed():
    """(what this rank raises, its cause) of what rank 1 alone, and rank 0 alone, cannot do."""
    from dtrain import distributed
    from dtrain.errors import SharedFailure

    met = []
    for where, ask in ((1, distributed.agree), (0, distributed.on_rank_0)):
        try:
            ask(lambda where=where: 1 // int(distributed.rank() != where))
        except SharedFailure as e:
            met.append((str(e), type(e.__cause__).__name__))
    return met


def test_what_no_user_can_mend_is_raised_by_all_ranks_and_has_its_cause_where_it_was_met():
    first, second = run_ranks(failed, 2)
    host = socket.gethostname()
    lines = [f"rank {n} on {host}: ZeroDivisionError: integer division or modulo by zero" for n in (1, 0)]
    assert first == [(lines[0], "NoneType"), (lines[1], "ZeroDivisionError")]
    assert second == [(lines[0], "ZeroDivisionError"), (lines[1], "NoneType")]


def test_a_refusal_that_names_no_file_stays_what_it_is():
    refusal = PermissionError(1, "Operation not permitted")
    with pytest.raises(PermissionError) as met:
        message_of(refusal)
    assert met.value is refusal


def test_what_a_part_held_that_failed_is_freed_before_any_garbage_is_collected():
    class Large:
        pass

    def fail(seen):
        held = Large()
        seen.append(weakref.ref(held))
        raise ZeroDivisionError

    gc.disable()
    try:
        for together in (distributed.agree, distributed.on_rank_0):
            seen = []
            with suppress(SharedFailure):
                together(fail, seen)
            assert seen[0]() is None
    finally:
        gc.enable()


def test_a_free_port_is_none_that_outgoing_connections_get_and_none_that_is_taken(monkeypatch):
    first_outgoing = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    found = {distributed.free_port() for _ in range(100)}
    assert len(found) > 90
    assert all(distributed.FIRST_PORT <= port < first_outgoing for port in found)
    with socket.socket() as taken:
        taken.bind(("", distributed.free_port()))
        port = taken.getsockname()[1]
        monkeypatch.setattr(distributed, "FIRST_PORT", port)
        monkeypatch.setattr(distributed, "_first_outgoing_port", lambda: port + 1)
        assert distributed.free_port() >= first_outgoing
    monkeypatch.setattr(distributed, "_first_outgoing_port", lambda: 1024)
    assert distributed.free_port() >= first_outgoing
