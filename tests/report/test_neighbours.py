"""The training images nearest to samples, against all distances computed at once."""

import re
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest

from tests.command_line import command
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.report.made import Page


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """A run over two data sets, whose images may be mirrored."""
    more = [{"name": "more", "shards": f"{digits}/holdout", "weight": 1}]
    config = tiny(digits, tmp_path_factory.mktemp("runs"), "train.steps=2", "data.flip=true", f"data.mix={more}")
    run_ranks(_train, 1, config)
    return config


def _train(config):
    from dtrain.training.run_training import train

    train(config)


def _nearest_and_everything(config, count):
    """What the search finds, and all training and held-out images."""
    from dtrain.data.fields.samples import read_split
    from dtrain.data.shards.manifest import load_all
    from dtrain.report import neighbours
    from dtrain.run import RunDirectory

    progress = []

    @contextmanager
    def told(what):
        yield lambda done, of: progress.append((what, done, of))

    with mock.patch.object(neighbours, "BLOCK", 100):
        run = RunDirectory(config.run.path)
        found = neighbours.nearest(run, config, count, "pixels", None, told)
    manifest = load_all(config.data)
    splits = [(manifest, config.data.shards), (manifest.mixed[0], config.data.mix[0].shards)]
    images = [read_split(m, place, 8, 1, 0, m.samples)[0].numpy() for m, place in splits]
    numpy = {k: getattr(found, k).numpy() for k in ("samples", "distances", "numbers", "neighbours", "held_out")}
    return numpy, found.searched, images, progress


def test_the_nearest_are_those_that_all_distances_say(trained):
    ((found, searched, images, progress),) = run_ranks(_nearest_and_everything, 1, trained, 7)
    training = np.concatenate(images).astype(np.float64) / 127.5 - 1  # (1,797, 1, 8, 8)
    assert searched == len(training) == 1797
    assert progress[:2] == [("sampling", 7, 7), ("searching the training images", 100, 1797)]
    assert progress[-1] == ("searching the training images", 1797, 1797)
    assert len(progress) == 1 + 15 + 4  # blocks of 100 in each of the two sets
    both = np.stack([training, training[..., ::-1]], 1).reshape(1, -1, 2, 64)  # (image, mirrored)

    def ordered(queries: np.ndarray) -> np.ndarray:
        at = queries.reshape(len(queries), 1, 1, 64).astype(np.float64) / 127.5 - 1
        return np.sqrt(((at - both) ** 2).sum(-1)).min(-1)  # an image counts once

    distances = ordered(found["samples"])
    np.testing.assert_allclose(found["distances"], np.sort(distances, 1)[:, :5], rtol=1e-5)
    for sample in range(7):
        for place in range(5):
            picture = found["neighbours"][sample, place].astype(np.float64) / 127.5 - 1
            original = training[found["numbers"][sample, place]]
            assert (picture == original).all() or (picture == original[..., ::-1]).all()
            own = np.sqrt(((picture - (found["samples"][sample] / 127.5 - 1)) ** 2).sum())
            assert own == pytest.approx(found["distances"][sample, place], rel=1e-5)
    # Held-out images are compared with the training set; here they are part of it, so each finds itself.
    np.testing.assert_allclose(found["held_out"], 0, atol=1e-6)
    assert len(found["held_out"]) == 7


def test_they_stand_on_the_page(trained):
    ((code, said),) = run_ranks(command, 1, "report", trained.run.path, "--neighbours", 3, "--features", "pixels")
    assert (code, said.splitlines()[-1]) == (0, f"{trained.run.path}/report.html")
    page = Page((trained.run.path / "report.html").read_text())
    pictures = [a for tag, a in page.tags if tag == "img" and a.get("src")]
    assert [a["alt"].startswith("sample") for a in pictures] == 3 * [True, *(5 * [False])]
    assert "Samples of step 2 and the nearest of 1,797 training images" in page.text
    assert "also mirrored" in page.text
    assert re.search(r"of 3 held-out images \d", page.text)
