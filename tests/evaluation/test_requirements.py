"""What is known of a network before it is loaded is what it turns out to be."""

import pytest

from dtrain.evaluation.features.build import extractor
from dtrain.evaluation.features.networks import Inception
from dtrain.evaluation.requirements import known_features
from tests.digits import tiny


@pytest.mark.parametrize("name", ["pixels", "effnet_lite0"])
def test_features_are_as_long_as_was_said(digits, tmp_path, name):
    config = tiny(digits, tmp_path, f"eval.features={name}")
    e, data = config.eval, config.data
    known, real = known_features(e, data), extractor(name, data.image_size, data.channels)
    assert (known.name, known.dimensions, known.classes) == (real.name, real.dimensions, real.classes)


def test_inception_is_as_long_as_was_said(digits, tmp_path):
    config = tiny(digits, tmp_path, "eval.features=inception")
    known = known_features(config.eval, config.data)
    assert (known.name, known.dimensions, known.classes) == (Inception.name, Inception.dimensions, Inception.classes)
