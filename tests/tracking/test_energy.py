"""Energy: known power integrated, counters that begin anew, nodes and attempts added up."""

import itertools
import json
import math
import time

import pytest

from dtrain.position import Position
from dtrain.report.goodput import html
from dtrain.report.runs import Run
from dtrain.run import RunDirectory
from dtrain.tracking import system
from dtrain.tracking.energy import CPU, GPU, Meter, by_attempt, mean_watts, said, total
from dtrain.tracking.journal import Journal, Tail
from dtrain.tracking.mlflow import default_uri
from dtrain.tracking.system import SystemSampler, power_limit, watts_of
from dtrain.tracking.tracker import sync
from tests.training.runs import copied


@pytest.fixture
def powercap(tmp_path):
    """Two packages, one of them with a part of it that must not be counted twice."""
    for name, start in (("intel-rapl:0", 1_000_000), ("intel-rapl:1", 9_500_000), ("intel-rapl:0:0", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{start}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("10000000\n")
    return tmp_path


def test_known_power_is_integrated(tmp_path):
    """100 + 50 sin t watts over an hour, looked at every 30 seconds as a run does."""
    meter, taken = Meter(tmp_path), 0.0
    power = lambda t: 100 + 50 * math.sin(t / 600)  # noqa: E731
    for second in range(0, 3601, 30):
        taken += meter.take(second, power(second)).get(GPU, 0.0)
    exact = (100 * 3600 - 50 * 600 * (math.cos(3600 / 600) - 1)) / 3600
    assert taken == pytest.approx(exact, rel=1e-4)
    assert meter.take(3700, None) == {}  # nvidia-smi was busy
    assert meter.take(3800, power(3600))[GPU] == pytest.approx(power(3600) * 200 / 3600)  # the time between counts


def test_counters_of_packages_go_on_past_their_range(powercap):
    meter = Meter(powercap)
    assert meter.take(0.0, None) == {CPU: 0.0}
    (powercap / "intel-rapl:0" / "energy_uj").write_text("4000000")  # 3 J
    (powercap / "intel-rapl:1" / "energy_uj").write_text("1500000")  # 0.5 J to its end, and 1.5 J
    (powercap / "intel-rapl:0:0" / "energy_uj").write_text("2000000")
    assert meter.take(1.0, None)[CPU] == pytest.approx(5 / 3600)
    assert meter.take(2.0, None)[CPU] == 0.0
    assert Meter(powercap / "nowhere").take(0.0, None) == {}


def test_a_counter_that_cannot_be_read_is_left_out_and_one_that_returns_tells_what_passed(powercap):
    (powercap / "intel-rapl:1" / "energy_uj").write_text("permission denied\n")  # it is no number, as of most systems
    meter = Meter(powercap)
    assert meter.take(0.0, None) == {CPU: 0.0}
    (powercap / "intel-rapl:1" / "energy_uj").write_text("9900000")  # readable too late
    own = powercap / "intel-rapl:0" / "energy_uj"
    own.unlink()
    assert meter.take(1.0, None) == {CPU: 0.0}
    own.write_text("4600000")  # 3.6 J since it was read last
    assert meter.take(2.0, None)[CPU] == pytest.approx(3.6 / 3600)
    (powercap / "intel-rapl:0" / "max_energy_range_uj").unlink()
    own.write_text("100000")  # begun anew at a range that nobody tells, so nothing is known of this time
    assert meter.take(3.0, None)[CPU] == 0.0
    own.write_text("1900000")
    assert meter.take(4.0, None)[CPU] == pytest.approx(1.8 / 3600)


class Clock:
    """Each look is 30 seconds after the one before, as long as there is something to see."""

    def __init__(self, looks):
        self._seconds = itertools.chain(range(0, 30 * looks, 30), itertools.repeat(30 * (looks - 1)))

    def monotonic(self):
        return float(next(self._seconds))


def test_looks_at_which_no_gpu_can_be_read_cost_the_attempt_none_of_its_energy(monkeypatch, tmp_path):
    watts = [100.0, 200.0, None, 300.0, None, None, 300.0]
    seen = itertools.chain(watts, itertools.repeat(300.0))
    told = lambda power: {} if power is None else {"gpu_0_power_usage_watts": power}  # noqa: E731
    monkeypatch.setattr(system, "gpus", lambda: told(next(seen)))
    monkeypatch.setattr(system, "time", Clock(len(watts)))
    sampler = SystemSampler(tmp_path / "journal.jsonl", 0, "0", 0.005, lambda: (1, Position(3, 24)))
    sampler.start()
    path, end = tmp_path / "system-rank-0.jsonl", time.monotonic() + 20
    while len(Tail(path).read()) < len(watts) and time.monotonic() < end:
        time.sleep(0.005)
    sampler.close()
    found = [line["metrics"][GPU] for line in Tail(path).read()]
    # 150 W for 30 s; 250 W for the 60 s around the look that failed; 300 W for 90 s.
    joules = [4500, 4500, 19500, 19500, 19500, 46500]
    assert found[: len(watts) - 1] == pytest.approx([j / 3600 for j in joules])
    assert set(found[len(watts) - 1 :]) == {found[-1]}
    assert by_attempt(tmp_path / "journal.jsonl")[1][GPU] == pytest.approx(46500 / 3600)


def test_nodes_and_attempts_add_up_and_are_called_an_estimate(tmp_path):
    for rank, watt_hours in ((0, [[1.0, 40.0], [500.0, 1200.0]]), (8, [[2.0, 60.0], [300.0, 800.0]])):
        journal = Journal(tmp_path / f"system-rank-{rank}.jsonl")
        for attempt, samples in enumerate(watt_hours):
            journal.attempt = attempt
            for number, value in enumerate(samples):
                journal.append("system", 0, 0, {GPU: value, CPU: value / 10}, {"sample": number})
        journal.close()
    attempts = by_attempt(tmp_path / "journal.jsonl")
    assert attempts == {0: {GPU: 100.0, CPU: 10.0}, 1: {GPU: 2000.0, CPU: 200.0}}
    whole = total(attempts.values())
    assert whole == {GPU: 2100.0, CPU: 210.0}
    assert said(whole, None) == "an estimated 2.1 kWh of GPUs and 210 Wh of CPUs"
    assert said(whole, 400) == "an estimated 2.1 kWh of GPUs and 210 Wh of CPUs, 0.924 kg of CO₂ at 400 g/kWh"
    assert said({}, 400) == ""
    assert by_attempt(tmp_path / "nowhere" / "journal.jsonl") == {}


def test_what_one_gpu_took_on_average_is_energy_over_time_and_gpus(tmp_path):
    """Two nodes of two GPUs and of one, two attempts: 900 W·h in 3 GPU-hours, and 100 in a tenth of one."""
    of = {0: ["gpu_0_power_usage_watts", "gpu_1_power_usage_watts"], 2: ["gpu_0_power_usage_watts"]}
    lines = {
        0: [(1, 100.0, 5.0), (1, 1900.0, 200.0), (1, 3700.0, 605.0), (2, 9000.0, 0.0), (2, 9180.0, 100.0)],
        2: [(1, 0.0, 10.0), (1, 3600.0, 310.0), (2, 9000.0, 0.5)],  # one look alone says nothing
    }
    for rank, own in lines.items():
        journal = Journal(tmp_path / f"system-rank-{rank}.jsonl")
        for number, (attempt, _, taken) in enumerate(own):
            journal.attempt = attempt
            journal.append("system", 0, 0, dict.fromkeys(of[rank], 1.0) | {GPU: taken}, {"sample": number})
        journal.append("system", 0, 0, {CPU: 3.0}, {"sample": 99})
        journal.close()
        path = tmp_path / f"system-rank-{rank}.jsonl"
        written = [json.loads(line) for line in path.read_text().splitlines()]
        for line, (_, moment, _) in zip(written, own, strict=False):
            line["time"] = 1e9 + moment
        path.write_text("".join(json.dumps(line) + "\n" for line in written))
    assert mean_watts(tmp_path / "journal.jsonl") == pytest.approx((600 + 300 + 100) / (2 * 1 + 1 + 2 * 0.05))
    assert mean_watts(tmp_path / "nowhere" / "journal.jsonl") is None


def test_the_power_limit_is_the_highest_that_nvidia_smi_tells(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert power_limit() is None  # there is no nvidia-smi
    for told, limit in (("700.00\n650.00\n", 700.0), ("[N/A]\n", None), ("No devices were found\n", None)):
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{told}'\n")
        (tmp_path / "nvidia-smi").chmod(0o755)
        assert power_limit() == limit


def test_the_power_of_a_node_is_that_of_all_its_gpus():
    assert watts_of({"gpu_0_power_usage_watts": 300.0, "gpu_1_power_usage_watts": 250.5, "gpu_1_x": 9.0}) == 550.5
    assert watts_of({"gpu_0_utilization_percentage": 3.0}) is None


def test_the_report_tells_it_below_the_attempts(finished_run, digits, tmp_path):
    run = copied(finished_run, digits, tmp_path, "tracking.carbon_intensity=100")
    journal = Journal(run.run.path / "system-rank-0.jsonl")
    journal.attempt = 1
    journal.append("system", 0, 0, {GPU: 5000.0, CPU: 0.5}, {"sample": 999})
    journal.close()
    page = html([Run.read(run.run.path)])
    assert "Energy: an estimated 5 kWh of GPUs and 0.5 Wh of CPUs, 0.5 kg of CO₂ at 100 g/kWh" in page


def test_the_report_and_mlflow_tell_it_of_each_attempt_and_in_all(finished_run, digits, tmp_path):
    from mlflow import MlflowClient

    name = "tracking.experiment=energy"
    config = copied(finished_run, digits, tmp_path, "tracking.carbon_intensity=100", name, "tracking.system_every=0")
    run = RunDirectory(config.run.path)
    for path in run.path.glob("system-rank-*"):  # what this machine took
        path.unlink()
    journal = Journal(run.path / "system-rank-0.jsonl")
    for attempt, kilo in ((1, 5.0), (2, 3.0)):
        journal.attempt = attempt
        journal.append("system", 0, 0, {GPU: 1000 * kilo}, {"sample": attempt})
    journal.close()
    whole = "an estimated 8 kWh of GPUs, 0.8 kg of CO₂ at 100 g/kWh"
    page = html([Run.read(run.path)])
    assert f"Energy: {whole}; attempt 1: an estimated 5 kWh of GPUs, 0.5 kg of CO₂ at 100 g/kWh; attempt 2: an " in page
    sync(run)
    client = MlflowClient(default_uri(run.path))
    (found,) = client.search_runs([client.get_experiment_by_name("energy").experiment_id])
    assert found.data.tags["dtrain.energy"] == whole
