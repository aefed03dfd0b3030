"""Names from configs, manifests and users are no paths."""

import json

import pytest

from dtrain.config import load
from dtrain.data.shards.manifest import load as load_manifest
from dtrain.errors import UserError
from dtrain.files import as_file_name
from tests.digits import CONFIG


@pytest.mark.parametrize(
    "name", ["..", ".", "a/b", "/etc/x", "../x", "", "x" * 101, "é" * 51, "a\nb", "a\0b", " ", "a:b", "模" * 60]
)
def test_a_name_that_a_file_cannot_have_becomes_one_that_it_can(name, tmp_path):
    found = as_file_name(name)
    (tmp_path / found).mkdir()
    assert [p.name for p in tmp_path.iterdir()] == [found]
    assert found != name
    assert found not in (as_file_name(name + "x"), as_file_name(name.replace("/", "_") + " "))
    assert len(found.encode()) <= 100


@pytest.mark.parametrize("name", ["digits", "my experiment.2", "día", ".hidden", "..x", "x" * 100])
def test_a_name_that_a_file_can_have_stays_as_it_is(name):
    assert as_file_name(name) == name


@pytest.mark.parametrize("name", [".", "..", "..."])
def test_a_run_is_not_called_like_a_place(name):
    with pytest.raises(UserError, match=r"`run\.name` on the command line: '\.+' is a place and no name"):
        load(CONFIG, [f"run.name='{name}'"])


@pytest.mark.parametrize("name", ["../train-000000.tar", "/etc/passwd", "a/../../b.tar", "", "a\0b"])
@pytest.mark.parametrize("part", ["shard", "side"])
def test_a_manifest_that_leads_out_of_its_folder_is_refused(digits, tmp_path, name, part):
    tree = json.loads((digits / "train" / "manifest.json").read_text())
    if part == "shard":
        tree["shards"][1]["name"] = name
    else:
        tree["members"]["file"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"is not a manifest \((shards\.1\.name|members\.file): ") as met:
        load_manifest(tmp_path / "manifest.json")
    assert "\n" not in str(met.value)
