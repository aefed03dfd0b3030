"""How fast a run goes, in images a second and as a share of what the device can do."""

import resource
import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from dtrain.conditions.build import typical_forward
from dtrain.config import Config
from dtrain.models.build import allocate
from dtrain.training.record.levels import mean_by_level
from dtrain.training.record.peaks import nominal_flops_per_second
from dtrain.training.reduction import StepSums

BACKWARD = 2  # a backward pass costs twice its forward pass


class Meter:
    """Throughput since the last `restart`, from the steps that were reduced."""

    def __init__(self, config: Config, world_size: int, device: torch.device):
        self.batch_size = config.data.batch_size
        self.flops_per_image = training_flops(config)
        precision = config.deepspeed.precision
        self.measured_peak = world_size * gemm_flops_per_second(device, precision)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        nominal = nominal_flops_per_second(name, precision, config.train.tf32)
        self.nominal_peak = None if nominal is None else world_size * nominal
        self._has_captions = bool(config.texts)
        self.device = device
        self.seconds_per_step = 0.0
        self.restart()

    def restart(self) -> None:
        """Begin anew, leaving out time that was not training."""
        self._since, self._reduced = time.perf_counter(), []

    def on_reduced(self, sums: StepSums) -> None:
        self._reduced.append(sums)
        self.seconds_per_step = (time.perf_counter() - self._since) / len(self._reduced)

    def metrics(self) -> dict[str, float]:
        """Means over the steps reduced, the loss by noise level among them.

        mfu, mfu_nominal: the model's own FLOPs, whatever is recomputed, as a share of what a matrix product reaches on
        this device and of what its maker says; the latter where that is known.
        bytes_read, bad_samples, captions_truncated: sums since the last `restart`.
        cache_hit_rate: of the blocks of remote shards.
        data_wait_seconds: of the rank that waited longest; step_seconds_spread: slowest rank less fastest.
        """
        images_per_second = self.batch_size / self.seconds_per_step
        spread = [max(s.step_seconds) - min(s.step_seconds) for s in self._reduced]
        waits = [max(s.data_seconds) for s in self._reduced]
        blocks = sum(s.cache_hits + s.cache_misses for s in self._reduced)
        cut = {"captions_truncated": sum(s.truncated for s in self._reduced)} if self._has_captions else {}
        hit_rate = {"cache_hit_rate": sum(s.cache_hits for s in self._reduced) / blocks} if blocks else {}
        flops = images_per_second * self.flops_per_image
        nominal = {"mfu_nominal": flops / self.nominal_peak} if self.nominal_peak else {}
        return (
            hit_rate
            | cut
            | {
                **mean_by_level(self._reduced),
                "bytes_read": sum(s.bytes_read for s in self._reduced),
                "bad_samples": sum(s.replaced for s in self._reduced),
                "images_per_second": images_per_second,
                "step_seconds": self.seconds_per_step,
                "step_seconds_spread": sum(spread) / len(spread),
                "data_wait_seconds": sum(waits) / len(waits),
                "tflops": flops / 1e12,
                "mfu": flops / self.measured_peak,
                **nominal,
                "peak_memory_gib": peak_memory(self.device) / 2**30,
            }
        )


def training_flops(config: Config) -> int:
    """Floating-point operations (a multiply-add is two) of one image's forward and backward pass, on no device."""
    with torch.device("meta"):
        model = allocate(config)
        forward = typical_forward(model.eval(), config, 1, training=False)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward()
    further = config.objective.further_forwards
    further += config.diffusion.further_forwards if config.objective.diffuses else 0
    return (1 + BACKWARD + further) * counter.get_total_flops()


def gemm_flops_per_second(device: torch.device, precision: str) -> float:
    """The best of a few square matrix products in the training's precision: this device's own measure of full speed."""
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    size = 8192 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(6):
        started = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's allocator, or of this process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
