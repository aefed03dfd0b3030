"""Would this run start? `dtrain train --check` and job submission ask, without torch and without ranks."""

from pathlib import Path

from dtrain.config import Config
from dtrain.data import manifest as manifests
from dtrain.data.streams import with_streams
from dtrain.run import RunDirectory
from dtrain.training.division import rows_per_rank
from dtrain.training.stopping import deadline


def check_start(config: Config, ranks: int) -> str:
    """A line that says what would run on `ranks` ranks. Raises the UserError that a start would."""
    rows, micro_batch = rows_per_rank(config, ranks)
    manifest = manifests.load_all(config.data)
    manifests.check_all(manifest, config.data)
    if config.data.holdout:
        holdout = Path(config.data.holdout)
        manifests.check_shards(manifests.load(holdout), holdout.parent)
    config = with_streams(config, manifest)
    deadline(config.train.deadline, 0.0)
    run = RunDirectory(config.run.path)
    run.reconcile(config)
    verb = "goes on" if run.config_file.exists() else "starts"
    ours, size = config.deepspeed, config.data.batch_size
    return (
        f"{run.path} {verb}: {config.train.steps:,} steps of {size} images from {manifest.samples:,}; each rank has "
        f"{rows} of them in micro-batches of {micro_batch}, at ZeRO stage {ours.zero_stage} in {ours.precision}"
    )
