"""What the EMA costs: as a share of a training step, and against diffusers' EMAModel on the same weights.

    python benchmarks/ema.py

A DiT of about 33 M parameters, 64 tokens an image, 16 images a step, one rank. Medians of ten.
"""

import statistics
import time

import torch
from diffusers.training_utils import EMAModel

from benchmarks.checkpoint import config_of
from dtrain import distributed
from dtrain.config import EMAProfile
from dtrain.training import ema
from dtrain.training.player import Player

REPEATS = 10
BATCH = 16


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def main() -> None:
    distributed.set_thread_counts()
    distributed.initialize()
    tree = config_of(stage=2, batch=BATCH)
    config = tree.model_copy(update={"model": tree.model.model_copy(update={"size": "S/4"})})
    engine = Player.of(config, micro_batch=BATCH)
    x = torch.randn(BATCH, 3, 32, 32)
    t, y = torch.randint(0, 1000, (BATCH,)), torch.randint(0, 10, (BATCH,))

    def step() -> None:
        engine.backward((engine(x, t, y) - x).square().mean())
        engine.step(1e-4)

    weights = torch.nn.ParameterList(p.detach().clone() for _, p in engine.state.trainable)
    theirs = EMAModel(weights, decay=0.9999)

    held = torch.optim.AdamW(weights)  # holds the same weights as the engine's, and is never stepped
    for p in weights:
        held.state[p]["ema_0"] = p.detach().clone()
    ema.attach(held, [EMAProfile()], unless=lambda: False, step_of=lambda average: 1)
    (update,) = held._optimizer_step_post_hooks.values()
    step()
    rows = {"step": [], "ours": [], "theirs": []}
    for _ in range(REPEATS):
        rows["step"].append(seconds(step))
        rows["ours"].append(seconds(lambda: update(held)))
        rows["theirs"].append(seconds(lambda: theirs.step(weights)))
    median = {name: statistics.median(values) for name, values in rows.items()}
    parameters = sum(p.numel() for p in weights)
    print(f"{parameters:,} parameters, {BATCH} images a step, medians of {REPEATS}")
    step_time, ours, other = (median[name] for name in ("step", "ours", "theirs"))
    print(f"{'training step':28} {1000 * step_time:9.1f} ms")
    print(f"{'EMA update':28} {1000 * ours:9.1f} ms  {ours / step_time:6.2%} of a step  <= 3 %")
    print(f"{'diffusers EMAModel.step':28} {1000 * other:9.1f} ms  ours is {ours / other:.2f} x of it  < 1")


if __name__ == "__main__":
    main()
