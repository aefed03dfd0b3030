"""Batches that are sent ahead to a device: the same batches, reports and errors, one step earlier."""

import json
from contextlib import contextmanager

import pytest
import torch

from dtrain.config import validate
from dtrain.errors import SharedError
from dtrain.tracking.journal import events
from dtrain.training.feed import Feed
from dtrain.training.upload import Sent, Upload
from tests.data.shard_files import data_set, labelled_pictures, short_run
from tests.longer import longer
from tests.ranks import run_ranks


class Copies:
    """In the place of `Upload`: the CPU is the device, and a batch that is read before it arrived is not there."""

    def begin(self, batch, complete):
        return Sent(complete({name: column.clone() for name, column in batch.items()}), None)

    def end(self, sent):
        return sent.batch


class Ahead(Feed):
    def __init__(self, config, manifest):
        super().__init__(config, manifest)
        self._upload = Copies()

    def ahead(self):
        assert self._made is None
        super().ahead()
        assert self._made is not None


@contextmanager
def feeding(feed):
    from dtrain.training import run_training

    before, run_training.Feed = run_training.Feed, feed
    try:
        yield
    finally:
        run_training.Feed = before


def trained(plain: dict, ahead: bool):
    from dtrain.training.run_training import train

    with feeding(Ahead if ahead else Feed):
        try:
            return train(validate(plain, "a test"))
        except SharedError as e:
            return str(e)


def lines_of(folder, event, *names):
    lines = [line for line in events(folder / "runs/run/journal.jsonl") if line["event"] == event]
    return [[line["step"], *(line["metrics"][name] for name in names)] for line in lines]


@pytest.mark.parametrize("broken", [longer(None), 41])
def test_what_was_sent_ahead_is_trained_on_as_what_was_not(tmp_path, broken):
    found = []
    for ahead in (False, True):
        folder = tmp_path / str(ahead)
        pictures = labelled_pictures(60)
        if broken is not None:
            pictures[broken]["png"] = b"broken"
        data_set(folder / "data", pictures)
        plain = short_run(folder, 15, on_error="raise")
        said = [one.replace(str(folder), "") for one in run_ranks(trained, 2, plain, ahead)]
        outcome = json.loads((folder / "runs/run/outcome.json").read_text())
        saved = lines_of(folder, "checkpoint")
        found.append((said, outcome["step"], saved, lines_of(folder, "train", "loss", "bytes_read", "bad_samples")))
    assert found[0] == found[1]
    assert (found[0][0] == ["finished", "finished"]) == (broken is None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_reads_what_was_sent():
    device = torch.device("cuda", 0)
    upload, batches = Upload(device), [{"x": torch.randn(64, 3, 64, 64).pin_memory()} for _ in range(8)]
    sums, sent = [], upload.begin(batches[0], dict)
    for after in [*batches[1:], None]:
        here = upload.end(sent)
        torch.cuda._sleep(10_000_000)
        sent = upload.begin(after, dict) if after else None
        sums.append(here["x"].sum(dtype=torch.float64))
        del here
    for one, batch in zip(sums, batches, strict=True):
        assert float(one) == pytest.approx(float(batch["x"].sum(dtype=torch.float64)), rel=1e-9)
