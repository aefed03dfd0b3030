"""How many loader processes a rank has where its config does not say: what the cores of its node and /dev/shm allow."""

import multiprocessing
import os

import pytest

from dtrain.config import identity
from dtrain.data import shared_memory
from dtrain.data.loader import train_batches
from dtrain.data.shards.manifest import load
from tests.data.shard_files import configuration, data_set, labelled_pictures
from tests.ranks import run_ranks
from tests.shared_memory import needs_root, own_shared_memory


@pytest.fixture
def folder(tmp_path):
    data_set(tmp_path, labelled_pictures(40))
    return tmp_path


def with_cores(monkeypatch, number, counted=None):
    """As on a machine of that many; counted: by SLURM, which has not bound them."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(number)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(counted or ""))


@pytest.mark.parametrize(
    ("cores", "counted", "ranks", "expected"),
    [
        *((1, None, 1, 1), (2, None, 1, 1), (2, None, 2, 1), (4, None, 1, 3), (4, None, 2, 1), (64, None, 8, 7)),
        *((224, None, 8, 8), (64, None, 1, 8), (64, 16, 4, 3), (4, 64, 1, 3), (8, None, 16, 1)),
    ],
)
def test_a_rank_has_its_share_of_the_cores_but_one_for_its_step(folder, monkeypatch, cores, counted, ranks, expected):
    with_cores(monkeypatch, cores, counted)
    assert shared_memory.loader_processes(configuration(folder, 16, workers=None), ranks, ranks) == expected
    for said in (0, 5):
        assert shared_memory.loader_processes(configuration(folder, 16, workers=said), ranks, ranks) == said


def test_it_is_no_part_of_a_runs_identity(folder):
    config = configuration(folder, 8, workers=None)
    assert identity(config) == identity(configuration(folder, 8, workers=6))
    assert "data.workers" not in identity(config)


@pytest.mark.parametrize(("ranks", "expected"), [(1, 3), (2, 1)])
def test_so_many_are_started(folder, monkeypatch, ranks, expected):
    with_cores(monkeypatch, 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    before = set(multiprocessing.active_children())
    batches = train_batches(configuration(folder, 8, workers=None), load(folder / "manifest.json"), 0, ranks, 0)
    next(batches)
    started = set(multiprocessing.active_children()) - before
    batches.close()
    assert len(started) == expected


def reckoned(config, size):
    own_shared_memory(size)
    os.sched_getaffinity = lambda process: set(range(32))
    return shared_memory.loader_processes(config, 2, 2), shared_memory.check(config, 2, 2)


@needs_root
@pytest.mark.parametrize("expected", [1, 2, 5])
def test_no_more_than_half_of_dev_shm_has_room_for(folder, expected):
    """Batches of two ranks, of each 2 for a process and the one that the step is at."""
    config = configuration(folder, 2000, generator=1, workers=None)
    batches = 2 * (2 * expected + 1) * shared_memory.of_batch(config, 2)
    ((number, refused),) = run_ranks(reckoned, 1, config, str(int(2.1 * batches)))
    assert (number, refused) == (expected, None)
