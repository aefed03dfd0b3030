"""data.scaling "bicubic": how near it is to exact arithmetic and to Pillow, beside ADM's way; what belongs to it."""

import io
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dtrain.config import identity, load_kept
from dtrain.data.fields.picture import Crop, decode
from dtrain.data.fields.upright import any_scaled
from dtrain.data.stream import StepDataset, read_split
from dtrain.errors import UserError
from dtrain.evaluation.pictures import as_pictures, read_pictures
from dtrain.evaluation.reference import Reference, make
from dtrain.report.neighbours import _held_out
from tests.data.scenes import encoded, scene
from tests.data.shard_files import configuration, data_set
from tests.digits import tiny


def exact(image: torch.Tensor, size: int, side: int, left: int, top: int) -> np.ndarray:
    """The square scaled by antialiased bicubic in float64, clipped to what a byte holds: (C, size, size)."""
    square = image[None, :, top : top + side, left : left + side].double()
    scaled = torch.nn.functional.interpolate(square, (size, size), mode="bicubic", antialias=True)
    return scaled[0].clamp(0, 255).numpy()


def psnr(found, expected) -> float:
    return 10 * np.log10(255**2 / ((np.asarray(found, dtype=np.float64) - expected) ** 2).mean())


def test_over_many_sizes_torch_scales_as_pillow_does():
    """A level apart at most, but for two in a few of a million pixels: both round twice, each in its own way."""
    rng, apart, pixels = np.random.default_rng(0), 0, 0
    for number in range(500):
        side, size = int(rng.integers(2, 300)), int(rng.choice([8, 17, 32, 63, 64, 128, 256]))
        channels, noise = 1 + 2 * (number % 2), number % 4 < 2
        levels = rng.integers(64, 192, (side, side, 3), dtype=np.uint8) if noise else np.array(scene(side, side))
        levels = levels[:, :, :channels]
        found = Crop(size)(torch.from_numpy(levels).permute(2, 0, 1)).permute(1, 2, 0).numpy()
        image = Image.fromarray(levels[:, :, 0] if channels == 1 else levels)
        pillow = np.asarray(image.resize((size, size), Image.Resampling.BICUBIC)).reshape(size, size, channels)
        difference = np.abs(found.astype(int) - pillow)
        assert difference.max() <= 2, (side, size)
        apart, pixels = apart + (difference > 1).sum(), pixels + difference.size
    assert apart / pixels < 1e-5


# Width, height, size; how often a JPEG is halved, down to twice too large or more.
PHOTOGRAPHS = [(500, 375, 256, 0), (375, 500, 128, 0), (800, 600, 256, 0), (640, 480, 200, 0), (500, 375, 80, 1)]
PHOTOGRAPHS += [(500, 375, 64, 1), (500, 375, 32, 2), (640, 480, 28, 3)]


@pytest.mark.parametrize(("width", "height", "size", "halvings"), PHOTOGRAPHS)
def test_it_is_as_good_a_picture_as_adms(width, height, size, halvings):
    """Of JPEG files, against float64 without halving: each against the square that it shows."""
    data = encoded(scene(height, width), quality=92)
    image = decode(data, 3)
    found, adm = Crop(size).of(data, 3).numpy(), Crop(size, "adm").of(data, 3).numpy()
    reduced = (height >> halvings, width >> halvings)
    assert decode(data, 3, least=Crop(size).least).shape[1:] == reduced
    side = min(reduced)
    top, left = ((length - side) // 2 << halvings for length in reduced)
    scaled = [round(length * size / min(height, width)) for length in (height, width)]
    whole = torch.nn.functional.interpolate(image[None].double(), scaled, mode="bicubic", antialias=True)[0]
    row, column = ((length - size) // 2 for length in scaled)
    of_adm = psnr(adm, whole.clamp(0, 255).numpy()[:, row : row + size, column : column + size])
    its_own = psnr(found, exact(image, size, side << halvings, left, top))
    assert its_own > of_adm - 0.5
    assert its_own > (34 if halvings else 55)  # without halving it is exact, but for rounding


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 25), (24, 16)])
def test_a_picture_whose_shorter_side_fits_is_only_cut(channels, height, width):
    image = torch.from_numpy(np.array(scene(height, width))).permute(2, 0, 1)[:channels]
    top, left = (height - 16) // 2, (width - 16) // 2
    assert torch.equal(Crop(16)(image), image[:, top : top + 16, left : left + 16])
    assert torch.equal(Crop(16)(image), Crop(16, "adm")(image))


@settings(max_examples=60, deadline=None)
@given(
    *(st.integers(1, 90), st.integers(1, 90), st.integers(1, 20), st.sampled_from([1, 3]), st.integers(0, 255)),
    st.none() | st.lists(st.floats(0, 1, exclude_max=True), min_size=3, max_size=3),
)
def test_every_size_comes_out_square_and_a_flat_colour_stays(height, width, size, channels, level, draws):
    image = torch.full((channels, height, width), level, dtype=torch.uint8)
    assert torch.equal(Crop(size, draws=draws)(image), torch.full((channels, size, size), level, dtype=torch.uint8))


def test_a_random_crop_is_a_square_from_inside_at_most_a_fifth_smaller():
    """On a ramp a crop's own slope says how large it was, its mean where it was."""
    ramp = torch.arange(200, dtype=torch.uint8).repeat(120, 1)[None]
    sides, places = [], []
    for draws in np.random.default_rng(0).random((300, 3)).tolist():
        row = Crop(40, draws=draws)(ramp)[0, 20].double()
        sides.append((row[30] - row[10]).item() * 2)  # 20 of 40 pixels: half of the square
        places.append(row.mean().item())
        assert 0 <= row.min() <= row.max() < 200
    assert 93 <= min(sides) < 100
    assert 117 < max(sides) <= 123
    assert min(places) < 60
    assert max(places) > 140
    centre = Crop(40, draws=[0.0, 0.5, 0.5])(ramp)[0, 20].double().mean()
    assert abs(centre - 99.5) < 1


def test_a_random_crop_of_a_reduced_jpeg_is_the_same_square_of_all_of_its_pixels():
    data = encoded(scene(480, 640), quality=95)
    image = decode(data, 3)
    for draws in ([0.0, 0.1, 0.9], [0.6, 0.9, 0.2], [0.99, 0.0, 0.0]):
        crop = Crop(40, draws=draws)
        reduced = decode(data, 3, least=crop.least)
        halvings = (480 // reduced.shape[1]).bit_length() - 1
        assert halvings > 0
        side = round(reduced.shape[1] * 40 / (40 + int(draws[0] * 11)))
        left, top = (
            int(u * (length - side + 1))
            for u, length in zip(draws[1:], (reduced.shape[2], reduced.shape[1]), strict=True)
        )
        assert (
            psnr(crop.of(data, 3).numpy(), exact(image, 40, side << halvings, left << halvings, top << halvings)) > 34
        )


def test_rows_of_a_batch_have_one_layout_whatever_the_file_and_the_size(tmp_path):
    """A convolution may round otherwise in another layout, and rows go to ranks as the world size has it."""
    forms = [("JPEG", 8), ("JPEG", 20), ("JPEG", 70), ("PNG", 8), ("PNG", 20), ("WEBP", 8)]
    strides = set()
    for form, side in forms:
        file = io.BytesIO()
        scene(side, side).save(file, form)
        strides.add(Crop(8).of(file.getvalue(), 3).stride())
    assert len(strides) == 1


@pytest.fixture
def photographs(tmp_path):
    """20 × 24 pixels: scaled for 8, not for 20."""
    return data_set(tmp_path / "photographs", [{"jpg": encoded(scene(20, 24)), "cls": b"0"}] * 9)


def test_a_run_is_bound_to_its_scaling_and_one_from_before_the_key_goes_on_with_adms(photographs, tmp_path):
    config = configuration(photographs.path.parent, 8, num_classes=0)
    assert (config.data.scaling, identity(config)["data.scaling"]) == ("bicubic", "bicubic")
    before = config.dump().replace("  scaling: bicubic\n", "")
    assert before != config.dump()
    (tmp_path / "config.yaml").write_text(before)
    assert load_kept(tmp_path / "config.yaml").data.scaling == "adm"


def test_a_batch_a_split_and_an_inversion_see_the_same_pixels(photographs, tmp_path):
    place = photographs.path.parent
    data = place / "00000.jpg"
    data.write_bytes(encoded(scene(20, 24)))
    for scaling in ("bicubic", "adm"):
        expected = Crop(8, scaling).of(data.read_bytes(), 3)
        config = configuration(place, 3, scaling=scaling, holdout=str(photographs.path))
        assert torch.equal(StepDataset(config, photographs, 0, 1, 0)[0]["image"][0], expected)
        assert torch.equal(read_split(photographs, place, 8, 3, 0, 1, scaling=scaling)[0][0], expected)
        assert torch.equal(read_pictures([data], config.data)[0], expected)
        pixels = np.array(decode(data.read_bytes(), 3).permute(1, 2, 0))
        assert torch.equal(as_pictures(pixels[None], config.data)[0], expected)
        assert torch.equal(_held_out(config.data, 1)[0], expected)
    assert not torch.equal(*(Crop(8, scaling).of(data.read_bytes(), 3) for scaling in ("bicubic", "adm")))


def compared(split, run, *overrides) -> Reference:
    config = tiny(split.path.parent, run, f"data.holdout={split.path}", "data.channels=3", *overrides)
    return Reference.open(config, torch.device("cpu"))


def test_a_reference_is_another_one_where_pictures_are_scaled_and_the_same_where_none_is(photographs, tmp_path):
    assert any_scaled(photographs, photographs.place, 8)
    assert not any_scaled(photographs, photographs.place, 20)
    bicubic, adm = (compared(photographs, tmp_path, f"data.scaling={name}") for name in ("bicubic", "adm"))
    assert (bicubic.changed.bicubic, adm.changed.bicubic) == (True, False)
    assert not np.array_equal(bicubic.statistics.mean, adm.statistics.mean)
    for name, expected in (("bicubic", bicubic), ("adm", adm)):  # each again finds its own, though both are kept
        again = compared(photographs, tmp_path, f"data.scaling={name}")
        assert again.kept is None
        assert np.array_equal(again.statistics.mean, expected.statistics.mean)
    assert compared(photographs, tmp_path, "data.image_size=20", "data.scaling=adm").kept is not None
    assert compared(photographs, tmp_path, "data.image_size=20", "data.scaling=bicubic").kept is None


def test_a_reference_file_of_another_scaling_is_refused_with_the_command_that_makes_the_right_one(
    photographs, tmp_path
):
    folder = str(photographs.path.parent)
    made = {name: make(folder, "pixels", None, 8, None, scaling=name) for name in ("bicubic", "adm")}
    files = {name: said.partition(": ")[0] for name, said in made.items()}
    plain = f"{folder}/reference-pixels-8px"
    assert files == {"bicubic": f"{plain}-bicubic.npz", "adm": f"{plain}.npz"}
    fix = {"bicubic": re.escape(f"`dtrain reference {folder} --features pixels`"), "adm": "--scaling adm`"}
    for own, other in (("bicubic", "adm"), ("adm", "bicubic")):
        assert compared(photographs, tmp_path, f"data.scaling={own}", f"eval.reference={files[own]}")
        with pytest.raises(UserError, match=f"is stale: its preprocessing was .*{fix[own]}"):
            compared(photographs, tmp_path, f"data.scaling={own}", f"eval.reference={files[other]}")
