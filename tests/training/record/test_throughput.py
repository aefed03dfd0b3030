import pytest
import torch

from dtrain.position import Position
from dtrain.tracking.journal import read
from dtrain.training.record.throughput import gemm_flops_per_second, training_flops
from dtrain.training.reduction import StepReduction
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
