"""Training on a latent cache: the losses of encoding online, bit for bit, and no cache but the right one."""

import itertools
import json
import shlex
import shutil

import pytest

from dtrain.config import Config
from dtrain.errors import UserError
from dtrain.training.check import check_start
from tests.command_line import command, failing
from tests.digits import losses
from tests.first_stage.caches import encoded, pictures
from tests.first_stage.folders import latent, save_kl
from tests.ranks import run_ranks
from tests.training.runs import trained

ONLINE, CACHED = (), ("first_stage.cached=true",)


@pytest.fixture(scope="module")
def place(tmp_path_factory, autoencoder):
    """A folder with pictures in train/, their caches, and statistics.json."""
    folder = tmp_path_factory.mktemp("place")
    shards = pictures(folder / "train")
    for name, request in (
        ("cache", {"mirrors": True}),
        ("half", {"mirrors": True, "dtype": "float16"}),
        ("plain", {}),
        ("bf16", {"mirrors": True, "precision": "bf16"}),
        ("blocks", {"mirrors": True, "block": 2}),
        ("large", {"mirrors": True, "size": 16}),
    ):
        encoded(shards, folder / name, autoencoder, 2, **request)
    shutil.copytree(folder / "cache", folder / "unit")
    manifest = (folder / "unit" / "manifest.json").read_text()
    made = json.loads(manifest) | {"latents": json.loads(manifest)["latents"] | {"range": [0.0, 1.0]}}
    (folder / "unit" / "manifest.json").write_text(json.dumps(made))
    encoded(pictures(folder / "others", first=200), folder / "of-others", autoencoder, mirrors=True)
    encoded(shards, folder / "statistics.json", autoencoder, statistics_only=True, mirrors=True)
    encoded(shards, folder / "unmirrored.json", autoencoder, statistics_only=True)
    encoded(folder / "others", folder / "others.json", autoencoder, statistics_only=True, mirrors=True)
    return folder


def config_of(place, folder, source, shards, *overrides) -> Config:
    keys = (f"data.shards={place / shards}", "data.holdout=null", "data.flip=true", "train.steps=12")
    return latent(place, folder, source, *keys, *overrides)


def said_of(config, ranks=2):
    """What `--check` says of it."""
    (said,) = run_ranks(checked, 1, config, ranks)
    return said


def checked(config, ranks):
    try:
        return check_start(config, ranks)
    except UserError as e:
        return str(e)


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (2, 2)])
def test_cached_and_online_training_have_the_same_losses_bit_for_bit(tmp_path, place, autoencoder, stage, ranks):
    same_losses(tmp_path, place, autoencoder, stage, ranks, steps=8)


@pytest.mark.campaign
@pytest.mark.parametrize(("stage", "ranks"), itertools.product((0, 1, 2, 3), (1, 2)))
def test_cached_and_online_training_have_the_same_losses_over_50_steps(tmp_path, place, autoencoder, stage, ranks):
    same_losses(tmp_path, place, autoencoder, stage, ranks, steps=50)


def same_losses(tmp_path, place, autoencoder, stage, ranks, steps):
    """In both normalisations; with mirrors, and over several epochs where there are steps for them."""
    found = {}
    for normalise, (name, way) in itertools.product(
        ("published", "dataset"), {"online": ("train", ONLINE), "cached": ("cache", CACHED)}.items()
    ):
        shards, keys = way
        statistics = normalise == "dataset" and name == "online"
        overrides = (
            *(f"deepspeed.zero_stage={stage}", f"train.steps={steps}", f"run.name={name}-{normalise}"),
            *(f"first_stage.normalise={normalise}", *keys),
            *([f"first_stage.statistics={place / 'statistics.json'}"] if statistics else []),
        )
        config = config_of(place, tmp_path, autoencoder, shards, *overrides)
        found[normalise, name] = trained(config, ranks)
        assert len(found[normalise, name]) == steps
    for normalise in ("published", "dataset"):
        assert found[normalise, "online"] == found[normalise, "cached"]
    assert found["published", "online"] != found["dataset", "online"]


def test_a_cache_of_float16_trains_within_two_thousandths(tmp_path, place, autoencoder):
    similar_losses(tmp_path, place, autoencoder, 2, 1, steps=12)


@pytest.mark.campaign
@pytest.mark.parametrize(("stage", "ranks"), itertools.product((0, 1, 2, 3), (1, 2)))
def test_a_cache_of_float16_trains_within_two_thousandths_over_50_steps(tmp_path, place, autoencoder, stage, ranks):
    similar_losses(tmp_path, place, autoencoder, stage, ranks, steps=50)


def similar_losses(tmp_path, place, autoencoder, stage, ranks, steps):
    """Of a cache in float16, and of one in float32."""
    whole, half = (
        trained(
            config_of(
                *(place, tmp_path, autoencoder, cache, *CACHED, f"run.name={cache}"),
                *(f"deepspeed.zero_stage={stage}", f"train.steps={steps}"),
            ),
            ranks,
        )
        for cache in ("cache", "half")
    )
    assert len(half) == steps
    assert half != whole
    assert half == pytest.approx(whole, rel=2e-3)


def test_data_are_checked_before_the_first_step(tmp_path, place, autoencoder):
    config = config_of(place, tmp_path, autoencoder, "cache", *CACHED)
    assert "starts: 12 steps of 24 images from 84" in said_of(config)


def changed(place, tmp_path, autoencoder, what):
    """(the folder, overrides, words of the refusal)."""
    other = tmp_path / "vae"
    shutil.copytree(autoencoder, other)
    if what == "config":
        (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    if what == "weights":
        file = other / "diffusion_pytorch_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(bytes(content))
    return other


REFUSED = {
    "a changed byte of the weights": ("weights", "cache", CACHED, "an autoencoder whose weights have sha256"),
    "a changed byte of config.json": ("config", "cache", CACHED, "an autoencoder whose config.json has sha256"),
    "another size": (None, "large", CACHED, "pictures of size 16, and data.image_size has 8"),
    "another precision": (None, "bf16", CACHED, "precision bf16, and first_stage.precision has fp32"),
    "another block": (None, "blocks", CACHED, "blocks of 2, and first_stage.block has 1"),
    "another scaling": (None, "cache", (*CACHED, "data.scaling=adm"), "scaling bicubic, and data.scaling has adm"),
    "another crop": (None, "cache", (*CACHED, "data.crop=random"), "a cache holds one crop of each picture"),
    "another range": (None, "unit", CACHED, "pixels in [0.0, 1.0], and what the autoencoder is given has [-1.0, 1.0]"),
    "EXIF ignored": (None, "cache", (*CACHED, "data.exif=ignore"), "exif apply, and data.exif has ignore"),
    "no mirrors": (None, "plain", CACHED, "of pictures without their mirrors"),
    "pictures": (None, "train", CACHED, "is of no latent cache; make one with: dtrain encode"),
    "a cache taken for pictures": (None, "cache", ONLINE, "is a latent cache and holds no pictures"),
    "a mixture with another": (
        None,
        "cache",
        (*CACHED, "data.mix=[{name: b, shards: large, weight: 1}]"),
        "pictures of size 16",
    ),
    "no statistics": (
        None,
        "train",
        ("first_stage.normalise=dataset",),
        "make them with: dtrain encode",
    ),
    "statistics of other data": (
        None,
        "train",
        ("first_stage.normalise=dataset", "first_stage.statistics=others.json"),
        "is of another data set than",
    ),
    "statistics without mirrors": (
        None,
        "train",
        ("first_stage.normalise=dataset", "first_stage.statistics=unmirrored.json"),
        "of pictures without their mirrors",
    ),
    "statistics that are none": (
        None,
        "train",
        ("first_stage.normalise=dataset", "first_stage.statistics=train/manifest.json"),
        "holds no statistics",
    ),
}


@pytest.mark.campaign
@pytest.mark.parametrize(("name", "ranks"), itertools.product(REFUSED, (1, 2)))
def test_no_other_cache_or_statistics_begin_a_training(monkeypatch, tmp_path, place, autoencoder, name, ranks):
    refused(monkeypatch, tmp_path, place, autoencoder, name, ranks)


def test_a_changed_byte_begins_no_training(monkeypatch, tmp_path, place, autoencoder):
    refused(monkeypatch, tmp_path, place, autoencoder, "a changed byte of the weights", 2)


def refused(monkeypatch, tmp_path, place, autoencoder, name, ranks):
    """By `dtrain train` in one line and exit code 2, before a run is there."""
    what, shards, overrides, words = REFUSED[name]
    monkeypatch.chdir(place)
    config = config_of(place, tmp_path, autoencoder, "cache")
    (tmp_path / "latent.yaml").write_text(config.dump())
    folder = changed(place, tmp_path, autoencoder, what)
    given = (f"first_stage.source={folder}", f"data.shards={shards}", *overrides)
    assert words in failing("train", tmp_path / "latent.yaml", *given, world_size=ranks)
    assert not config.run.path.exists()


@pytest.mark.parametrize("name", REFUSED)
def test_no_other_cache_or_statistics_are_taken(monkeypatch, tmp_path, place, autoencoder, name):
    what, shards, overrides, words = REFUSED[name]
    monkeypatch.chdir(place)
    folder = changed(place, tmp_path, autoencoder, what)
    with pytest.raises(UserError) as e:
        check_start(config_of(place, tmp_path, folder, shards, *overrides), 1)
    assert words in str(e.value)
    assert "\n" not in str(e.value)


def test_the_command_that_a_refusal_names_makes_what_is_missing(monkeypatch, tmp_path, place, autoencoder):
    monkeypatch.chdir(tmp_path)
    config = config_of(place, tmp_path, autoencoder, "train", "first_stage.normalise=dataset")
    with pytest.raises(UserError) as e:
        check_start(config, 1)
    (words,) = [part for part in str(e.value).split("; ") if "dtrain encode" in part]
    ((code, said),) = run_ranks(command, 1, *shlex.split(words.partition("dtrain ")[2]))
    assert code == 0, said
    named = config_of(
        *(place, tmp_path, autoencoder, "train", "first_stage.normalise=dataset"),
        "first_stage.statistics=STATISTICS.json",
    )
    assert "starts: 12 steps" in check_start(named, 1)


def test_a_run_on_one_cache_does_not_go_on_with_another(tmp_path, place, autoencoder):
    trained(config_of(place, tmp_path, autoencoder, "cache", *CACHED, "train.steps=2"), 1)
    said = said_of(config_of(place, tmp_path, autoencoder, "of-others", *CACHED))
    assert "was trained on another data set than" in said
    assert len(losses(config_of(place, tmp_path, autoencoder, "cache"))) == 2


def test_a_cache_whose_latents_are_of_another_scale_is_said_at_the_start(tmp_path, place):
    new = save_kl(tmp_path / "new")
    encoded(place / "train", tmp_path / "cache", new, mirrors=True)
    config = config_of(tmp_path, tmp_path, new, "cache", *CACHED)
    assert "scaling_factor 0.18215 (what every new AutoencoderKL has until another is set)" in said_of(config)


def test_several_caches_are_scaled_as_they_are_mixed(tmp_path, place, autoencoder):
    import numpy as np

    from dtrain.data.shards.manifest import load, load_all
    from dtrain.first_stage.requirements import normalisation

    mix = f"data.mix=[{{name: b, shards: {place / 'of-others'}, weight: 3}}]"
    config = config_of(place, tmp_path, autoencoder, "cache", *CACHED, mix, "first_stage.normalise=dataset")
    found = normalisation(config, load_all(config.data))
    parts = [load(place / name / "manifest.json").latents for name in ("cache", "of-others")]
    rng = np.random.default_rng(0)
    draws = [rng.standard_normal((n, 4)) * p.deviation + p.mean for n, p in zip((250_000, 750_000), parts, strict=True)]
    np.testing.assert_allclose(found.mean, np.concatenate(draws).mean(0), atol=5e-3)
    np.testing.assert_allclose(found.deviation, np.concatenate(draws).std(0), rtol=5e-3)
    assert len(trained(config.model_copy(update={"train": config.train}), 1)) == 12
