"""Which rank this process is, as its launcher says in the environment: torch's and DeepSpeed's, srun's or mpirun's.

Imports no torch. After `adopt` the rest of dtrain finds RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR and
MASTER_PORT, whatever started it.
"""

import os
import re
import zlib
from collections.abc import Mapping, MutableMapping

from dtrain.errors import UserError

OWN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
# Names of the rank, the number of ranks, and both on this node, of launchers that do not set torch's.
MPI = {
    "mpirun of Open MPI": tuple(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")),
    "mpirun of MPICH or Intel": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
}
FIRST_PORT, PORTS = 12000, 20000  # a port that follows from the job, the same on all its ranks


def adopt(environment: MutableMapping[str, str] = os.environ, local_rank: str | None = None) -> None:
    """Make the environment say in torch's words which rank this is; alone, where nothing says otherwise.

    local_rank: what a launcher gave as `--local_rank`. Raises UserError where the environment is malformed, or names
    several ranks and not where they meet.
    """
    if local_rank is not None:
        environment.setdefault("LOCAL_RANK", local_rank)
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        _from_slurm(environment) or _from_mpi(environment)
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        for name in OWN:
            environment.pop(name, None)
        return
    _check(environment)


def leave(environment: MutableMapping[str, str] = os.environ) -> None:
    """For a command that is never distributed: what another program left in the environment makes it no rank."""
    for name in OWN:
        environment.pop(name, None)


def whole(environment: Mapping[str, str], name: str, least: int) -> int:
    """A whole number of the environment. Raises UserError."""
    text = environment.get(name, "")
    if not re.fullmatch(r"\s*\d+\s*", text) or int(text) < least:
        raise UserError(
            f"{name} in the environment is {text!r}, not a whole number from {least} on; "
            "unset it, or let a launcher such as deepspeed set it"
        )
    return int(text)


def _check(environment: MutableMapping[str, str]) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        if name not in environment:
            other = "WORLD_SIZE" if name == "RANK" else "RANK"
            raise UserError(f"the environment has {other} but no {name}; a launcher sets both, so unset {other}")
    size = whole(environment, "WORLD_SIZE", 1)
    if whole(environment, "RANK", 0) >= size:
        raise UserError(
            f"RANK in the environment is {environment['RANK']}, but WORLD_SIZE is {size}: ranks count from 0"
        )
    for name, least in (("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("LOCAL_SIZE", 1)):
        if name in environment:
            whole(environment, name, least)
    if size > 1:
        if not environment.get("MASTER_ADDR"):
            raise UserError(
                f"this is rank {environment['RANK']} of {size}, but MASTER_ADDR is not set: set it to the host of "
                "rank 0 on all ranks, and MASTER_PORT to a free port there"
            )
        whole(environment, "MASTER_PORT", 1)


def _from_slurm(environment: MutableMapping[str, str]) -> bool:
    """The tasks of an srun. A job's batch script counts as task 0 too, but it is no step of many tasks."""
    size = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS") or ""
    if not size.isdigit() or int(size) < 2 or "SLURM_PROCID" not in environment:
        return False
    if "SLURM_STEP_ID" not in environment and environment["SLURM_PROCID"] == "0":
        return False
    environment.update(RANK=environment["SLURM_PROCID"], WORLD_SIZE=size)
    environment.setdefault("LOCAL_RANK", environment.get("SLURM_LOCALID", "0"))
    here = _tasks_of_node(environment)
    if here is not None:
        environment.setdefault("LOCAL_WORLD_SIZE", str(here))
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST") or ""
    if here == int(size):
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
    elif first := first_host(nodes):
        environment.setdefault("MASTER_ADDR", first)
    job = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '')}"
    environment.setdefault("MASTER_PORT", str(_port(job)))
    return True


def slurm_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """This job as SLURM's commands know it alone: the first task of an array has the number of the whole array."""
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID") or None


def _tasks_of_node(environment: Mapping[str, str]) -> int | None:
    """How many tasks of the step run on this node, from `2(x3),1`: two on each of three nodes, then one."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    counts = []
    for part in text.split(","):
        if not (match := re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)):
            return None
        counts += [int(match[1])] * int(match[2] or 1)
    node = environment.get("SLURM_NODEID", "0")
    return counts[int(node)] if node.isdigit() and int(node) < len(counts) else None


def first_host(nodes: str) -> str | None:
    """The first of SLURM's list of nodes: `node[03-07,9],login` is node03."""
    match = re.match(r"([^,\[\]]+)(?:\[([^\]]+)\]([^,\[\]]*))?", nodes)
    if not match:
        return None
    return match[1] + (re.split(r"[-,]", match[2])[0] if match[2] else "") + (match[3] or "")


def _from_mpi(environment: MutableMapping[str, str]) -> bool:
    for launcher, names in MPI.items():
        rank, size, local_rank, local_size = (environment.get(name, "") for name in names)
        if not (rank.isdigit() and size.isdigit() and int(size) > 1):
            continue
        if not environment.get("MASTER_ADDR") and local_size != size:
            raise UserError(
                f"{launcher} started {size} ranks on several machines and does not say where rank 0 is: "
                "pass MASTER_ADDR and MASTER_PORT to all ranks, as with -x MASTER_ADDR=HOST -x MASTER_PORT=29500"
            )
        environment.update(RANK=rank, WORLD_SIZE=size)
        environment.setdefault("LOCAL_RANK", local_rank or "0")
        environment.setdefault("LOCAL_WORLD_SIZE", local_size or size)
        environment.setdefault("MASTER_ADDR", "127.0.0.1")
        job = environment.get("PMIX_NAMESPACE") or environment.get("PMI_ID") or environment.get("HYDI_CONTROL_FD") or ""
        environment.setdefault("MASTER_PORT", str(_port(f"{job}.{os.getppid()}")))
        return True
    return False


def _port(job: str) -> int:
    return FIRST_PORT + zlib.crc32(job.encode()) % PORTS
