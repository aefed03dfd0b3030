"""Words are obeyed: pairs of digits that were never trained on stand in the picture as the caption says.

DTRAIN_TEXT_ENCODER: a folder of a frozen encoder instead of the encoder of bytes.
"""

import os

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier

import dtrain
from dtrain.config import load
from dtrain.data.pack.digit_pairs import caption, pairs
from dtrain.data.pack.pack import pack
from dtrain.data.pack.source import Choice
from tests.digits import CONFIG
from tests.ranks import run_ranks
from tests.training.runs import train

pytestmark = pytest.mark.campaign

SAMPLES = 2000


def read(images):
    """The two digits (n, 2) of pictures uint8 (n, 16, 16, 1), by the three nearest of scikit-learn's."""
    digits = load_digits()
    levels = np.round(digits.images * (255 / 16)).reshape(-1, 64)
    nearest = KNeighborsClassifier(3).fit(levels, digits.target)
    halves = (images[:, 4:12, at : at + 8, 0].reshape(-1, 64).astype(float) for at in (0, 8))
    return np.stack([nearest.predict(half) for half in halves], axis=1)


def test_pairs_that_were_never_trained_on_are_drawn_as_the_caption_says(tmp_path):
    for split in ("train", "test"):
        pack("sklearn:digit-pairs", tmp_path / split, choice=Choice(split=split))
    encoder = os.environ.get("DTRAIN_TEXT_ENCODER")
    frozen = (f"conditions.text.encoder={encoder}", "conditions.text.width=null", "conditions.text.length=16")
    config = load(
        CONFIG.parent / "digits-text.yaml",
        [
            *(f"data.shards={tmp_path}/train/train", f"data.holdout={tmp_path}/test/train/manifest.json"),
            *(f"run.dir={tmp_path}", "eval.every=0", "tracking.enabled=false", "data.workers=0"),
            *(f"run.seed={os.environ.get('DTRAIN_SEED', '0')}", *(frozen if encoder else ())),
        ],
    )
    run_ranks(train, 1, config, timeout=7200)
    model = dtrain.load(config.run.path)
    asked = [pairs("test")[i % len(pairs("test"))] for i in range(SAMPLES)]
    found = read(model.sample(prompts=[caption(*pair) for pair in asked], guidance=3, steps=25))
    asked = np.array(asked)
    other = np.roll(asked, 1, axis=0)  # each picture beside the caption of another pair
    uneven = asked[:, 0] != asked[:, 1]
    right, swapped = ((found == wanted).all(1) for wanted in (asked, asked[:, ::-1]))
    shuffled = (found == other).all(1).mean()
    print(f"right {right.mean():.3f}, swapped {swapped[uneven].mean():.3f}, of another caption {shuffled:.3f}")
    assert right.mean() >= 0.55
    assert right[uneven].mean() >= 2 * swapped[uneven].mean()
    assert shuffled <= 0.05
