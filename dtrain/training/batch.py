"""From what the loader gives to what a step computes with; every random number comes with the batch."""

from collections.abc import Iterator

import torch

from dtrain.config import Config
from dtrain.data.order.skipped import Skipped
from dtrain.diffusion.times import stratified
from dtrain.models.dropout import dropout_keys
from dtrain.position import Position


def prepared(
    batch: dict[str, torch.Tensor], config: Config, position: Position, skipped: Skipped
) -> dict[str, torch.Tensor]:
    """The batch with what only some configs draw: times spread evenly over the global batch, keys of dropout."""
    if config.diffusion.stratified:
        first, k = int(skipped.ordinal(position.images)), torch.from_numpy(skipped.ordinal(batch["k"].cpu().numpy()))
        spread = stratified(batch["time"], k, first, config.data.batch_size, config.run.seed)
        batch = batch | {"time": spread}
    if getattr(config.model, "dropout", 0.0):
        batch = batch | {"dropout": dropout_keys(config.run.seed, batch["k"])}
    return batch


def split(batch: dict[str, torch.Tensor], micro_batch: int) -> Iterator[dict[str, torch.Tensor]]:
    for start in range(0, len(batch["k"]), micro_batch):
        yield {k: v[start : start + micro_batch] for k, v in batch.items()}


def with_dropped_labels(batch: dict[str, torch.Tensor], config: Config) -> torch.Tensor:
    """Labels (n,) int64, a share of them replaced by the null label, for classifier-free guidance."""
    if not config.model.num_classes:
        return batch["label"]
    drop = batch["drop"] < config.diffusion.label_dropout
    return torch.where(drop, config.model.num_classes, batch["label"])


def learning_rate(config: Config, step: int) -> float:
    """The learning rate of step 1, 2, …: linear warm-up, then constant."""
    return config.optim.lr * min(1.0, step / max(1, config.optim.warmup_steps))
