"""Checks of the machine and what is installed on it."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from dtrain import distributed
from dtrain.cluster.finding import Finding, bad, ok, warning
from dtrain.cluster.tested import DEEPSPEED_DEFAULTS, VERSIONS
from dtrain.config import Config
from dtrain.data import shared_memory as shm

MOST_SECONDS = 120.0  # for ranks to find each other and exchange a few messages


def versions() -> Finding:
    """Installed packages against the tested ones."""
    different, missing = [], []
    for name, tested in VERSIONS.items():
        try:
            found = metadata.version(name)
        except metadata.PackageNotFoundError:
            missing.append(name)
            continue
        if found.split("+")[0] != tested:  # torch 2.14.1+cu130 is 2.14.1
            different.append(f"{name} {found} (tested: {tested})")
    again = "pip install -c constraints.txt -e . gives the tested ones"
    if missing:
        return bad("versions", f"{', '.join(missing)} not installed", again)
    if different:
        return warning("versions", ", ".join(different), again)
    return ok("versions", f"{len(VERSIONS)} packages as tested; torch {VERSIONS['torch']}")


def defaults() -> Finding:
    """What DeepSpeed does by itself, against what it did when it was tested."""
    from dtrain.training.options import deepspeed_defaults

    found, absent = deepspeed_defaults(), object()
    changed = [
        f"{name} is {found.get(name, 'gone')}, was {DEEPSPEED_DEFAULTS.get(name, 'not there')}"
        for name in sorted(found.keys() | DEEPSPEED_DEFAULTS.keys())
        if found.get(name, absent) != DEEPSPEED_DEFAULTS.get(name, absent)
    ]
    if changed:
        advice = f"set what matters in deepspeed.extra, or install DeepSpeed {VERSIONS['deepspeed']}"
        return warning("DeepSpeed's defaults", "; ".join(changed), advice)
    return ok("DeepSpeed's defaults", f"{len(found)} that dtrain leaves alone, none changed")


def accelerator(precision: str | None) -> Finding:
    """The GPUs that torch sees; precision: the run's."""
    import torch

    if not torch.cuda.is_available():
        if shutil.which("nvidia-smi") and subprocess.run(["nvidia-smi", "-L"], capture_output=True).stdout:
            advice = "its CUDA version needs a newer driver, or CUDA_VISIBLE_DEVICES hides the GPUs"
            return bad("accelerator", f"nvidia-smi lists GPUs, but torch {torch.__version__} sees none", advice)
        cores = len(os.sched_getaffinity(0))
        return warning("accelerator", f"none: {cores} CPU cores under gloo", "for real runs start on a node with GPUs")
    first = torch.cuda.get_device_properties(0)
    found = f"{torch.cuda.device_count()} × {first.name}, {first.total_memory / 2**30:.0f} GiB"
    if precision != "fp32" and precision is not None and not torch.cuda.is_bf16_supported():
        return bad("accelerator", f"{found}, without bf16", "take deepspeed.precision=fp32, or newer GPUs")
    return ok("accelerator", found)


def shared_memory(config: Config) -> Finding:
    """/dev/shm on each node against the batches made ahead there, by the ranks of a launcher, or alone by one a GPU."""
    import torch

    name = "shared memory"
    if distributed.world_size() > 1:
        world_size, ranks = distributed.world_size(), distributed.ranks_here()
    else:
        world_size = ranks = max(1, torch.cuda.device_count())
    workers, batch = shm.loader_processes(config, world_size, ranks), shm.of_batch(config, world_size)
    needed, there = shm.of_ranks(ranks, workers, batch), shm.free()
    found = shm.shown(ranks, workers, batch, there)
    nodes = distributed.gather_objects((there - needed, needed, found))
    _, needed, found = min(nodes)  # of the node that has the least to spare
    if not workers:
        return ok(name, "data.workers is 0, so no batch is made ahead")
    if min(nodes)[0] < 0:
        return bad(name, found, shm.advice(needed))
    return ok(name, found)


def collective() -> Finding:
    """Ranks add up a tensor: those that a launcher started, or two here."""
    if distributed.world_size() > 1:
        from dtrain.cluster.collective import round_trip

        return _judged(round_trip())
    import torch

    hidden = {} if torch.cuda.device_count() > 1 else {"CUDA_VISIBLE_DEVICES": ""}  # NCCL wants a GPU for each rank
    code = "from dtrain.cluster.collective import main; main()"
    try:
        answers = _started([sys.executable, "-W", "ignore", "-c", code], 2, hidden)
    except subprocess.TimeoutExpired:
        return bad("collective", f"two ranks here did not meet within {MOST_SECONDS:.0f} s", _NETWORK)
    failed = [errors for status, _, errors in answers if status]
    if failed:
        return bad("collective", (failed[0].strip().splitlines() or ["a rank died"])[-1], _NETWORK)
    backend, ranks, correct, seconds, size = answers[0][1].split()[-5:]
    return _judged((backend, int(ranks), correct == "True", float(seconds), int(size)))


_NETWORK = "set NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME to the interface between the nodes; see NCCL_DEBUG=INFO"


def _judged(measured: tuple[str, int, bool, float, int]) -> Finding:
    backend, ranks, correct, seconds, size = measured
    if not correct:
        return bad("collective", f"{backend} on {ranks} ranks gave a wrong sum", "the network or a GPU is broken")
    bandwidth = 2 * (ranks - 1) / ranks * size / seconds / 1e9  # what each rank sends and receives in a ring
    found = f"{backend}, {ranks} ranks: {size / 2**20:.0f} MiB summed in {1e3 * seconds:.1f} ms, {bandwidth:.2f} GB/s"
    return ok("collective", found)


def _started(command: list[str], ranks: int, environment: dict[str, str]) -> list[tuple[int, str, str]]:
    """(exit code, output, errors) of each rank on this machine. Raises TimeoutExpired; none outlives the call."""
    shared = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
    shared |= {"MASTER_PORT": distributed.free_port(), "OMP_NUM_THREADS": 1}
    shared |= {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])}
    processes = []
    try:
        for rank in range(ranks):
            env = os.environ | {
                k: str(v) for k, v in (shared | {"RANK": rank, "LOCAL_RANK": rank} | environment).items()
            }
            processes.append(
                subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
            )
        outputs = [p.communicate(timeout=MOST_SECONDS) for p in processes]
        return [(p.returncode, *output) for p, output in zip(processes, outputs, strict=True)]
    finally:
        for p in processes:
            p.kill()
            p.wait()
