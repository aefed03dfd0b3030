"""Pictures to noise and back: exact models against closed forms, and `dtrain invert` on a trained run."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dtrain
from dtrain.config import Gaussian
from dtrain.data.fields.picture import normalize, quantize
from dtrain.diffusion.process import build as build_process
from dtrain.diffusion.samplers import encode, sample
from dtrain.errors import NotFinite, UserError
from dtrain.evaluation.generate import Generator
from dtrain.evaluation.invert import invert, settings_of_inversion, without_class
from tests.checkpoint.exported import trained
from tests.command_line import command, failing
from tests.diffusion.gaussian_data import MEAN, STD, exact, normals
from tests.digits import tiny
from tests.evaluation.exact_mixture import ExactMixture, drawn
from tests.ranks import run_ranks

PROCESSES = [
    [],
    ["diffusion.prediction=v"],
    ["diffusion.prediction=x0"],
    ["diffusion.prediction=v", "diffusion.zero_terminal_snr=true"],
    ["diffusion={process: flow, prediction: x0}", "eval.sampler=euler"],
    ["diffusion={process: edm, sigma_data: 0.4}", "eval.churn=40", "eval.churn_noise=1.01"],
    ["diffusion={process: vdm}"],
    ["diffusion={process: flow}", "eval.sampler=euler"],
]


def inverting(folder, *overrides):
    """The settings of an inversion in a config of images (1, 2, 2)."""
    config = tiny(folder, folder, "data.image_size=2", "data.holdout=null", *overrides)
    return config.model_copy(update={"eval": config.eval.model_copy(update=settings_of_inversion(config.diffusion))})


@pytest.mark.parametrize("overrides", PROCESSES, ids=lambda o: "-".join(part.partition("=")[2] for part in o) or "eps")
def test_on_gaussian_data_noise_and_round_trip_near_the_closed_form_as_one_over_the_steps(tmp_path, overrides):
    """The flow of N(m, s²) keeps each point's place in its marginal N(α m, α² s² + σ²)."""
    config = inverting(tmp_path, *overrides)
    process = build_process(config.diffusion)
    place = normals(4, 1, 2, 2)
    x_0 = MEAN + STD * place
    errors = []
    for steps in (25, 50, 100, 200):
        timesteps = process.walk(steps, "trailing")
        x_T = encode(exact(process), process, x_0, timesteps)
        again = sample(exact(process), process, x_T, config.eval.sampler, steps)
        alpha, sigma = process.level(timesteps[0])
        closed = alpha * MEAN + math.sqrt(alpha**2 * STD**2 + sigma**2) * place
        errors.append([float((found - true).abs().max()) for found, true in ((x_T, closed), (again, x_0))])
    for noise, round_trip in zip(*map(np.array, (errors[:-1], errors[1:])), strict=True):
        np.testing.assert_allclose(round_trip / noise, 0.5, atol=0.13)  # both errors, halved by twice the steps
    assert max(errors[-1]) < 0.05


def test_gamma_noise_has_no_ode_to_walk_backwards():
    with pytest.raises(UserError, match=r"diffusion.noise gamma inverts no pictures"):
        settings_of_inversion(Gaussian(noise="gamma"))


def test_euler_backwards_on_gaussian_data_is_the_closed_product(tmp_path):
    process = build_process(inverting(tmp_path, *PROCESSES[-1]).diffusion)
    steps, slope = 10, 1.0
    for t in reversed(process.walk(steps)):  # of v = k(t) (x − mean), asked at the time gone to
        slope *= 1 + (t - STD**2 * (1 - t)) / (STD**2 * (1 - t) ** 2 + t**2) / steps
    ends = torch.tensor([0.0, 1.0]).double().view(2, 1, 1, 1)
    zero, one = encode(exact(process), process, ends, process.walk(steps)).flatten()
    assert float(one - zero) == pytest.approx(slope, abs=1e-10)


@pytest.mark.parametrize("overrides", [PROCESSES[0], PROCESSES[-1]], ids=["gaussian", "flow"])
def test_pictures_of_a_mixture_become_standard_normals_and_come_back_the_closer_the_more_steps(tmp_path, overrides):
    """Through bytes, on data that are not Gaussian, with their exact model."""
    images = quantize(drawn(2000)).view(-1, 1, 2, 2)
    found = []
    for steps in (50, 100, 200):
        config = inverting(tmp_path, *overrides, f"eval.steps={steps}")
        process = build_process(config.diffusion)
        generator = Generator.of(ExactMixture(process), process, config, torch.device("cpu"))
        names = list(map(str, range(len(images))))
        found.append(invert(generator, images, without_class(len(images), 10, 0.1), config.eval, names))
    worth = [10 * math.log10(255**2 / np.mean((f.images.astype(float) - f.reconstructions) ** 2)) for f in found]
    assert min(np.diff(worth)) > 4  # dB for twice the steps
    assert worth[-1] > 43  # an error below 2 of 255 levels
    noise = found[-1].noise
    assert noise.dtype == np.float32
    assert noise.mean(axis=0) == pytest.approx(np.zeros((1, 2, 2)), abs=0.07)
    assert np.cov(noise.reshape(-1, 4).T) == pytest.approx(np.eye(4), abs=0.12)


def test_weights_that_diverged_are_said_with_the_pictures(tmp_path):
    config = inverting(tmp_path)
    process = build_process(config.diffusion)

    class Diverged(torch.nn.Module):
        def forward(self, x, t, y):
            return torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) == 1, torch.nan, x)

    generator = Generator.of(Diverged(), process, config, torch.device("cpu"))
    images = torch.zeros(3, 1, 2, 2, dtype=torch.uint8)
    with pytest.raises(NotFinite, match=r"not finite for 1 of 3 pictures \(b\): the weights have diverged"):
        invert(generator, images, torch.zeros(3, dtype=torch.int64), config.eval, ["a", "b", "c"])


# -- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(digits, tmp_path_factory):
    return trained(digits, tmp_path_factory.mktemp("runs"), "eval.guidance=2", "eval.sampler=dpmpp_2m").run.path


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """Three pictures of unlike sizes, in a folder and one below it, and other files."""
    monkeypatch.chdir(tmp_path)
    draws = np.random.default_rng(0)
    (tmp_path / "photos/more").mkdir(parents=True)
    for name, size in (("a.png", (8, 8)), ("b.jpg", (30, 20, 3)), ("more/c.png", (9, 16))):
        Image.fromarray(draws.integers(0, 256, size, dtype=np.uint8)).save(tmp_path / "photos" / name)
    (tmp_path / "photos/notes.txt").write_text("none")
    return tmp_path / "photos"


def inverted(run, *arguments, world_size=1):
    (code, said), *_ = run_ranks(command, world_size, "invert", run, *arguments)
    assert code == 0, said
    return said


def test_a_folder_is_inverted_into_a_grid_arrays_and_a_line_a_picture(run, photos):
    lines = inverted(run, "photos", "--steps", 7).splitlines()
    with np.load("inverted.npz") as arrays:
        found = dict(arrays)
    assert found["files"].tolist() == ["photos/a.png", "photos/b.jpg", "photos/more/c.png"]
    assert (found["noise"].shape, found["noise"].dtype) == ((3, 1, 8, 8), np.float32)
    assert found["images"].shape == found["reconstructions"].shape == (3, 8, 8, 1)
    assert found["labels"].tolist() == [10, 10, 10]  # no class
    np.testing.assert_array_equal(found["images"][0, :, :, 0], np.asarray(Image.open("photos/a.png")))
    assert len(lines) == 4
    for line, name, picture, redrawn, x_T in zip(
        lines, *(found[key] for key in ("files", "images", "reconstructions", "noise")), strict=False
    ):
        psnr = 10 * math.log10(255**2 / np.mean((picture.astype(float) - redrawn) ** 2))
        assert line.startswith(
            f"{name}: PSNR {psnr:.2f} dB, x_T mean {x_T.mean():.3f}, std {x_T.std():.3f}, max |x_T| "
        )
    assert lines[3].startswith("3 pictures in inverted.png and inverted.npz: PSNR ")
    grid = np.asarray(Image.open("inverted.png"))[::4, ::4]  # each pixel four wide
    assert grid.shape == (2 * 9 - 1, 2 * (1 + 8 + 1 + 8 + 1 + 1) - 1)
    np.testing.assert_array_equal(grid[:8, 1:9], found["images"][0, :, :, 0])
    np.testing.assert_array_equal(grid[:8, 10:18], found["reconstructions"][0, :, :, 0])


def test_the_noise_is_what_plain_ddim_without_guidance_draws_the_reconstruction_from(run, photos):
    """Whatever the run's own sampler and guidance: here dpmpp_2m and 2."""
    inverted(run, "photos/a.png", "--label", 3, "--steps", 6, "--out", "one.npz")
    loaded = dtrain.load(run)
    with np.load("one.npz") as arrays:
        noise, redrawn = torch.from_numpy(arrays["noise"]), arrays["reconstructions"]
        picture = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)

    @torch.no_grad()
    def denoiser(x, t):
        return loaded.model(x, t, torch.tensor([3]))

    timesteps = loaded.process.walk(6, "trailing")
    torch.testing.assert_close(encode(denoiser, loaded.process, normalize(picture), timesteps), noise)
    x_0 = quantize(sample(denoiser, loaded.process, noise, "ddim", 6)).permute(0, 2, 3, 1)
    assert np.abs(x_0.numpy().astype(int) - redrawn).max() <= 1


def test_ranks_and_python_give_what_one_rank_gives(run, photos):
    for number in range(20):  # more than a block of 12
        Image.open("photos/a.png").rotate(18 * number).save(f"photos/{number:02}.png")
    inverted(run, "photos", "--label", 4, "--steps", 3, "--out", "ranks", world_size=2)
    assert not Path("ranks").exists()
    found = dtrain.load(run).invert("photos", labels="4", steps=3)
    with np.load("ranks.npz") as arrays:
        np.testing.assert_array_equal(arrays["images"], found.images)
        np.testing.assert_array_equal(arrays["labels"], found.labels)
        np.testing.assert_allclose(arrays["noise"], found.noise, atol=1e-4)
    assert found.psnr.shape == (23,)
    again = dtrain.load(run).invert(found.images, labels=[4] * 23, steps=3)
    np.testing.assert_array_equal(again.noise, found.noise)


def test_other_weights_find_other_noise(run, photos):
    for out, which in (("ema", []), ("raw", ["--raw"])):
        inverted(run, "photos/a.png", "--steps", 3, "--out", out, *which)
    with np.load("ema.npz") as ema, np.load("raw.npz") as raw:
        assert np.abs(ema["noise"] - raw["noise"]).max() > 1e-3


def test_mistakes_are_one_line_and_write_nothing(run, photos):
    (photos / "broken.png").write_bytes((photos / "a.png").read_bytes()[:60])
    Path("empty").mkdir()
    before = sorted(Path().rglob("*"))
    for arguments, message in (
        (["photos", "--guidance", 2], "--guidance 2: pictures are inverted with guidance 1 alone; leave it out"),
        (["nowhere.png"], "cannot read the picture nowhere.png: No such file or directory"),
        (["photos/notes.txt"], "the picture photos/notes.txt"),
        (["photos/broken.png"], "the picture photos/broken.png"),
        (["empty"], "empty holds no .jpg, .jpeg, .png or .webp files; name another folder"),
        (["photos/a.png", "--label", 10], "has 10 classes, counted from 0"),
        (["photos/a.png", "--out", "no/where"], "there is no folder"),
        (["photos/a.png", "--out", "photos/a.npz"], "would overwrite photos/a.png, one of the pictures to invert"),
    ):
        assert message in failing("invert", run, *arguments)
    assert sorted(Path().rglob("*")) == before


def test_what_python_is_given_wrong_is_said(run, photos):
    loaded = dtrain.load(run)
    for pictures, labels, message in (
        (np.zeros((2, 8, 8, 3), np.uint8), None, r"are uint8 \(n, height, width, 1\), not uint8 \[2, 8, 8, 3\]"),
        (np.zeros((2, 8, 8, 1)), None, r"not float64 \[2, 8, 8, 1\]"),
        (np.zeros((2, 8, 8, 1), np.uint8), [1], "there are 1 labels for 2 images"),
        ([], None, "there are no pictures; name files"),
    ):
        with pytest.raises(UserError, match=message):
            loaded.invert(pictures, labels)


def test_a_model_that_never_went_without_a_class_needs_one():
    with pytest.raises(UserError, match=r"diffusion\.label_dropout 0 .* --label"):
        without_class(3, num_classes=10, label_dropout=0.0)
    assert without_class(2, num_classes=0, label_dropout=0.0).tolist() == [0, 0]
