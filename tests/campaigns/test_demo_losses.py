"""The shipped digits config itself: its first 20 losses at stages 0 to 3 on one and two ranks."""

import pytest

from dtrain.config import load
from tests.digits import CONFIG, losses
from tests.ranks import run_ranks
from tests.training.runs import train

pytestmark = pytest.mark.campaign


def test_the_first_20_losses_of_the_digits_config_agree_to_1e_5(digits, tmp_path):
    found = {}
    for stage in (0, 1, 2, 3):
        for world_size in (1, 2):
            overrides = [f"data.shards={digits}/train", f"data.holdout={digits}/holdout/manifest.json"]
            overrides += [f"run.dir={tmp_path}/{stage}-{world_size}", f"deepspeed.zero_stage={stage}"]
            overrides += ["train.steps=20", "train.log_every=1", "eval.every=0", "tracking.enabled=false"]
            config = load(CONFIG, overrides)
            run_ranks(train, world_size, config)
            found[stage, world_size] = losses(config)
    for shape, values in found.items():
        assert values == pytest.approx(found[0, 1], abs=1e-5), shape
