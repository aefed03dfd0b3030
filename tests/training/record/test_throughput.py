import pytest
import torch

from dtrain.position import Position
from dtrain.tracking.journal import read
from dtrain.tracking.mlflow.keys import metric_key
from dtrain.training.record.peaks import nominal_flops_per_second
from dtrain.training.record.throughput import Meter, gemm_flops_per_second, training_flops
from dtrain.training.reduction import LEVELS, StepReduction, StepSums
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.training.runs import train


def test_the_flops_of_a_dit_are_those_counted_by_hand(digits, tmp_path):
    """Forward multiply-adds of depth 1, width 32, 2 heads, patch 2 on 8×8×1, written out; twice that, three times."""
    d, tokens, classes_in = 32, 16, 4
    patchify = tokens * classes_in * d
    embed_t = 256 * d + d * d
    attention = tokens * d * 3 * d + 2 * tokens * tokens * d + tokens * d * d
    mlp = 2 * tokens * d * 4 * d
    modulation = d * 6 * d
    final = d * 2 * d + tokens * d * 4
    by_hand = 3 * 2 * (patchify + embed_t + attention + mlp + modulation + final)
    assert training_flops(tiny(digits, tmp_path)) == pytest.approx(by_hand, rel=0.01)


def test_full_speed_is_what_a_matrix_product_reaches():
    rate = gemm_flops_per_second(torch.device("cpu"), "fp32")
    assert 1e9 < rate < 1e14


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", (989.4e12, 494.7e12, 66.9e12)),
        ("NVIDIA H100 PCIe", (756e12, 378e12, 51e12)),
        ("NVIDIA A100-SXM4-40GB", (312e12, 156e12, 19.5e12)),
        ("NVIDIA L40S", (362e12, 183e12, 91.6e12)),
        ("NVIDIA L4", (121e12, 60e12, 30.3e12)),
        ("NVIDIA GH200 480GB", (989.4e12, 494.7e12, 66.9e12)),
        ("NVIDIA A10", (125e12, 62.5e12, 31.2e12)),
        ("NVIDIA A10G", (70e12, 35e12, 31.5e12)),
        ("NVIDIA RTX A4000", (None, None, None)),
        ("Tesla T4", (None, None, None)),
        ("", (None, None, None)),
    ],
)
def test_a_gpu_is_known_by_its_name_and_its_peak_by_the_arithmetic(name, expected):
    asked = [("bf16", "none"), ("fp32", "all"), ("fp32", "convolutions")]
    assert tuple(nominal_flops_per_second(name, *how) for how in asked) == pytest.approx(expected)
    assert nominal_flops_per_second(name, "bf16_autocast", "none") == expected[0]


def test_shares_of_both_peaks_are_named_and_the_makers_is_left_out_where_nobody_knows_it(digits, tmp_path):
    config = tiny(digits, tmp_path)
    sums = StepSums(
        Position(1, 24), True, 0.5, 1.0, *[False] * 5, *[0] * 4, [1.0], [0.1], levels=[0.0] * LEVELS, named={}
    )
    meter = Meter(config, 2, torch.device("cpu"))
    meter.on_reduced(sums)
    assert "mfu_nominal" not in meter.metrics()
    meter.nominal_peak = 2 * meter.measured_peak
    found = meter.metrics()
    assert found["mfu_nominal"] == pytest.approx(found["mfu"] / 2)
    flops = 24 / meter.seconds_per_step * training_flops(config)
    assert found["mfu"] == pytest.approx(flops / meter.measured_peak)
    line = {"event": "train", "context": {}, "metrics": found}
    assert metric_key(line, "mfu_nominal") == "train/speed/mfu_nominal"


def test_the_journal_says_how_fast_and_how_evenly_the_ranks_went(digits, tmp_path):
    config = tiny(digits, tmp_path, "train.log_every=5")
    run_ranks(train, 2, config)
    lines = [e["metrics"] for e in read(config.run.path / "journal.jsonl") if e["event"] == "train"]
    assert len(lines) == 4
    for m in lines:
        assert m["images_per_second"] == pytest.approx(24 / m["step_seconds"])
        assert m["tflops"] == pytest.approx(m["images_per_second"] * training_flops(config) / 1e12)
        assert 0 < m["mfu"] < 1
        assert 0 <= m["data_wait_seconds"] < m["step_seconds"] + m["step_seconds_spread"] + 0.1
        assert 0.05 < m["peak_memory_gib"] < 20


def reduced():
    from dtrain import distributed

    rank = distributed.rank()
    reduction = StepReduction(rank, 3, batch_size=6)
    assert reduction.finish() is None
    reduction.start(
        Position(7, 42),
        torch.tensor(1.0 + rank),
        torch.tensor(2.0),
        torch.arange(16, dtype=torch.float64) * (1 + rank),
        stop=rank == 1,
        written=rank != 2,
        failed=False,
        no_room=False,
        step_seconds=0.1 * (rank + 1),
        data_seconds=0.01 * rank,
    )
    return reduction.finish()


def test_one_vector_tells_every_rank_the_same():
    a, b, c = run_ranks(reduced, 3)
    assert a == b == c
    assert a.position == Position(7, 42)
    assert a.loss == pytest.approx((1 + 2 + 3) / 6)
    assert a.grad_norm == 2.0
    assert (a.stop, a.written, a.failed, a.no_room) == (True, False, False, False)
    assert a.step_seconds == pytest.approx([0.1, 0.2, 0.3])
    assert a.data_seconds == pytest.approx([0.0, 0.01, 0.02])
    assert a.levels == [6.0 * i for i in range(16)]
