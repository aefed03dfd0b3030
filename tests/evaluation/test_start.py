"""Samples that begin at pictures: `dtrain sample --from`, with and without a mask, and the same in Python."""

import numpy as np
import pytest
import torch
from PIL import Image

import dtrain
from dtrain.errors import UserError
from dtrain.evaluation.start import Start
from tests.command_line import command, failing
from tests.ranks import run_ranks
from tests.training.runs import copied


@pytest.fixture(scope="module")
def run(digits, finished_run, tmp_path_factory):
    return copied(finished_run, digits, tmp_path_factory.mktemp("runs")).run.path


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    """Three pictures and a mask whose right half is white."""
    monkeypatch.chdir(tmp_path)
    arrays = np.random.default_rng(0).integers(0, 256, (3, 8, 8), np.uint8)
    (tmp_path / "given").mkdir()
    for number, array in enumerate(arrays):
        Image.fromarray(array).save(tmp_path / "given" / f"{number}.png")
    half = np.zeros((8, 8), np.uint8)
    half[:, 4:] = 255
    Image.fromarray(half).save(tmp_path / "mask.png")
    return arrays


def sampled(run, *arguments, world_size=1):
    code, said = run_ranks(
        command, world_size, "sample", run, "--steps", 10, "--label", 3, "--out", "out.npz", *arguments
    )[0]
    assert code == 0, said
    with np.load("out.npz") as arrays:
        return arrays["images"][..., 0].astype(int)


def test_the_less_is_walked_the_nearer_samples_stay_to_their_pictures(run, pictures):
    away = [
        np.abs(sampled(run, "--from", "given", "--strength", strength) - pictures).mean()
        for strength in (0.1, 0.4, 0.9)
    ]
    assert len(sampled(run, "--from", "given")) == 3
    assert away[0] < 0.5 * away[1] < away[2]


def test_what_a_mask_keeps_is_the_pictures_own_on_any_number_of_ranks_and_in_python(run, pictures):
    arguments = ("--from", "given", "--mask", "mask.png", "-n", 6, "--seed", 5)
    one, two = sampled(run, *arguments), sampled(run, *arguments, world_size=2)
    assert np.array_equal(one, two)
    assert np.array_equal(one[:, :, :4], np.concatenate([pictures, pictures])[:, :, :4])
    assert np.abs(one[0, :, 4:] - one[3, :, 4:]).max() > 0  # another id, another noise
    again = dtrain.load(run).sample(6, 3, begin="given", mask="mask.png", steps=10, seed=5)[..., 0]
    assert np.abs(one - again).max() <= 1


def test_in_latents_a_mask_is_of_all_that_a_latent_covers():
    images = torch.zeros(1, 1, 8, 8, dtype=torch.uint8)
    anew = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    anew[0, 0, 5, 2] = True
    start, known = Start(images, 1.0, anew), torch.ones(1, 4, 2, 2)
    answer = start.keeping(lambda x, t: x, known)(torch.zeros(1, 4, 2, 2), torch.zeros(1))
    assert answer.anew.flatten().tolist() == [False, False, True, False]
    drawn = torch.full((1, 1, 8, 8), 9, dtype=torch.uint8)
    assert start.kept(drawn).sum() == 9


def test_what_cannot_be_is_one_line(run, pictures):
    assert "name them with --from" in failing("sample", run, "--strength", 0.5)
    assert "strength 1 begins at pure noise" in failing("sample", run, "--from", "given", "--strength", 1)
    assert "no share of the walk" in failing("sample", run, "--from", "given", "--strength", 1.5)
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("black.png")
    assert "give one with --mask" in failing("sample", run, "--from", "given", "--repeats", 3)
    assert "black everywhere" in failing("sample", run, "--from", "given", "--mask", "black.png")
    with pytest.raises(UserError, match="name them with --from"):
        dtrain.load(run).sample(1, mask="mask.png")
