import pytest
import torch

from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.schedule import linear
from dtrain.diffusion.tables import on_device
from dtrain.objectives.denoising import Denoising
from dtrain.position import Position
from tests.host_waits import HostWaits

DEVICE = torch.device("meta")
TABLES = {"simple": 2, "simple min-SNR": 3, "hybrid": 6, "vlb": 6}  # α, σ, the weights; the posterior's mean, log β, β̃


def losses_of(objective: Denoising) -> HostWaits:
    x = torch.zeros(4, 1, 8, 8, device=DEVICE)
    batch = {"x_0": x, "noise": x, "time": torch.zeros(4, dtype=torch.float64, device=DEVICE)}
    channels = 2 if objective.loss != "simple" else 1
    network = {"backbone": lambda x, t: torch.cat([x] * channels, 1) * t.view(-1, 1, 1, 1)}
    with HostWaits() as waits:
        objective.losses("main", network, batch, {}, Position())
    return waits


@pytest.mark.parametrize("loss", TABLES)
def test_tables_go_to_a_device_once_and_a_call_after_the_first_never_makes_the_host_wait(loss):
    variance = "fixed_small" if loss.startswith("simple") else "learned_range"
    process = GaussianDiffusion(linear(1000), prediction="v", variance=variance)
    objective = Denoising(process, loss.split()[0], min_snr_gamma=5.0 if "min-SNR" in loss else None)
    first, second = losses_of(objective), losses_of(objective)
    assert first.found == ["aten._to_copy"] * len(first.found)
    assert 2 <= len(first.found) <= TABLES[loss]
    assert second.found == []
    another = GaussianDiffusion(linear(1000), prediction="v", variance=variance)
    assert len(losses_of(Denoising(another, loss.split()[0])).found) >= 2  # a table is its own, whatever it holds


def test_a_table_on_its_own_device_is_itself_and_a_copy_outlives_inference_mode():
    table = torch.arange(3.0)
    assert on_device(table, table.device) is table
    with torch.inference_mode():
        copy = on_device(table, DEVICE)
    assert not copy.is_inference()
    assert on_device(table, DEVICE) is copy


def test_the_watch_sees_what_would_wait():
    x = torch.tensor([1.0, 0.0])
    with HostWaits(on_cpu=True) as waits:
        float(x[0])
        x[x > 0]
        x.nonzero()
        float(x.sum().to("cpu", copy=True) + 1)
    assert waits.found == ["aten._local_scalar_dense", "aten.index", "aten.nonzero", "aten._to_copy"]
    with HostWaits() as waits:
        float(x[0])
        x.to(DEVICE, non_blocking=True)
        x.to(DEVICE)
    assert waits.found == ["aten._to_copy"]
    with pytest.raises(RuntimeError, match="meta"), HostWaits():
        float(x.to(DEVICE)[0])
