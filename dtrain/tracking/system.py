"""How busy each node is: one thread a node, into a journal of its own, under the names that MLflow's UI knows."""

import socket
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from dtrain.position import Position
from dtrain.tracking.energy import POWER, Meter, total
from dtrain.tracking.journal import SYSTEM, Journal, last_line

MEGABYTE = 1e6
_QUERY = "index,utilization.gpu,memory.used,memory.total,power.draw"


class SystemSampler:
    """Writes a "system" line every `seconds`, from `start` to `close`, for local rank 0 of a node.

    journal_file: rank 0's; the lines go beside it. where: the attempt and how far the run is, for the line.
    """

    def __init__(
        self, journal_file: Path, rank: int, node: str, seconds: float, where: Callable[[], tuple[int, Position]]
    ):
        self._seconds, self._where = seconds, where
        self._path = journal_file.with_name(SYSTEM.replace("*", str(rank)))
        self._context = {"node": node, "host": socket.gethostname()}
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="system-sampler", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Take a last sample, so that a short run has one."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(5.0)

    def _work(self) -> None:
        psutil.cpu_percent()  # the next call tells what was since this one
        network = psutil.net_io_counters()
        try:
            number = _samples(self._path)
        except OSError:  # a folder or a FIFO is there: nobody waits for what a node does
            return
        journal, last = Journal(self._path), False
        meter, taken = Meter(), {}  # watt-hours of the attempt so far
        meter.take(time.monotonic(), watts_of(gpus()))
        while not last:
            last = self._closing.wait(self._seconds)
            number += 1
            attempt, position = self._where()
            if attempt != journal.attempt:
                journal.attempt, taken = attempt, {}
            try:
                of_gpus = gpus()
                taken = total([taken, meter.take(time.monotonic(), watts_of(of_gpus))])
                metrics = machine(network, self._path.parent) | of_gpus | taken
                context = self._context | {"sample": number}
                journal.append("system", position.step, position.images, metrics, context)
            except OSError:
                continue  # a full disk, or one that is gone, is reported by whatever writes what matters
        journal.close()


def _samples(path: Path) -> int:
    """How many a node's journal has, as its last line numbers them."""
    try:
        line = last_line(path)
    except FileNotFoundError:
        return 0
    return line["context"].get("sample", 0) if line else 0


def machine(network_before, folder: Path) -> dict[str, float]:
    """CPU since the call before, memory, the disk of `folder`, network since `network_before`."""
    memory, disk, network = psutil.virtual_memory(), psutil.disk_usage(str(folder)), psutil.net_io_counters()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent(),
        "system_memory_usage_megabytes": memory.used / MEGABYTE,
        "system_memory_usage_percentage": memory.percent,
        "disk_usage_percentage": disk.percent,
        "disk_available_megabytes": disk.free / MEGABYTE,
        "network_receive_megabytes": (network.bytes_recv - network_before.bytes_recv) / MEGABYTE,
        "network_transmit_megabytes": (network.bytes_sent - network_before.bytes_sent) / MEGABYTE,
    }


def gpus() -> dict[str, float]:
    """How busy every GPU of the node is, by nvidia-smi; none where there is no nvidia-smi."""
    return parse_gpus(_asked(_QUERY))


def _asked(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _is_number(text: str) -> bool:
    return text.replace(".", "", 1).isdigit()


def power_limit() -> float | None:
    """The most watts that a GPU of this machine may take, the highest of them; None where none tells its own."""
    told = [float(line) for line in _asked("power.limit").splitlines() if _is_number(line.strip())]
    return max(told, default=None)


def watts_of(found: dict[str, float]) -> float | None:
    """The power of all GPUs that tell theirs; None where none does."""
    told = [value for name, value in found.items() if name.endswith(POWER)]
    return sum(told) if told else None


def parse_gpus(answer: str) -> dict[str, float]:
    """Lines of index, utilization in %, memory used and there in MiB, power in W; what is not given is absent."""
    found = {}
    for line in answer.splitlines():
        index, *values = (part.strip() for part in line.split(","))
        if len(values) != 4:
            continue  # of a GPU that is gone it says so in a sentence
        busy, used, there, power = (float(v) if _is_number(v) else None for v in values)
        ours = {
            "utilization_percentage": busy,
            "memory_usage_megabytes": used and used * 2**20 / MEGABYTE,
            "memory_usage_percentage": 100 * used / there if used is not None and there else None,
            "power_usage_watts": power,
        }
        found |= {f"gpu_{index}_{name}": value for name, value in ours.items() if value is not None}
    return found
