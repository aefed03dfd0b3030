"""Each check finds what is wrong where something really is."""

import base64
import http.server
import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch

from dtrain.cli.planning import verdict
from dtrain.cluster import machine, surroundings
from dtrain.cluster.finding import Finding
from dtrain.cluster.tested import DEEPSPEED_DEFAULTS, VERSIONS
from dtrain.distributed import free_port
from dtrain.run import RunDirectory
from dtrain.tracking.journal import Journal
from tests.command_line import command
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.shared_memory import needs_root, own_shared_memory


def examined(*arguments, ranks: int = 1):
    """(exit code, check → its finding) of `dtrain doctor … --json`."""
    code, text = run_ranks(command, ranks, "doctor", *arguments, "--json")[0]
    return code, {f["check"]: f for f in json.loads(text.splitlines()[-1])}


@pytest.fixture
def work(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DTRAIN_WEIGHTS", raising=False)
    shutil.copytree(digits, tmp_path / "digits")
    (tmp_path / "tiny.yaml").write_text(tiny(tmp_path / "digits", tmp_path / "runs").dump())
    return tmp_path


def test_a_sound_machine_passes_alone_and_under_a_launcher(work):
    code, found = examined(work / "tiny.yaml")
    assert (code, [f["check"] for f in found.values() if f["status"] == "bad"]) == (0, [])
    assert re.search(r"(gloo|nccl), \d ranks: 16 MiB summed in [\d.]+ ms, [\d.]+ GB/s", found["collective"]["found"])
    assert found["shards"]["found"].startswith("1,797 samples in ")
    assert found["shared memory"]["found"].startswith("data.workers is 0")
    assert all(bool(f["advice"]) == (f["status"] != "ok") for f in found.values())
    code, found = examined(work / "tiny.yaml", ranks=2)
    assert code == 0
    assert "2 ranks" in found["collective"]["found"]
    assert found["file system"]["found"].endswith("seen by 2 ranks")
    assert not list(work.glob("**/.doctor*"))


def shared_memory_in(size, config):
    own_shared_memory(size)
    return machine.shared_memory(config)


@needs_root
def test_too_small_a_dev_shm_is_bad_alone_and_under_a_launcher_and_says_what_to_do(work):
    for ranks in (1, 2):
        config = tiny(
            work / "digits", work / "runs", f"data.batch_size={720 * ranks}", "data.workers=2", "run.generator=1"
        )
        unsaid = {"LOCAL_WORLD_SIZE": "1"}  # as where a launcher leaves it out
        found = run_ranks(shared_memory_in, ranks, "1m", config, environment=unsaid)[0]
        assert (found.check, found.status) == ("shared memory", "bad")
        assert "has 1.0 MiB free, and batches made ahead take up to" in found.found
        assert f"(5 of 0.3 MiB for each of {ranks} ranks)" in found.found
        assert all(word in found.advice for word in ("--shm-size=1g", "--ipc=host", "data.workers=0"))
        assert run_ranks(shared_memory_in, ranks, "9m", config)[0].status == "ok"


def _left(config):
    """Whether a rank is still in the process group when its checks are done."""
    from dtrain.cluster.doctor import examine

    examine(config, False, lambda *_: None)
    return torch.distributed.is_initialized()


def test_no_rank_waits_for_rank_0_which_may_read_shards_for_hours(work):
    config = tiny(work / "digits", work / "runs")
    assert run_ranks(_left, 2, config) == [False, True]


def test_what_is_bad_is_said_with_exit_code_1_and_the_other_checks_go_on(work):
    shard = sorted((work / "digits/train").glob("*.tar"))[2]
    shard.unlink()
    code, found = examined(work / "tiny.yaml", "train.deadline=00:00:05", ranks=2)
    assert code == 1
    assert sorted(f["check"] for f in found.values() if f["status"] == "bad") == ["shards", "walltime"]
    assert shard.name in found["shards"]["found"]
    assert "dtrain index" in found["shards"]["advice"]
    assert "too few to do a step and save" in found["walltime"]["found"]


def test_a_flipped_byte_is_found_by_the_full_check_alone(work):
    config = tiny(work / "digits", work / "runs")
    assert surroundings.shards(config.data, full=True, progress=lambda n: None).status == "ok"
    shard = sorted((work / "digits/train").glob("*.tar"))[2]
    data = bytearray(shard.read_bytes())
    data[1000] ^= 1
    shard.write_bytes(data)
    assert surroundings.shards(config.data, full=False, progress=lambda n: None).status == "ok"
    found = surroundings.shards(config.data, full=True, progress=lambda n: None)
    assert found.status == "bad"
    assert shard.name in found.found


def test_the_tested_versions_are_those_of_the_constraints(monkeypatch):
    lines = (Path(__file__).parents[2] / "constraints.txt").read_text().split()
    assert {f"{name}=={version}" for name, version in VERSIONS.items()} <= set(lines)
    monkeypatch.setitem(VERSIONS, "torch", "1.0.0")
    found = machine.versions()
    assert found.status == "warning"
    assert "(tested: 1.0.0)" in found.found
    monkeypatch.setitem(VERSIONS, "no-such-package", "1.0.0")
    assert machine.versions().status == "bad"


def test_the_last_line_is_for_somebody_in_a_hurry():
    fine, odd, broken = (
        Finding(name, status, "x") for name, status in zip("abc", ("ok", "warning", "bad"), strict=True)
    )
    assert verdict([fine]) == "all is well"
    assert verdict([fine, odd]) == "nothing is bad; to be looked at: b"
    assert verdict([fine, odd, broken]) == "bad: c"


def defaults_against(changed: dict):
    DEEPSPEED_DEFAULTS.update(changed)
    return machine.defaults()


def test_a_changed_default_of_deepspeed_is_named():
    assert run_ranks(defaults_against, 1, {})[0].status == "ok"
    found = run_ranks(defaults_against, 1, {"zero.legacy_stage1": True, "zero.gone_since": 1})[0]
    assert found.status == "warning"
    assert "zero.legacy_stage1 is False, was True" in found.found
    assert "zero.gone_since is gone, was 1" in found.found


def test_ranks_that_cannot_meet_are_bad(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "nosuch0")
    found = machine.collective()
    assert found.status == "bad"
    assert "SOCKET_IFNAME" in found.advice


def test_a_place_that_cannot_be_written_and_a_disk_too_small_are_bad(work):
    where = f"run.dir={work}/runs"
    found = surroundings.file_system(Path("/proc/nowhere/digits"))
    assert found.status == "bad"
    assert "/proc" in found.found
    assert surroundings.disk_space(tiny(work / "digits", work / "runs", where)).status == "ok"
    free = shutil.disk_usage(work).free
    width = 64 * round((free / (16 * 18)) ** 0.5 / 64) + 4096  # about 18 width² parameters, 16 bytes each
    found = surroundings.disk_space(tiny(work / "digits", work / "runs", where, f"model.width={width}"))
    assert found.status == "bad"
    shown = float(re.search(r" has ([\d.,]+) GiB free", found.found)[1].replace(",", ""))
    assert shown == pytest.approx(free / 2**30, rel=0.1)  # others write meanwhile


def test_mlflow_is_asked_and_given_up_soon(work):
    seen = []

    class Healthy(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            seen.append(self.headers["Authorization"])
            self.send_response(200 if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Healthy)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def found(*overrides):
        config = tiny(work / "digits", work / "runs", "tracking.enabled=true", *overrides)
        return surroundings.mlflow(config.run, config.tracking)

    address = f"http://127.0.0.1:{server.server_port}"
    assert found(f"tracking.uri={address}").status == "ok"
    assert found(f"tracking.uri={address}/elsewhere").status == "bad"
    locked = found(f"tracking.uri={address.replace('//', '//me:hu%40sh@')}")
    assert (locked.status, locked.found) == ("ok", f"{address} answers 200")
    assert seen == [None, None, f"Basic {base64.b64encode(b'me:hu@sh').decode()}"]
    server.shutdown()
    server.server_close()
    started = time.monotonic()
    dead = found(f"tracking.uri=http://127.0.0.1:{free_port()}")
    assert dead.status == "bad"
    assert "hush-hush" not in str(found(f"tracking.uri=http://me:hush-hush@127.0.0.1:{free_port()}"))
    assert "dtrain sync" in dead.advice
    assert time.monotonic() - started < 10
    assert found().status == "ok"  # SQLite that will be made
    (work / "mlflow.db").write_bytes(b"not a database at all, but long enough to be taken for one" * 20)
    assert found(f"tracking.uri=sqlite:///{work}/mlflow.db").status == "bad"


def test_a_weight_file_with_another_hash_is_bad(work):
    path = work / "inception-2015-12-05.pt"
    asks = ["eval.every=100", "eval.features=inception"]
    missing = surroundings.inception(tiny(work / "digits", work / "runs", *asks).eval)
    assert missing.status == "warning"
    assert "downloads it" in missing.found
    path.write_bytes(b"half a file")
    found = surroundings.inception(tiny(work / "digits", work / "runs", *asks, f"eval.weights={path}").eval)
    assert found.status == "bad"
    assert "sha256" in found.found


def test_the_time_left_is_compared_with_what_the_run_took(work, monkeypatch):
    for name in ("SLURM_JOB_END_TIME", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    config = tiny(work / "digits", work / "runs")
    assert surroundings.walltime(config.run, config.train).status == "ok"
    run = RunDirectory(config.run.path)
    run.make_folders()
    journal = Journal(run.journal_file)
    journal.begin_attempt(0, 0)
    journal.append("train", 1, 24, {"loss": 1.0, "step_seconds": 2.0})
    journal.append("checkpoint", 1, 24, {"seconds": 20.0})
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 3600))
    found = surroundings.walltime(config.run, config.train)
    assert found.status == "ok"
    assert "a step 2.00 s, a save 20.00 s" in found.found
    journal.append("eval", 1, 24, {"fd_pixels": 1.0, "seconds": 400.0})
    journal.close()
    assert surroundings.walltime(config.run, config.train).status == "warning"
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time() + 50))  # 10 s, two saves and three steps take 56
    assert surroundings.walltime(config.run, config.train).status == "bad"
