"""The steps that `gpu.py` measures: dtrain's own, and the same DiT by hand."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch

DECAY, LEARNING_RATE = 0.9999, 1e-4
ROWS = {"S/2": 256, "XL/2": 128, "tiny": 4}  # of a rank


class Setting(NamedTuple):
    size: str
    precision: str = "bf16"
    compile: str = "blocks"  # or all, eager
    adamw: str = "fused"  # or foreach
    tf32: str = "convolutions"
    plain: bool = False

    @property
    def name(self) -> str:
        arithmetic = "tf32" if self.tf32 == "all" else self.precision
        return f"{self.size:5}{'plain' if self.plain else 'dtrain':7}{arithmetic:14}{self.compile:7}{self.adamw:8}"


def config_of(setting: Setting, ranks: int):
    from dtrain.config import validate

    sizes = {"width": 64, "depth": 2, "heads": 2, "patch": 4} if setting.size == "tiny" else {"size": setting.size}
    tree = {
        "run": {"name": "benchmark"},
        "data": {"shards": "none", "image_size": 32, "batch_size": ROWS[setting.size] * ranks},
        "model": {"name": "dit", "num_classes": 1000, **sizes},
        "ema": [{"decay": DECAY}],
        "deepspeed": {"zero_stage": 1, "precision": setting.precision},
        "train": {
            "steps": 1,
            "compile": {"blocks": "blocks", "all": True, "eager": False}[setting.compile],
            "tf32": setting.tf32,
        },
    }
    config = validate(tree, "benchmark")
    latents = config.data.model_copy(update={"channels": 4})  # which no picture has: they are another first stage's
    return config.model_copy(update={"data": latents})


def batch_of(config, rows: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows of what the config's parts declare, on the device."""
    from dtrain.data.declared import declared

    wanted = declared(config)
    batch = {"k": torch.arange(rows, device=device)}
    for one in wanted.fields:
        dtype = getattr(torch, one.dtype)
        normal = dtype.is_floating_point
        shape = (rows, *one.shape)
        column = torch.randn(shape, device=device) if normal else torch.ones(shape, dtype=dtype, device=device)
        batch[one.name] = one.complete(column, None)
    for draw in wanted.draws:
        make = torch.randn if draw.law == "normal" else torch.rand
        batch[draw.name] = make(rows, *draw.shape, device=device, dtype=getattr(torch, draw.dtype))
    return batch


def ours(setting: Setting, config, device: torch.device) -> Callable[[], None]:
    """The step that a training takes, with what is reduced and reported of it."""
    from dtrain import distributed
    from dtrain.conditions.build import build as build_conditions
    from dtrain.first_stage.pixels import Pixels
    from dtrain.objectives.build import build as build_objective
    from dtrain.position import Position
    from dtrain.training.player import LARGEST
    from dtrain.training.players import build as build_players
    from dtrain.training.record.levels import StepLosses, named_sums
    from dtrain.training.reduction import StepReduction
    from dtrain.training.step import Step

    rank, ranks, rows = distributed.rank(), distributed.world_size(), ROWS[setting.size]
    objective = build_objective(config)
    players = build_players(config, objective, rows)
    for player in players:
        choose_adamw(player.optimizer, fused=setting.adamw == "fused")
    one = Step(Pixels(), build_conditions(config), objective, players, config.model.draws())
    reduction, batch = StepReduction(rank, ranks, rows * ranks, named_sums(objective)), batch_of(config, rows, device)
    none = dict.fromkeys(("stop", "written", "failed", "no_room"), False)
    seconds = {"step_seconds": 0.0, "data_seconds": 0.0}

    def step() -> None:
        seen = StepLosses(objective, device)
        norms, taken = one.take(
            batch, Position(), lambda _: LEARNING_RATE, lambda *_: True, lambda _: LARGEST, on_losses=seen.add
        )
        assert taken
        seen.observe(ranks)
        reduction.finish()
        levels, (norm,) = seen.by_level(), norms.values()
        reduction.start(Position(), seen.sum, norm, levels, **none, **seconds, named=seen.named)

    return step


def choose_adamw(optimizer: torch.optim.Optimizer, fused: bool) -> None:
    """Its fused kernel, whose counts of steps are on the device, or one launch an operation for all tensors."""
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = fused, not fused
        for p in group["params"]:
            if "step" in (state := optimizer.state[p]):
                state["step"] = state["step"].to(p.device if fused else "cpu")


def plain(setting: Setting, config, device: torch.device) -> Callable[[], None]:
    """The same DiT as people write it by hand: autocast, DistributedDataParallel, clipping, AdamW, a foreach EMA."""
    from dtrain import distributed
    from dtrain.models.build import build
    from dtrain.models.compiled import compile_blocks

    model = build(config).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    if setting.compile == "blocks":
        compile_blocks([model], **({"backend": "aot_eager"} if setting.size == "tiny" else {}))
    runs = model
    if distributed.world_size() > 1:
        runs = torch.nn.parallel.DistributedDataParallel(model, [device] if device.type == "cuda" else None)
    pairs = [(mean, p) for mean, p in zip(average.parameters(), model.parameters(), strict=True) if p.requires_grad]
    averages, parameters = map(list, zip(*pairs, strict=True))
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=setting.adamw == "fused")
    rows, shape = ROWS[setting.size], config.shape
    x_0, noise = torch.randn(rows, *shape, device=device), torch.randn(rows, *shape, device=device)
    t, y = (torch.randint(0, 1000, (rows,), device=device) for _ in range(2))
    alpha_bar = (1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)).cumprod(0).float().to(device)

    def step() -> None:
        a = alpha_bar[t].view(-1, 1, 1, 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=setting.precision == "bf16_autocast"):
            output = runs(a.sqrt() * x_0 + (1 - a).sqrt() * noise, t, y)
        (output.float() - noise).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(averages, parameters, 1 - DECAY)

    return step
