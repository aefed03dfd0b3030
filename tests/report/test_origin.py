"""What the page says of where a run comes from: command, commit, data set, and the classes of its columns."""

import json
import re
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from dtrain.data.shards.manifest import load, load_all
from dtrain.report import write_report
from dtrain.tracking.mlflow.link import keep_ids
from tests.digits import tiny
from tests.report.made import Page, make_run

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def data(digits, tmp_path):
    return shutil.copytree(digits, tmp_path / "digits")


def page(*runs) -> Page:
    return Page(write_report(list(runs)).read_text())


def facts(found: Page) -> dict[str, str]:
    """Name → what is said, of the list on the first card."""
    listed = re.search(r'<dl class="origin">(.*?)</dl>', found.source, re.S)
    rows = re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", listed[1], re.S) if listed else []
    return {name: re.sub("<[^>]*>", "", value) for name, value in rows}


def columns(found: Page) -> list[str]:
    """The words over the columns of the large grid, which is there for a script to show."""
    row = re.search(r'<div class="labelled"><div class="classes"[^>]*>(.*?)</div>', found.source)
    cells = re.findall(r'<span title="([^"]*)">([^<]*)</span>', row[1]) if row else []
    assert all(title == text for title, text in cells)
    return [text for _, text in cells]


def test_the_card_says_command_commit_and_how_large_the_data_are(data, tmp_path, monkeypatch):
    """Counted in the shards themselves."""
    line = "launch/train.py configs/digits-dit.yaml optim.lr=0.1"
    more = {"commit": COMMIT, "uncommitted": True, "artifacts": ["attempts/2/uncommitted.diff"]}
    own, held_out = load(data / "train/manifest.json"), load(data / "holdout/manifest.json")
    run = make_run(tmp_path, monkeypatch, command="train.py", command_line=line, data=own.hash, **more)
    samples, size = {"train": 0, "holdout": 0}, {"train": 0, "holdout": 0}
    for shard in data.glob("*/*.tar"):
        with tarfile.open(shard) as members:
            samples[shard.parent.name] += sum(member.name.endswith(".cls") for member in members)
        size[shard.parent.name] += shard.stat().st_size
    classes = "10 classes: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9"
    expected = {
        "command": line,
        "commit": f"{COMMIT} and changes, kept in attempts/2/uncommitted.diff",
        "data": f"{data}/train {samples['train']:,} samples, {size['train'] / 1e6:.3g} MB, {classes} "
        f"hash {own.hash[:12]}",
    }
    assert facts(page(run)) == expected
    text = (run / "journal.jsonl").read_text()
    (run / "journal.jsonl").write_text(text.replace('"features"', f'"reference": "{held_out.hash}", "features"'))
    found = facts(page(run))
    said = f"{data}/holdout/manifest.json {samples['holdout']} samples, {size['holdout'] / 1e3:.3g} kB"
    assert found == expected | {"held out": said}


def test_each_of_several_data_sets_is_told(data, tmp_path, monkeypatch):
    mix = f"data.mix=[{{name: more, shards: {data}/holdout, weight: 1}}]"
    config = tiny(data, tmp_path, mix)
    run = make_run(tmp_path, monkeypatch, "made", mix, data=load_all(config.data).hash)
    said = facts(page(run))["data"]
    assert re.search(r"/train 1,437 samples, .*/holdout 360 samples, ", said)
    run = make_run(tmp_path, monkeypatch, "alone", mix, data=load(data / "train/manifest.json").hash)
    assert "size not known" in facts(page(run))["data"]


def test_data_that_are_gone_or_changed_are_not_measured(data, tmp_path, monkeypatch):
    manifest = data / "train/manifest.json"
    run = make_run(tmp_path, monkeypatch, data=load(manifest).hash)
    names = [f"<{'long ' * 9}{i}>" for i in range(10)]
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"classes": names}))
    unknown = f"{data}/train size not known: its manifest is not here or has changed"
    assert facts(page(run)) == {"data": unknown}
    assert columns(page(run)) == [str(i) for i in range(10)]
    again = make_run(tmp_path, monkeypatch, "again", data=load(manifest).hash)
    assert columns(page(again)) == [f"&lt;{'long ' * 9}{i}&gt;" for i in range(10)]
    manifest.unlink()
    assert facts(page(again)) == {"data": unknown}


def test_data_are_found_from_wherever_the_page_is_made(data, tmp_path, monkeypatch):
    """A run's relative paths begin where it was started, and its own directory says where that was."""
    paths = ("run.dir=runs/mine", "data.shards=digits/train", "data.holdout=digits/holdout/manifest.json")
    made = make_run(tmp_path, monkeypatch, "made", *paths, data=load(data / "train/manifest.json").hash)
    (tmp_path / "runs").mkdir()
    run = shutil.copytree(made, tmp_path / "runs/mine/made")
    monkeypatch.chdir("/")
    assert facts(page(run))["data"].startswith("digits/train 1,437 samples, ")
    assert "size not known" in facts(page(made))["data"]  # a copy says nothing of where it was started
    monkeypatch.chdir(tmp_path)
    assert facts(page(made))["data"].startswith("digits/train 1,437 samples, ")


def test_other_attempts_of_another_commit_are_in_the_time_line(tmp_path, monkeypatch):
    run = make_run(tmp_path, monkeypatch, command_line="dtrain train a.yaml", commit=COMMIT)
    found = page(run)
    assert facts(found)["command"] == "dtrain train a.yaml"
    assert found.text.count("on 2 ranks at ZeRO stage 1, commit 0123456789ab, dtrain train a.yaml") == 2
    lines = (run / "journal.jsonl").read_text().splitlines()
    lines[0] = lines[0].replace(COMMIT, COMMIT[::-1])
    (run / "journal.jsonl").write_text("\n".join(lines) + "\n")
    found = page(run)
    assert facts(found)["command"] == "dtrain train a.yaml attempt 2; the others are in the time line"
    assert f"commit {COMMIT[::-1][:12]}" in found.text


def test_a_journal_that_says_less_is_shown_as_far_as_it_goes(tmp_path, monkeypatch):
    assert set(facts(page(make_run(tmp_path, monkeypatch)))) == {"data"}
    assert facts(page(make_run(tmp_path, monkeypatch, "older", command="train.py")))["command"] == "train.py"


@pytest.mark.parametrize(
    ("setting", "uri", "server", "shown"),
    [
        ("http://joe:hunter@host:5000/", "http://joe:hunter@host:5000/", "http://host:5000", "the curves"),
        ("https://host/a?sig=hunter", "https://host/a?sig=hunter", "https://host/a?•••", "the curves"),
        (
            "null",
            "sqlite:///{runs}/mlflow.db",
            "http://127.0.0.1:5000",
            "the curves, while mlflow server --backend-store-uri sqlite:///{runs}/mlflow.db runs",
        ),
    ],
)
def test_one_link_leads_to_the_curves_in_mlflow(setting, uri, server, shown, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    run = make_run(tmp_path, monkeypatch, "made", f"tracking.uri={setting}")
    assert "MLflow" not in facts(page(run))
    keep_ids(run, uri.format(runs=tmp_path), "7", "abc")
    found = page(run)
    (link,) = (a["href"] for tag, a in found.tags if "://" in (a.get("href") or ""))
    assert link == f"{server}/#/experiments/7/runs/abc/model-metrics?workflowType=machine_learning"
    assert facts(found)["MLflow"] == shown.format(runs=tmp_path)
    assert "hunter" not in found.source


@pytest.mark.parametrize("classes", [0, 3, 12])
def test_each_columns_class_is_the_one_that_training_draws_there(classes, digits, tmp_path, monkeypatch):
    """Images as bright as their label: what stands over a column is the brightness below it."""
    from dtrain.training.evaluation import draw_grid

    class Painter:
        reconstructs = False

        def draw(self, ids, labels, how):
            return (20 * labels).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8)

    changed = f"model.num_classes={classes}"
    config = tiny(digits, tmp_path, changed)
    run = make_run(tmp_path, monkeypatch, "made", changed)
    draw_grid(Painter(), config, run / "samples/step-00000012.png")
    shown = columns(page(run))
    pixels = np.asarray(Image.open(run / "samples/step-00000012.png").convert("L"))
    assert shown == [str(i) for i in range(min(classes, 10))]
    for i, name in enumerate(shown):
        middle = round((i + 0.5) * pixels.shape[1] / len(shown))
        assert set(pixels[4::36, middle]) == {20 * int(name)}
    text = page(run).text
    assert ("a column a class" in text) == (classes == 3)
    assert ("a column for each of the first 10 of 12 classes" in text) == (classes == 12)
