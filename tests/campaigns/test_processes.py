"""The digits by further processes and by an autoencoder's prior, as their configs train them: how near samples come."""

import pytest

from dtrain.config import load
from dtrain.tracking.journal import read
from tests.digits import CONFIG
from tests.ranks import run_ranks
from tests.training.runs import train

PROCESSES = {  # name → (config, overrides, the largest distance); the training digits themselves have 0.57
    "edm": ("digits-edm.yaml", [], 0.6),
    "edm, uncertain": ("digits-edm.yaml", ["diffusion.uncertainty=learned"], 0.6),
    "vae": ("digits-vae.yaml", [], 1.5),
    "gamma": ("digits-dit.yaml", ["diffusion.noise=gamma", "eval.sampler=ancestral"], 1.0),
}


@pytest.mark.campaign
@pytest.mark.parametrize("name", PROCESSES)
def test_the_digits_are_learned(digits, tmp_path, name):
    file, overrides, most = PROCESSES[name]
    places = f"data.shards={digits}/train", f"data.holdout={digits}/holdout/manifest.json", f"run.dir={tmp_path}"
    steps = load(CONFIG.with_name(file)).train.steps
    config = load(CONFIG.with_name(file), [*places, *overrides, f"eval.every={steps}", "tracking.enabled=false"])
    run_ranks(train, 2, config, timeout=3600)
    (distance,) = [e["metrics"]["fd_pixels"] for e in read(config.run.path / "journal.jsonl") if e["event"] == "eval"]
    print(f"{name}: fd_pixels {distance:.3f}")
    assert distance <= most
