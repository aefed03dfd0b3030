"""What `benchmarks/gpu.py` makes of what it measures; that it runs is a campaign's to see."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from tests.ranks import run_ranks

PROGRAM = Path(gpu.__file__)


def test_idle_is_where_no_kernel_runs_however_they_overlap():
    assert gpu.idle_share([(0, 4), (1, 2), (3, 6), (8, 10)]) == pytest.approx(0.2)
    assert gpu.idle_share([(8, 10), (0, 4), (3, 6), (1, 2)]) == pytest.approx(0.2)
    assert gpu.idle_share([(5, 7)]) == 0
    assert gpu.idle_share([]) == 0


@pytest.mark.parametrize(
    ("shares", "missed", "code"),
    [
        ({"XL/2": 0.41, "S/2": 0.10}, [], 0),  # a goal is no bound
        ({"XL/2": 0.39, "S/2": 0.35}, [], 1),
        ({"XL/2": 0.41}, ["a step waits"], 1),
        ({"S/2": 0.35}, [], 1),
        ({"XL/2": None}, [], 1),
    ],
)
def test_a_bound_that_is_missed_or_not_measured_is_said_and_is_the_exit_code(shares, missed, code):
    said = []
    assert gpu.judged(shares, missed, said.append) == code
    assert any(line.startswith("MISSED") for line in said) == bool(code)


def test_one_factor_at_a_time_is_another():
    small, large = ([s for s in gpu.settings(("S/2", "XL/2")) if s.size == size] for size in ("S/2", "XL/2"))
    assert small[0] == gpu.Setting("S/2")
    assert large[0] == gpu.Setting("XL/2")
    for base, *others in (small, large):
        for other in (one for one in others if not one.plain):
            differing = [a for a, b in zip(base[1:], other[1:], strict=True) if a != b]
            assert len(differing) == 1 or other.tf32 == "all"  # which is of fp32 alone
    assert any(one.plain for one in small)
    assert any(one.plain for one in large)


def measured(setting):
    return gpu.measure(setting, torch.device("cpu"), seconds=0.0)


@pytest.mark.parametrize("plain", [False, True])
def test_a_step_of_ours_and_one_by_hand_are_measured(plain):
    setting = gpu.Setting("tiny", "bf16_autocast", compile="eager", plain=plain)
    (found,) = run_ranks(measured, 1, setting)
    assert found.images_per_second > 0
    assert 0 <= found.idle < 1
    assert len(found.kernels) == gpu.KERNELS
    shares = [share for _, share in found.kernels]
    assert shares == sorted(shares, reverse=True)
    assert 0.3 < sum(shares) <= 1
    assert any("mm" in name for name, _ in found.kernels)


@pytest.mark.campaign
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_program_runs_on_what_is_here(tmp_path, ranks):
    out = tmp_path / "lines.jsonl"
    command = [sys.executable, str(PROGRAM), "--tiny", "--ranks", str(ranks), "--out", str(out)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=480)
    assert ended.returncode == 0, ended.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(lines) >= 6
    assert all(line["images_per_second"] > 0 and 0 <= line["idle"] < 1 and len(line["kernels"]) == 10 for line in lines)
    assert "features of" in ended.stdout
