"""The configs of published results: the command at the first one's head makes the latents that most train on."""

import re
import shlex
from pathlib import Path

import pytest

from dtrain.config import load
from dtrain.training.check import check_start, warnings
from tests.command_line import command
from tests.data.shard_files import data_set, labelled_pictures
from tests.first_stage.folders import save_kl
from tests.ranks import run_ranks

RECIPES = sorted((Path(__file__).parents[2] / "configs").glob("imagenet256-*.yaml"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Six pictures, an autoencoder of Stable Diffusion's shape, a hundredth as wide, and the cache of the two."""
    folder = tmp_path_factory.mktemp("recipes")
    data_set(folder / "train", labelled_pictures(6), 6)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    save_kl(folder / "vae", in_channels=3, out_channels=3, block_out_channels=(2, 2, 4, 4), norm_num_groups=2, **blocks)
    (printed,) = re.findall(r"launch/encode.py \S+ \S+ --first-stage FOLDER (.*)", (RECIPES[1]).read_text())
    words = ("encode", folder / "train", folder / "latents", "--first-stage", folder / "vae", *shlex.split(printed))
    ((code, said),) = run_ranks(command, 1, *words)
    assert code == 0, said
    return folder


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_starts_on_what_its_head_says_how_to_make(place, tmp_path, path):
    in_latents = "first_stage:" in path.read_text()
    shards = place / ("latents" if in_latents else "train")
    here = (f"data.shards={shards}", f"data.holdout={place / 'train/manifest.json'}", "data.batch_size=4")
    here += (f"run.dir={tmp_path}", *([f"first_stage.source={place / 'vae'}"] if in_latents else []))
    other = ("eval.features=effnet_lite0", "eval.resize=null", "eval.reference=null")  # without Inception
    config = load(path, [*here, *other])
    steps = "400,000" if in_latents else "250,000"
    assert f"starts: {steps} steps of 4 images from 6" in check_start(config, 2)
    assert warnings(config) == []
