from pathlib import Path

import pytest

from dtrain.config import flat, identity, load, load_kept
from dtrain.data.shards.manifest import load_all
from dtrain.errors import UserError
from dtrain.training.check import check_source

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
DIGITS = CONFIGS[0].parent / "digits-dit.yaml"


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid_and_its_dump_reads_back_as_itself(path, tmp_path, monkeypatch):
    monkeypatch.setenv("DTRAIN_CIFAR10", "/photographs")
    config = load(path)
    assert config.run.name == {"digits-dit": "digits"}.get(path.stem, path.stem)
    (tmp_path / "config.yaml").write_text(config.dump())
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("modle.depth=3", "unknown key `modle` on the command line; did you mean `model`?"),
        ("model.dept=3", "unknown key `model.dept` on the command line; did you mean `model.depth`?"),
        ("ema.0.deca=0.9", "unknown key `ema.0.deca` on the command line; did you mean `ema.0.decay`?"),
        ("model.depth=four", "`model.depth` on the command line is 'four': input should be a valid integer"),
        ("train.steps=-1", "`train.steps` on the command line is -1: input should be greater than 0"),
        ("train.steps=nan", "`train.steps` on the command line is 'nan'"),
        ("ema.3.decay=0.9", "`ema` is a list of 1"),
        ("run.name.x=1", "`run.name` has no keys below it"),
        ("train.steps", "override 'train.steps' is not of the form key.sub=value"),
        ("run.name=../up", "`run.name` on the command line is '../up'"),
        ("eval.ema=1", "eval.ema is 1, but there are 1 EMA profiles"),
        ("eval.steps=1001", "eval.steps 1001 exceeds diffusion.timesteps 1000"),
        ("data.image_size=9", "data.image_size 9 does not divide into patches of 2"),
        ("model={name: dit, size: S/4, patch: 3}", "data.image_size 8 does not divide into patches of 3"),
        ("model={name: dit, size: S/2, heads: 7}", "width 384 must be an even multiple of heads 7"),
        ("model={name: dit, size: S/2, width: 100}", "width 100 must be an even multiple of heads 6"),
        ("data.holdout=null", "eval.every needs data.holdout"),
    ],
)
def test_a_mistake_is_told_in_one_line_with_its_origin(override, message):
    tree = ["run.name=x"] if override.startswith("run.name.x") else []
    with pytest.raises(UserError) as error:
        load(DIGITS, [*tree, override])
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_mistake_in_the_file_names_the_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text(DIGITS.read_text().replace("depth: 4", "depth: deep"))
    with pytest.raises(UserError, match=r"`model.depth` in .*mine.yaml is 'deep'"):
        load(file)
    with pytest.raises(UserError, match=r"cannot read the config .*absent.yaml: No such file"):
        load(tmp_path / "absent.yaml")
    file.write_text("data: [unclosed")
    with pytest.raises(UserError, match=r"mine.yaml:1 is not valid YAML"):
        load(file)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("11:45:00", "11:45:00"),
        ("2-00:00:00", "2-00:00:00"),
        ("2026-11-27T10:00:00", "2026-11-27T10:00:00"),
        ("2026-11-27", "2026-11-27"),
    ],
)
def test_a_time_is_what_was_written(tmp_path, text, value):
    assert load(DIGITS, [f"train.deadline={text}"]).train.deadline == value
    file = tmp_path / "mine.yaml"
    file.write_text(DIGITS.read_text().replace("train:\n", f"train:\n  deadline: {text}\n"))
    assert load(file).train.deadline == value
    file.write_text(load(file).dump())
    assert load(file).train.deadline == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E3", 1000.0),
        ("2.5e-3", 0.0025),
        (".5", 0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("0x10", 16),
        ("010", 8),
    ],
)
def test_a_number_is_one_however_it_is_written(text, value):
    assert load(DIGITS, [f"optim.lr={text}"]).optim.lr == value


def test_an_environment_variable_stands_in_for_a_path(tmp_path, monkeypatch):
    file = tmp_path / "mine.yaml"
    file.write_text(DIGITS.read_text().replace("data/digits/train", "${SCRATCH}/digits"))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    assert load(file).data.shards == "/scratch/me/digits"
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(UserError, match="SCRATCH is not set"):
        load(file)


def test_numbers_like_1e_minus_4_are_numbers():
    assert load(DIGITS, ["optim.lr=1e-4"]).optim.lr == 1e-4


def test_identity_holds_what_makes_the_run_and_nothing_free():
    keys = identity(load(DIGITS))
    assert {
        "run.seed",
        "run.generator",
        "data.streams",
        "data.image_size",
        "model.depth",
        "diffusion.timesteps",
    } <= keys.keys()
    free = (
        "train.",
        "deepspeed.",
        "eval.",
        "tracking.",
        "optim.",
        "ema",
        "data.workers",
        "data.batch_size",
        "data.shards",
    )
    assert [k for k in keys if k.startswith(free)] == ["optim.name"]  # what the moments in a checkpoint are
    assert identity(load(DIGITS, ["train.steps=5", "optim.lr=1", "data.batch_size=2"])) == keys
    assert identity(load(DIGITS, ["model.depth=5"])) != keys


def test_flat_gives_one_line_a_key():
    values = flat(load(DIGITS).model_dump(mode="json"))
    assert values["data.batch_size"] == 128
    assert values["ema"] == "[{decay: 0.995}]"


CONFIG = CONFIGS[0].with_name("digits-dit.yaml")
PLACES = ["run.dir", "run.init_from", "data.shards", "data.manifest", "data.holdout", "data.holdout_shards"]
PLACES += ["data.cache_dir", "eval.weights", "eval.reference", "eval.features"]


@pytest.mark.parametrize("key", PLACES)
def test_a_tilde_is_the_home_of_whoever_starts_and_no_folder(key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    overrides = [f"{key}=~/there.pt"] + (["data.holdout=x"] if key == "data.holdout_shards" else [])
    section, _, name = key.partition(".")
    assert getattr(getattr(load(CONFIG, overrides), section), name) == "/home/somebody/there.pt"
    assert getattr(getattr(load(CONFIG, [*overrides, f"{key}=a~b.pt"]), section), name) == "a~b.pt"


def test_a_mixed_in_source_may_lie_at_home_too(monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    config = load(CONFIG, ["data.mix=[{name: a, shards: ~/a, manifest: ~/a.json, weight: 1}]"])
    assert (config.data.mix[0].shards, config.data.mix[0].manifest) == ("/home/somebody/a", "/home/somebody/a.json")


def test_a_name_that_no_file_system_takes_is_refused():
    with pytest.raises(UserError, match=r"`run.name` .* at most 255 characters"):
        load(CONFIG, ["run.name=" + "a" * 300])


def test_a_relative_path_that_is_not_there_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for key, overrides in (("manifest here/train", []), ("such file", ["run.init_from=weights.pt"])):
        config = load(CONFIG, ["data.shards=here/train", *overrides])
        with pytest.raises(UserError, match=rf"there is no {key}.* \(looked for from {tmp_path}\)"):
            check_source(config) if overrides else load_all(config.data)
    with pytest.raises(UserError) as error:
        load_all(load(CONFIG, [f"data.shards={tmp_path}/train"]).data)
    assert "looked for from" not in str(error.value)


def test_an_empty_config_says_that_init_may_not_have_finished(tmp_path):
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(
        UserError, match=r"mine.yaml is empty; where `dtrain init` was to write it, that did not finish"
    ):
        load(tmp_path / "mine.yaml")


def test_what_a_secret_variable_gave_is_kept_as_the_variable(tmp_path, monkeypatch):
    monkeypatch.setenv("API_TOKEN", "t0ken-0f-a-team")
    monkeypatch.setenv("NUMBER", "12345678")
    given = tmp_path / "mine.yaml"
    given.write_text(DIGITS.read_text())
    config = load(given, ["data.shards=https://host/${API_TOKEN}/${NUMBER}", "data.manifest=m.json"])
    assert config.data.shards == "https://host/t0ken-0f-a-team/12345678"
    (tmp_path / "config.yaml").write_text(config.dump())
    assert "https://host/${API_TOKEN}/12345678" in config.dump()
    assert load_kept(tmp_path / "config.yaml").data.shards == config.data.shards
    with pytest.raises(UserError, match=r"no shard https://host/\$\{API_TOKEN\}/1"):
        raise UserError("there is no shard https://host/t0ken-0f-a-team/1")
    monkeypatch.delenv("API_TOKEN")
    assert load_kept(tmp_path / "config.yaml").data.shards == "https://host/${API_TOKEN}/12345678"
    with pytest.raises(
        UserError, match=r"no shard https://host/\$\{API_TOKEN\}/1; set API_TOKEN in the environment, "
    ) as e:
        raise UserError(str(UserError("there is no shard https://host/${API_TOKEN}/1")))
    assert str(e.value).count("set API_TOKEN") == 1
    monkeypatch.setenv("API_TOKEN", "t0ken-0f-a-team")
    assert str(UserError("no ${API_TOKEN}")) == "no ${API_TOKEN}"


def test_a_run_that_names_a_missing_variable_says_to_set_it(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_SECRET", f"{tmp_path}-hidden/x")
    config = load(CONFIG, ["data.shards=${DATA_SECRET}/shards"])
    (tmp_path / "config.yaml").write_text(config.dump())
    monkeypatch.delenv("DATA_SECRET")
    with pytest.raises(
        UserError, match=r"there is no manifest \$\{DATA_SECRET\}/.*; set DATA_SECRET in the environment"
    ):
        load_all(load_kept(tmp_path / "config.yaml").data)


@pytest.mark.parametrize("name", ["TOKENS_DIR", "SSH_KEY_PATH", "CREDENTIALS_FILE", "SECRET_HOME", "SECRET_STORE"])
def test_where_secrets_lie_is_none(tmp_path, monkeypatch, name):
    place = tmp_path / "shards"
    if name == "SECRET_STORE":
        place.mkdir()  # any name, where it is a folder here
    monkeypatch.setenv(name, str(place))
    config = load(CONFIG, [f"data.shards=${{{name}}}/train"])
    (tmp_path / "config.yaml").write_text(config.dump())
    monkeypatch.delenv(name)
    assert load_kept(tmp_path / "config.yaml").data.shards == f"{place}/train"


def test_pipe_within_a_path_or_a_name_is_no_command(tmp_path):
    given = {"data.shards": "/scratch/pipe:old/shards", "tracking.experiment": "data-pipe:v2"}
    config = load(CONFIG, [f"{key}='{value}'" for key, value in given.items()])
    (tmp_path / "config.yaml").write_text(config.dump())
    kept = load_kept(tmp_path / "config.yaml")
    assert (kept.data.shards, kept.tracking.experiment) == tuple(given.values())
    assert (
        "secret" not in load(CONFIG, ["data.shards='pipe:secret x'", "data.manifest=m", "data.allow_pipe=true"]).dump()
    )
