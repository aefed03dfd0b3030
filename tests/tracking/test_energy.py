"""Energy: known power integrated, counters that begin anew, nodes and attempts added up."""

import math

import pytest

from dtrain.report.goodput import html
from dtrain.report.runs import Run
from dtrain.tracking.energy import CPU, GPU, Meter, by_attempt, said, total
from dtrain.tracking.journal import Journal
from dtrain.tracking.system import watts_of
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
