"""200 seeded damages of a run's newest checkpoint: found before a weight is used, the older one taken, ranks agree."""

import shutil

import numpy as np
import pytest

from dtrain.checkpoint.directory import complete
from tests.digits import losses, tiny
from tests.longer import longer
from tests.ranks import run_ranks
from tests.training.players import build_player
from tests.training.runs import train, train_saying_into, trained

SEED, DAMAGES = 0, 200
KINDS = ("flip", "truncate", "delete", "exchange", "stale")


def damage(checkpoint, other, rng) -> str:
    """One damage of a random kind at a random place; `other` is an older checkpoint of the same run."""
    files = sorted(p.name for p in checkpoint.iterdir())
    kind, victim = KINDS[rng.integers(len(KINDS))], checkpoint / files[rng.integers(len(files))]
    data = bytearray(victim.read_bytes())
    if kind == "flip":
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        victim.write_bytes(data)
    elif kind == "truncate":
        victim.write_bytes(data[: rng.integers(len(data))])
    elif kind == "delete":
        victim.unlink()
    elif kind == "exchange":
        suffix = ("json", "safetensors")[rng.integers(2)]
        one, two = checkpoint / f"rank-00000.{suffix}", checkpoint / f"rank-00001.{suffix}"
        swapped = two.read_bytes(), one.read_bytes()
        one.write_bytes(swapped[0])
        two.write_bytes(swapped[1])
    else:  # a file of the older checkpoint
        names = [n for n in files if n.endswith("safetensors")]
        victim = checkpoint / names[rng.integers(len(names))]
        victim.write_bytes((other / victim.name).read_bytes())
    return f"{kind} {victim.name}"


def resumed_from(configs):
    """On a rank: the step each run's directory resumes at, or the error."""
    from dtrain.objectives.build import build
    from dtrain.run import RunDirectory
    from dtrain.training.players import Players
    from dtrain.training.start import resume

    engine = build_player(configs[0])
    built = build(configs[0])
    return [resume(Players([engine]), built, RunDirectory(config.run.path), config).step for config in configs]


def test_every_damage_is_found_and_the_older_checkpoint_taken(digits, tmp_path):
    config = tiny(digits, tmp_path / "whole", "train.steps=10", "train.checkpoint_every=5")
    run_ranks(train, 2, config)
    rng, configs, told = np.random.default_rng(SEED), [], []
    for trial in range(DAMAGES):
        copy = tiny(digits, tmp_path / str(trial), "train.steps=10")
        shutil.copytree(config.run.path, copy.run.path)
        older, newest = complete(copy.run.path / "checkpoints")
        told.append(damage(newest, older, rng))
        configs.append(copy)
    results = run_ranks(resumed_from, 3, configs, timeout=600)
    assert results[0] == results[1] == results[2]
    assert [(told[i], step) for i, step in enumerate(results[0]) if step != 5] == []


@pytest.mark.parametrize("overrides", [longer(["run.seed=5"]), ["model.qk_norm=true", "model.frequency_shift=0"]])
def test_a_checkpoint_of_another_run_in_this_runs_folder_is_passed_over_by_name(digits, tmp_path, overrides):
    own = ("train.steps=10", "train.checkpoint_every=5")
    whole = trained(tiny(digits, tmp_path / "whole", "train.steps=12"), 1)
    config = tiny(digits, tmp_path / "own", *own)
    trained(config, 1)
    other = tiny(digits, tmp_path / "other", "train.steps=11", *overrides)
    trained(other, 1)
    shutil.copytree(other.run.path / "checkpoints/step-00000011", config.run.path / "checkpoints/step-00000011")
    said = tmp_path / "said"
    run_ranks(train_saying_into, 1, tiny(digits, tmp_path / "own", "train.steps=12"), said)
    assert "skipping a checkpoint that cannot be used" in said.read_text()
    assert "step-00000011 is of another run: " in said.read_text()
    assert losses(config) == whole
