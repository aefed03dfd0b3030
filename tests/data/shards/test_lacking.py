"""Samples that a training could not use are counted before it begins: by indexing, by `--check` and by the doctor."""

import io
import shutil
import subprocess
import sys
import tarfile

import pytest

from dtrain.cli import data as commands
from dtrain.cluster import surroundings
from dtrain.data.shards.indexing import index, index_shards
from dtrain.data.shards.lacking import lacking, wrong_labels
from dtrain.data.shards.manifest import load
from dtrain.data.stream import StepDataset
from dtrain.errors import BadSample, UserError
from dtrain.training.check import check_start
from tests.data.shard_files import configuration, data_set, labelled_pictures, picture, write_shards
from tests.digits import tiny

DOTS = "all that follows the first dot of a file's name is its extension"


def samples(count: int = 64, **changed: dict | None) -> list[dict]:
    """Labelled pictures; of `s3` and the like these fields instead, None: no such field."""
    found = labelled_pictures(count)
    for name, fields in changed.items():
        own = found[int(name[1:])] | fields
        found[int(name[1:])] = {field: data for field, data in own.items() if data is not None}
    return found


def rename(folder, old: str, new: str) -> None:
    """A member of the only shard that has it, which webdataset's writer would not name so."""
    for path in folder.glob("*.tar"):
        with tarfile.open(path) as tar:
            members = [(m, tar.extractfile(m).read()) for m in tar]
        with tarfile.open(path, "w") as tar:
            for member, data in members:
                member.name = new if member.name == old else member.name
                tar.addfile(member, io.BytesIO(data))


def config_of(manifest, **data):
    return configuration(manifest.path.parent, 8, **data)


def test_samples_without_a_picture_are_counted_from_the_index_alone(tmp_path):
    manifest = data_set(tmp_path, samples(64, s13={"png": None}, s40={"png": None}))
    expected = f"png in 62 of 64 samples; first without: {tmp_path}/train-000001.tar: 000013.cls"
    assert manifest.remarks == (expected,)
    with pytest.raises(UserError, match=f"manifest.json: {expected}; pack the shards without such, or take data.on"):
        check_start(config_of(manifest), 1)
    few, many = ({"on_error": "replace", "max_bad_fraction": fraction} for fraction in (0.04, 0.02))
    assert f"{expected}; others take their place, by data.on_error" in check_start(config_of(manifest, **few), 1)
    with pytest.raises(UserError, match=r"more than data.max_bad_fraction 0.02 allows, so pack"):
        check_start(config_of(manifest, **many), 1)
    for shard in tmp_path.glob("*.tar"):
        shard.unlink()
    (lack,) = lacking(load(manifest.path), tmp_path, [("jpg", "png")])
    assert (lack.count, lack.of) == (2, 64)
    assert "png in 62 of 64 samples" in str(lack)


def test_a_sample_needs_one_picture_of_any_kind_and_a_label_only_where_there_are_classes(tmp_path):
    mixed = samples(30, s3={"png": None, "jpg": picture(1, form="JPEG")}, s7={"cls": None}, s9={"txt": b"no matter"})
    manifest = data_set(tmp_path, mixed)
    assert manifest.remarks == (f"cls in 29 of 30 samples; first without: {tmp_path}/train-000000.tar: 000007.png",)
    assert "starts" in check_start(config_of(manifest, num_classes=0), 1)
    with pytest.raises(UserError, match=r"cls in 29 of 30 samples; first without: .*000007\.png"):
        check_start(config_of(manifest), 1)


@pytest.mark.parametrize("text", [b"cat", b"-1", b"1.0", b"", b"9" * 19])
def test_labels_that_are_no_numbers_are_named_before_the_first_step(tmp_path, text):
    manifest = data_set(tmp_path, samples(64, s50={"cls": text}, s51={"cls": text}))
    expected = rf"cls is no class number in 2 of 64 samples; first: {tmp_path}/train-000005.tar: 000050.cls holds '"
    (remark,) = manifest.remarks
    assert remark.startswith(expected)
    assert StepDataset(config_of(manifest, num_classes=0), manifest, 0, 1, 0)[0]
    with pytest.raises(
        UserError,
        match=r"labels go from 0 to 2, but cls is none of these in 2 of 64 samples; first: .*0050.cls holds '",
    ):
        check_start(config_of(manifest), 1)


def test_a_label_beyond_the_classes_is_named_before_the_first_step(tmp_path):
    manifest = data_set(tmp_path, samples(20, s4={"cls": b"3"}))
    assert manifest.remarks == ()
    with pytest.raises(UserError) as raised:
        check_start(config_of(manifest), 1)
    assert str(raised.value) == (
        f"{manifest.path}: model.num_classes is 3, so labels go from 0 to 2, but cls is none of these in 1 of 20 "
        f"samples; first: {tmp_path}/train-000000.tar: 000004.cls holds '3', which needs model.num_classes 4 or more; "
        "pack the shards without such, or take data.on_error replace"
    )
    assert "starts" in check_start(config_of(manifest, num_classes=4), 1)


def test_of_many_labels_some_are_looked_at_and_all_are_counted_where_one_of_these_is_wrong(tmp_path, monkeypatch):
    manifest = data_set(tmp_path, samples(64, s2={"cls": b"a"}, s3={"cls": b"b"}, s32={"cls": b"c"}))
    lack = wrong_labels(manifest, tmp_path, 3, most=4)  # 0, 16, 32, 48
    assert (lack.count, lack.of) == (1, 4)
    assert "in 1 of 4 samples looked at; first:" in str(lack)
    monkeypatch.setattr("dtrain.data.fields.check.LOOKED_AT", 4)
    with pytest.raises(UserError, match=r"in 3 of 64 samples; first: .*000002.cls holds 'a'"):
        check_start(config_of(manifest), 1)


def test_a_damaged_label_is_no_wrong_label_so_the_training_begins_and_names_the_damage(tmp_path):
    manifest = data_set(tmp_path, samples(64))
    shard = tmp_path / manifest.shards[0].name
    shard.write_bytes(bytes(255 - byte for byte in shard.read_bytes()))
    assert wrong_labels(manifest, tmp_path, 3) is None
    assert "starts" in check_start(config_of(manifest), 1)
    with pytest.raises(BadSample, match="crc32"):
        StepDataset(config_of(manifest), manifest, 0, 1, 0)[0]


def test_the_rule_of_the_first_dot_is_said_where_it_bites(tmp_path):
    write_shards(tmp_path, samples(20))
    rename(tmp_path, "000004.png", "photo v2.0.png")
    rename(tmp_path, "000004.cls", "photo v2.0.cls")
    manifest = index(str(tmp_path))
    first = f"first without: {tmp_path}/train-000000.tar: photo v2.0"
    assert [remark.partition("; ")[0] for remark in manifest.remarks] == [
        "png in 19 of 20 samples",
        "cls in 19 of 20 samples",
    ]
    for remark, field in zip(manifest.remarks, ("png", "cls"), strict=True):
        assert first in remark
        assert f"which has `0.{field}` instead: {DOTS}" in remark
    dataset = StepDataset(config_of(manifest), manifest, 0, 1, 0)
    with pytest.raises(BadSample, match=rf"without a `cls` label but with a `0.cls`: {DOTS}"):
        dataset._samples[0].read(4, lambda image: image)


def test_a_data_set_of_names_with_dots_alone_says_so_too(tmp_path):
    write_shards(tmp_path, [{"0.png": picture(n), "0.cls": b"1"} for n in range(4)])
    manifest = index(str(tmp_path))
    assert manifest.remarks == (
        f"no sample has a jpg, jpeg, png or webp, but a `0.png`: {DOTS}, so rename files with dots in their names",
    )
    with pytest.raises(UserError, match=f"none of them jpg, jpeg, png or webp; it has `0.png`: {DOTS}"):
        check_start(config_of(manifest), 1)
    write_shards(tmp_path, [{"png": picture(n), "0.cls": b"1"} for n in range(4)])
    with pytest.raises(UserError, match=f"no `cls` field with labels; .* it has `0.cls`: {DOTS}"):
        check_start(config_of(index(str(tmp_path))), 1)


def test_two_photographs_that_the_first_dot_makes_one_sample_are_refused_with_the_rule(tmp_path):
    write_shards(tmp_path, [{"png": picture(n)} for n in range(3)])
    rename(tmp_path, "000000.png", "photo v2.0.png")
    rename(tmp_path, "000002.png", "photo v2.1.png")
    with pytest.raises(UserError, match=f"sample 'photo v2' in two places, the second at photo v2.1.png; .*; {DOTS}"):
        index(str(tmp_path))


def test_a_held_out_split_is_used_whole_and_so_held_to_it(digits, tmp_path):
    holdout = data_set(tmp_path / "holdout", samples(20, s4={"png": None}))
    config = tiny(
        digits, tmp_path, f"data.holdout={holdout.path}", "data.channels=3", "eval.every=5", "eval.features=pixels"
    )
    with pytest.raises(
        UserError, match=r"holdout/manifest.json: png in 19 of 20 samples; .*; every held-out sample is"
    ):
        check_start(config, 1)


def test_the_doctor_and_the_index_command_say_it(tmp_path, capsys):
    write_shards(tmp_path / "shards", samples(64, s13={"png": None}, s20={"cls": b"dog"}))
    commands.index([str(tmp_path / "shards")])
    said = capsys.readouterr().out
    assert "png in 63 of 64 samples; first without: " in said
    assert "cls is no class number in 1 of 64 samples; first: " in said
    config = configuration(tmp_path / "shards", 8)
    found = surroundings.samples(config, full=False)
    assert (found.check, found.status) == ("samples", "bad")
    assert "png in 63 of 64 samples; first without: " in found.found
    found = surroundings.samples(configuration(tmp_path / "shards", 8, on_error="replace", max_bad_fraction=0.1), True)
    assert found.status == "warning"
    assert "png in 63 of 64 samples; first without: " in found.found
    assert found.found.endswith("and 1 more of the kind")


def test_names_of_members_bring_no_codes_of_theirs_to_a_terminal(tmp_path):
    write_shards(tmp_path, samples(6, s2={"png": None}, s3={"cls": b"cat"}))
    rename(tmp_path, "000002.cls", "\x1b[2J.\x1b]0;x.cls")
    said = "".join(index(str(tmp_path)).remarks)
    assert "\\x1b[2J" in said
    assert said.isprintable()


def test_labels_of_an_interrupted_indexing_are_not_forgotten(tmp_path):
    shards = write_shards(tmp_path / "shards", samples(40, s5={"cls": b"cat"}))
    (tmp_path / "out").mkdir()
    shutil.copy(shards[3], tmp_path / "third")
    shards[3].write_bytes(b"cut off")
    with pytest.raises(UserError):
        index_shards(shards, tmp_path / "out/manifest.json")
    shutil.copy(tmp_path / "third", shards[3])
    assert "in 1 of 40 samples; first: " in index_shards(shards, tmp_path / "out/manifest.json").remarks[0]


def test_the_check_of_a_whole_data_set_needs_neither_torch_nor_numpy(tmp_path):
    manifest = data_set(tmp_path, samples(20, s4={"txt": b"x"}))
    (tmp_path / "x.yaml").write_text(config_of(manifest).dump())
    code = (
        "import sys; from dtrain import config; from dtrain.training.check import check_start\n"
        "check_start(config.load(sys.argv[1]), 1); assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.yaml")], check=True)
