"""Pictures as a condition: operators beside brute force and SciPy, dropped by their own draw, one null, cropped and
mirrored with the image.
"""

import numpy as np
import pytest
import torch
from scipy import ndimage

from dtrain.conditions import operators
from dtrain.conditions.build import Conditions, build
from dtrain.conditions.picture import SHALLOWEST, Shown
from dtrain.config import validate
from dtrain.config.conditions import Picture
from dtrain.data.declared import shown as shown_field
from dtrain.data.fields.samples import read_pictures
from dtrain.data.stream import Completion, StepDataset
from tests.data.shard_files import data_set, picture

N, S = 5, 12


def image(channels=3, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).random((N, channels, S, S), dtype=np.float32))


def shown(operator="mask", **keys):
    if operator in ("mask", "low_resolution"):
        keys = {"grid": 4} | keys
    return Shown("ink", Picture(operator=operator, **keys), 3, S)


def test_edges_are_scipys_sobel_over_the_threshold():
    x, amount = image(), torch.tensor([0.05, 0.1, 0.2, 0.3, 0.1])
    found = operators.edges(x, amount)
    grey = np.tensordot(np.array(operators.LUMA), x.double().numpy(), (0, 1))
    for row in range(N):
        slope = np.hypot(ndimage.sobel(grey[row], 0, mode="nearest"), ndimage.sobel(grey[row], 1, mode="nearest")) / 8
        sure = abs(slope - float(amount[row])) > 1e-6
        assert np.array_equal((slope > float(amount[row]))[sure], found[row, 0].bool().numpy()[sure])


def test_blur_is_scipys_of_each_rows_own_deviation():
    x, amount = image(), torch.tensor([0.5, 1.0, 1.5, 2.0, 0.7], dtype=torch.float64)
    found = operators.blur(x, amount, 2.0)
    for row, deviation in enumerate(amount.tolist()):
        one = x[row].double().numpy()
        wanted = ndimage.gaussian_filter(one, deviation, axes=(1, 2), mode="nearest", radius=7)
        assert np.abs(found[row].numpy() - wanted).max() < 1e-6


def test_masks_and_low_resolution_are_of_each_cells_mean():
    x = image()
    mask, low = operators.mask(x, torch.full((N,), 0.5), 4), operators.low_resolution(x, 3)
    for row in range(N):
        for i in range(S):
            for j in range(S):
                a, b = 3 * (i // 3), 3 * (j // 3)
                grey = sum(w * x[row, c, a : a + 3, b : b + 3].mean() for c, w in enumerate(operators.LUMA))
                assert abs(grey - 0.5) < 1e-6 or mask[row, 0, i, j] == float(grey > 0.5)
                a, b = 4 * (i // 4), 4 * (j // 4)
                assert torch.allclose(low[row, :, i, j], x[row, :, a : a + 4, b : b + 4].mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize("operator", ["edges", "blur", "mask", "low_resolution"])
def test_a_picture_does_not_depend_on_the_company_that_it_is_computed_in(operator):
    part, x = shown(operator), image()
    drawn = torch.linspace(0, 0.9, N, dtype=torch.float64)
    whole = part.computed(x, drawn)
    assert whole.shape == (N, part.section.channels(3), S, S)
    assert torch.equal(whole, torch.cat([part.computed(x[i : i + 1], drawn[i : i + 1]) for i in range(N)]))


def test_it_is_computed_of_the_image_as_it_is_mirrored():
    part, x = shown("low_resolution"), image()
    batch = {"image": 2 * x - 1}
    mirrored = {"image": batch["image"].flip(-1)}
    assert torch.allclose(part.given(mirrored)["ink"], part.given(batch)["ink"].flip(-1), atol=1e-7)


def test_the_picture_of_a_sample_is_the_trainings_of_that_image():
    part = shown("mask")
    levels = torch.from_numpy(np.random.default_rng(1).integers(0, 256, (N, 3, S, S), dtype=np.uint8))
    from dtrain.data.fields.picture import normalize

    trained = part.given({"image": normalize(levels), "ink_amount": torch.zeros(N)})
    asked = part.of_pictures(levels, list(range(N)))
    assert all(torch.equal(trained[name], asked[name]) for name in trained)
    assert torch.equal(part.of_pictures(trained["ink"], list(range(N)))["ink"], trained["ink"])  # as it is


def test_nothing_is_the_same_in_training_in_sampling_and_without_a_picture():
    part, batch = (
        shown(dropout=1.0),
        {"image": 2 * image() - 1, "ink_amount": torch.zeros(N), "ink_drop": torch.rand(N)},
    )
    trained = part.dropped(part.given(batch), batch)
    for other in (part.null(part.given(batch)), part.of_ids(list(range(N)), torch.zeros(N))):
        assert trained.keys() == other.keys()
        assert all(torch.equal(trained[name], other[name]) for name in trained)
    assert not trained["ink"].any()
    assert not trained["ink_scale"][:, 0].any()


def test_it_is_dropped_as_often_as_it_says():
    part, n = shown(dropout=0.2), 4000
    drop = torch.from_numpy(np.random.default_rng(2).random(n))
    condition = {"ink": torch.ones(n, 1, 1, 1), "ink_scale": torch.ones(n, 2)}
    share = (part.dropped(condition, {"ink_drop": drop})["ink_scale"][:, 0] == 0).double().mean()
    assert abs(share - 0.2) < 4 * (0.2 / n) ** 0.5


def test_a_scale_multiplies_what_is_told_and_guess_mode_weakens_what_is_added_early():
    part = shown()
    condition = part.null(part.typical(2))
    condition["ink_scale"] = torch.tensor([[1.0, 1.0], [0.0, 1.0]])  # of which the second is told nothing
    assert part.scaled(condition, 0.5, False)["ink_scale"].tolist() == [[0.5, 1.0], [0.0, 1.0]]
    guess = torch.tensor([[1.0, SHALLOWEST], [0.0, SHALLOWEST]])
    assert torch.equal(part.scaled(condition, 1.0, True)["ink_scale"], guess)


def test_guidance_leads_away_from_no_picture_in_guess_mode_alone():
    conditions = Conditions([shown()])
    told = shown().of_pictures(torch.full((2, 3, S, S), 255, dtype=torch.uint8), [0, 1])
    kept, nothing = conditions.null(told, pictures=False), conditions.null(told)
    assert all(torch.equal(kept[name], told[name]) for name in told)
    assert not nothing["ink_scale"][:, 0].any()


def test_a_file_of_the_sample_is_cropped_and_mirrored_as_the_image(tmp_path):
    """Each sample's depth.png is its own picture, so that whatever becomes of the one becomes of the other."""
    samples = [{"png": picture(i, 12), "depth.png": picture(i, 12)} for i in range(8)]
    manifest = data_set(tmp_path, samples)
    data = {"shards": str(tmp_path), "image_size": 8, "batch_size": 8, "crop": "random", "flip": True}
    model = {"name": "dit", "depth": 1, "width": 16, "heads": 2, "patch": 2, "control_of": "base.safetensors"}
    tree = {"data": data | {"streams": 1}, "model": model, "train": {"steps": 1}, "run": {"name": "x"}}
    config = validate(tree | {"conditions": {"depth": {"kind": "picture", "field": "depth.png"}}}, "the test")
    batch = Completion(config)(StepDataset(config, manifest, 0, 1, 0)[0])
    assert torch.equal(batch["depth"], batch["image"])
    told = build(config).of_batch(batch)
    assert torch.equal(told["depth"], (batch["image"] + 1) / 2)
    unlike = StepDataset(config, manifest, 0, 1, 0)[0]
    assert unlike["mirrored"].any()
    assert not unlike["mirrored"].all()
    bare = read_pictures(manifest, tmp_path, shown_field("depth", config.pictures["depth"], config), [3, 1, 3])
    assert torch.equal(bare[0], bare[2])
    assert not torch.equal(bare[0], bare[1])
