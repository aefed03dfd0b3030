"""A training that takes a second or two: scikit-learn's digits and a tiny DiT."""

from pathlib import Path

from dtrain.config import Config, load
from dtrain.tracking.journal import read

CONFIG = Path(__file__).parent.parent / "configs" / "digits-dit.yaml"


def pack_digits(destination: Path) -> Path:
    from dtrain.data.pack.pack import pack

    pack("sklearn:digits", destination, holdout=360)
    return destination


def tiny(digits: Path, folder: Path, *overrides: str) -> Config:
    """The shipped digits config with a smaller model, its run in `folder`, no MLflow and no evaluation."""
    return load(
        CONFIG,
        [
            f"data.shards={digits}/train",
            f"data.holdout={digits}/holdout/manifest.json",
            f"run.dir={folder}",
            "run.name=tiny",
            "model.depth=1",
            "model.width=32",
            "model.heads=2",
            "data.batch_size=24",
            "data.workers=0",
            # At the demo's 2e-3 a difference in rounding grows to 1e-3 in 60 steps; at 5e-4 it stays at 1e-7 for 100.
            "optim.lr=5e-4",
            "optim.warmup_steps=5",
            "train.steps=20",
            "train.log_every=1",
            "train.checkpoint_every=1000",
            "eval.every=0",
            "eval.num_samples=48",
            "eval.batch_size=12",
            "eval.steps=5",
            "tracking.enabled=false",
            *overrides,
        ],
    )


def losses(config: Config) -> list[float]:
    """Step by step, from the journal's valid lines."""
    lines = [line for line in read(config.run.path / "journal.jsonl") if line["event"] == "train"]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["metrics"]["loss"] for line in lines]
