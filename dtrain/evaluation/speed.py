"""How long this device takes for samples, and how often they ask a network."""

import time
from dataclasses import dataclass
from statistics import median

import torch

from dtrain.config import Config
from dtrain.evaluation.evaluate import asked_of, labels_of
from dtrain.evaluation.generate import Generator, OnProgress, quiet
from dtrain.evaluation.prior import Prior
from dtrain.evaluation.reference import Reference

BLOCKS = 3  # that are timed, after one that is not


@dataclass(frozen=True)
class Speed:
    """block_seconds: of BLOCKS blocks of `block` samples each. evaluations: forward passes an image, those of guidance
    counted. parameters: of the network.
    """

    block_seconds: list[float]
    block: int
    evaluations: float
    parameters: int

    @property
    def seconds_per_thousand(self) -> float:
        """Seconds that a thousand samples take at the speed of the median block."""
        return 1000 * median(self.block_seconds) / self.block


def device_name(device: torch.device) -> str:
    """What a number of seconds belongs to; of a CPU with the threads that computed."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{_processor()}, {threads} thread{'' if threads == 1 else 's'}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", errors="replace") as f:
            found = [line.partition(":")[2].strip() for line in f if line.startswith("model name")]
    except OSError:
        found = []
    return found[0] if found else "CPU"


def measure(
    generator: Generator | Prior, config: Config, reference: Reference, on_progress: OnProgress = quiet
) -> Speed:
    """Draw blocks of `eval.batch_size` samples, from noise to 8-bit images in memory, on this rank alone."""
    e = config.eval
    ids = list(range(e.batch_size))
    labels, said = labels_of(ids, e, config.model.num_classes, reference), asked_of(ids, reference)
    rows, seconds = [], []

    def count(module, inputs, output) -> None:
        rows.append(len(inputs[0]))

    networks = [generator.model, *([generator.guide.module] if generator.guide is not None else [])]
    hooks = [network.register_forward_hook(count) for network in networks]
    try:
        for number in range(1 + BLOCKS):
            begun = time.perf_counter()
            generator.draw(ids, labels, e, **({"said": said} if said else {}))
            seconds.append(time.perf_counter() - begun)
            on_progress(number + 1, 1 + BLOCKS)
    finally:
        for hook in hooks:
            hook.remove()
    evaluations = sum(rows) / len(ids) / len(seconds) if rows else generator.evaluations(e)
    return Speed(seconds[1:], len(ids), evaluations, sum(p.numel() for p in generator.model.parameters()))
