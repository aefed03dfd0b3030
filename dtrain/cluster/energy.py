"""The energy that a planned training would take, an estimate: its hours on so many GPUs at a power that is known."""

from dataclasses import dataclass

from dtrain.config import Config
from dtrain.tracking.energy import mean_watts
from dtrain.tracking.system import power_limit

LEFT_OUT = "evaluations, CPUs, memory, network and cooling are not in it"


@dataclass(frozen=True)
class Energy:
    """kilowatt_hours: None where no power is known. kilograms: of CO₂; None without tracking.carbon_intensity."""

    watts: float | None = None  # of one GPU
    watts_from: str = ""
    kilowatt_hours: float | None = None
    kilograms: float | None = None


def energy(config: Config, gpus: int, hours: float, watts: float | None) -> Energy:
    """watts: of one GPU; by default what the run's GPUs took so far, else the power limit of this machine's."""
    journal = config.run.path / "journal.jsonl"
    for found, source in (
        (lambda: watts, "--watts"),
        (lambda: mean_watts(journal), "what the run's GPUs took so far"),
        (power_limit, "the power limit of this machine's GPUs, which is the most"),
    ):
        if (power := found()) is not None:
            kilowatt_hours, grams = power * gpus * hours / 1000, config.tracking.carbon_intensity
            kilograms = None if grams is None else kilowatt_hours * grams / 1000
            return Energy(power, source, kilowatt_hours, kilograms)
    return Energy()


def said(planned: Energy, gpus: int, grams_per_kilowatt_hour: float | None) -> str:
    """A line for who reads the plan."""
    if planned.kilowatt_hours is None:
        return "energy: not known; tell the watts of one GPU with --watts, such as 700 of an H100 SXM"
    carbon = ""
    if planned.kilograms is not None:
        carbon = f", {planned.kilograms:,.3g} kg of CO₂ at {grams_per_kilowatt_hour:g} g/kWh"
    return (
        f"energy: an estimated {planned.kilowatt_hours:,.3g} kWh{carbon}, by {gpus} GPUs of {planned.watts:,.0f} W "
        f"({planned.watts_from}); {LEFT_OUT}"
    )
