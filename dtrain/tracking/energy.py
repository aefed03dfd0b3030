"""The energy that a run has taken, an estimate: its GPUs' and its CPUs', in watt-hours.

GPUs: the power that nvidia-smi tells, between two looks the mean of both. CPUs: the packages' own counters (RAPL),
where the system lets them be read. Of all that runs on the node; of memory, disks, network and cooling nothing.
"""

from collections.abc import Iterable
from pathlib import Path

from dtrain.errors import UserError
from dtrain.files import beside
from dtrain.tracking.journal import SYSTEM, Tail

POWERCAP = Path("/sys/class/powercap")
WATT_SECONDS = 3600.0  # of a watt-hour
POWER = "_power_usage_watts"  # what the name of a GPU's power ends in
GPU, CPU = "gpu_energy_watt_hours", "cpu_energy_watt_hours"


class Meter:
    """What a node takes between two calls of `take`."""

    def __init__(self, powercap: Path = POWERCAP):
        self._packages = {
            folder: counter for folder in _packages(powercap) if (counter := _counter(folder)) is not None
        }
        self._watts: tuple[float, float] | None = None  # (moment, power) of the last look that had one

    def take(self, moment: float, watts: float | None) -> dict[str, float]:
        """Watt-hours since the call before, by GPU and CPU, of what could be read. watts: of all GPUs at this moment,
        in seconds of a clock that only rises.
        """
        found = {}
        if watts is not None:
            before, power = self._watts or (moment, watts)
            found[GPU] = (power + watts) / 2 * (moment - before) / WATT_SECONDS
            self._watts = moment, watts
        joules = [self._since(folder) for folder in self._packages]
        if joules:
            found[CPU] = sum(joules) / WATT_SECONDS
        return found

    def _since(self, folder: Path) -> float:
        """Joules of a package since it was read last; its counter begins anew at its range."""
        before, now = self._packages[folder], _counter(folder)
        if now is None:
            return 0.0
        self._packages[folder] = now
        passed = now - before
        if passed < 0:
            passed += _number(folder / "max_energy_range_uj") or -passed
        return passed / 1e6


def _packages(powercap: Path) -> list[Path]:
    """Not their parts, `intel-rapl:0:0`, which are counted in them already."""
    try:
        return sorted(path for path in powercap.glob("*-rapl:*") if path.name.count(":") == 1)
    except OSError:
        return []


def _counter(folder: Path) -> int | None:
    return _number(folder / "energy_uj")


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def by_attempt(journal_file: Path) -> dict[int, dict[str, float]]:
    """Attempt → watt-hours of all nodes together, as far as their journals beside rank 0's tell."""
    found: dict[int, dict[str, float]] = {}
    try:
        for path in beside(journal_file, SYSTEM):
            last = {line["attempt"]: line["metrics"] for line in Tail(path).read()}  # they accumulate
            for attempt, metrics in last.items():
                own = found.setdefault(attempt, {})
                for key in (GPU, CPU):
                    if key in metrics:
                        own[key] = own.get(key, 0.0) + metrics[key]
    except (OSError, UserError):
        return {}
    return {attempt: own for attempt, own in found.items() if own}


def mean_watts(journal_file: Path) -> float | None:
    """What one GPU of the run took on average, over all nodes and attempts; None where no node could tell.

    Between an attempt's first line that tells it and its last: what was before, nobody looked at.
    """
    watt_hours = gpu_hours = 0.0
    try:
        for path in beside(journal_file, SYSTEM):
            ends: dict[int, list[dict]] = {}
            for line in Tail(path).read():
                if GPU in line["metrics"]:
                    ends[line["attempt"]] = [*ends.get(line["attempt"], [])[:1], line]
            for first, *last in ends.values():
                for line in last:
                    gpus = sum(key.endswith(POWER) for key in line["metrics"])
                    watt_hours += line["metrics"][GPU] - first["metrics"][GPU]
                    gpu_hours += gpus * (line["time"] - first["time"]) / 3600
    except (OSError, UserError):
        return None
    return watt_hours / gpu_hours if gpu_hours > 0 else None


def total(attempts: Iterable[dict[str, float]]) -> dict[str, float]:
    """The energy of several attempts together."""
    found: dict[str, float] = {}
    for one in attempts:
        for key, value in one.items():
            found[key] = found.get(key, 0.0) + value
    return found


def said(energy: dict[str, float], grams_per_kilowatt_hour: float | None) -> str:
    """A sentence for who reads it; empty of nothing known."""
    parts = [f"{_kilo(energy[key])} of {what}" for key, what in ((GPU, "GPUs"), (CPU, "CPUs")) if key in energy]
    if not parts:
        return ""
    carbon = ""
    if grams_per_kilowatt_hour is not None:
        grams = sum(energy.values()) / 1000 * grams_per_kilowatt_hour
        carbon = f", {grams / 1000:,.3g} kg of CO₂ at {grams_per_kilowatt_hour:g} g/kWh"
    return f"an estimated {' and '.join(parts)}{carbon}"


def _kilo(watt_hours: float) -> str:
    return f"{watt_hours / 1000:,.3g} kWh" if watt_hours >= 1000 else f"{watt_hours:,.3g} Wh"
