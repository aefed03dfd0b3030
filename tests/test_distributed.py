"""What a process sets for itself before it computes."""

import gc
import os
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

MEMORY = """
import resource
import sys
import psutil
import torch
from dtrain import distributed

def made(mib):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        [torch.ones(mib * 2**18) for _ in range(4)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

mib, stepping = int(sys.argv[1]), sys.argv[2] == "stepping"
distributed.prepare()
made(24)
resident = psutil.Process().memory_info().rss
if stepping:
    distributed.keep_all_freed_memory()
given_back = resident - psutil.Process().memory_info().rss
made(mib)
print(made(mib), given_back // 2**20)
"""
PAGES = 256  # of a MiB


def pages_and_mib(mib: int, stepping: bool, **environment: str) -> list[int]:
    """(pages that the system gave a process for 4 times 4 tensors of so many MiB, after 16 of them; MiB given back).

    stepping: after `keep_all_freed_memory`.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(mib), "stepping" if stepping else ""],
        **{"capture_output": True, "text": True, "check": True, "env": own | environment},
    )
    return [int(number) for number in done.stdout.split()]


def test_the_memory_of_freed_tensors_is_used_again():
    pages, _ = pages_and_mib(28, stepping=False)
    assert pages < 28 * PAGES


def test_steps_use_the_memory_of_tensors_of_any_size_again_and_none_that_the_start_has_freed():
    """Of 40 MiB, above malloc's largest threshold: without, all 16 come from the system."""
    pages, given_back = pages_and_mib(40, stepping=True)
    assert pages < 40 * PAGES
    assert given_back > 3 * 24


@pytest.mark.parametrize(
    "environment", [{"MALLOC_MMAP_MAX_": "65536"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=65536"}], ids=str
)
def test_what_a_user_has_told_malloc_stays(environment):
    assert pages_and_mib(40, stepping=True, **environment)[0] >= 16 * 40 * PAGES


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
