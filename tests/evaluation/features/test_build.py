import hashlib

import numpy as np
import pytest
import torch

from dtrain.evaluation.features.build import Pixels, extractor, metric_name


def test_pixels_are_the_flattened_image_in_minus_one_to_one():
    images = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 4), dtype=np.uint8)
    images[0, 0, 0, :2] = 0, 255
    features = Pixels(image_size=4, channels=3)(torch.from_numpy(images))
    assert features.shape == (5, 48)
    assert features.dtype == torch.float32
    np.testing.assert_allclose(features.numpy(), images.reshape(5, 48) / 127.5 - 1, atol=1e-7)
    assert features[0, :2].tolist() == [-1.0, 1.0]


def test_the_name_and_the_image_shape_give_the_extractor():
    pixels = extractor("pixels", image_size=8, channels=1)
    assert (pixels.name, pixels.dimensions) == ("pixels", 64)
    assert pixels(torch.zeros(2, 1, 8, 8, dtype=torch.uint8)).shape == (2, pixels.dimensions)
    assert pixels(torch.zeros(0, 1, 8, 8, dtype=torch.uint8)).shape == (0, pixels.dimensions)


def test_fingerprints_tell_extractors_apart_and_stay_the_same_for_ever():
    digits = Pixels(8, 1).fingerprint
    assert digits == hashlib.sha256(b"pixels x/127.5-1 float32 1x8x8").hexdigest()
    assert len({digits, Pixels(8, 3).fingerprint, Pixels(16, 1).fingerprint, Pixels(8, 1).fingerprint}) == 3


@pytest.mark.parametrize(
    "images",
    [torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8), torch.zeros(2, 3, 8, 9, dtype=torch.uint8)],
)
def test_images_that_were_not_rounded_or_have_another_shape_are_refused(images):
    with pytest.raises(ValueError, match=r"wants uint8 images whose \(C, H, W\) is \(3, 8, 8\), got"):
        Pixels(8, 3)(images)


def test_a_metric_carries_its_extractor():
    assert metric_name("fd", "pixels") == "fd_pixels"
    assert metric_name("kid", "inception") == "kid_inception"
