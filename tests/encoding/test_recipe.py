"""configs/t2i-256-dit.yaml: the commands at its head make what it trains on, and it starts there."""

import re
import shlex
from pathlib import Path

import pytest

from dtrain.config import load
from dtrain.training.check import check_start
from tests.command_line import command
from tests.conditions.encoder_folders import written
from tests.data.shard_files import picture
from tests.first_stage.folders import save_kl
from tests.ranks import run_ranks

pytest.importorskip("transformers")

RECIPE = Path(__file__).parents[2] / "configs" / "t2i-256-dit.yaml"


def test_the_recipe_starts_on_what_the_commands_at_its_head_make(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "IMAGES").mkdir()
    for number in range(7):
        (tmp_path / "IMAGES" / f"{number}.png").write_bytes(picture(number))
        (tmp_path / "IMAGES" / f"{number}.txt").write_text("the digit nine left of " * number)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    save_kl(
        tmp_path / "vae", in_channels=3, out_channels=3, block_out_channels=(2, 2, 4, 4), norm_num_groups=2, **blocks
    )
    t5 = written("t5", tmp_path / "t5")
    written("clip model", tmp_path / "clip")
    head = [line[4:].strip() for line in RECIPE.read_text().splitlines() if re.match(r"#   \w", line)]
    pack, latents, words, train = head
    small = ("--block=2", "--size=64")
    for line, folder, more in ((pack, "", ("--holdout=2",)), (latents, tmp_path / "vae", small), (words, t5, small)):
        _, script, *given = shlex.split(line.replace("FOLDER", str(folder)))
        ((code, said),) = run_ranks(command, 1, Path(script).stem, *given, *more)
        assert code == 0, said
    places = ("vae", "t5", "clip")
    named = [f"{key}={tmp_path / place}" for key, place in zip(re.findall(r"(\S+)=FOLDER", train), places, strict=True)]
    here = ("data.image_size=64", "data.batch_size=4", "first_stage.block=2", "conditions.text.block=2")
    other = ("conditions.text.width=null", "eval.features=effnet_lite0", f"run.dir={tmp_path}")
    said = check_start(load(RECIPE, [*named, *here, *other]), 2)
    assert "starts: 400,000 steps of 4 images from 5" in said
    assert re.search(r"[45] captions of txt are cached for conditions.text", said)
