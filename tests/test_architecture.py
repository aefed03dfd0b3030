"""docs/architecture.md says what is: its picture of the rooms, and the files that a picture goes through."""

import re
import shutil
import sys
from pathlib import Path

import pytest

import dtrain
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.rooms import PICTURE, drawn

PACKAGE = Path(dtrain.__file__).parent
PAGE = PICTURE.parent / "architecture.md"
MOST = 25  # files that a reader opens

PNG = b"\x89PNG"
SIDE = 8  # pixels of a digit's picture
DIMENSIONS = SIDE * SIDE  # of its features, which are its pixels


def data_in(value, depth=0):
    """The picture, or what was computed from it, in a variable, or in a mapping or sequence that a variable holds."""
    import numpy as np
    import torch
    from PIL import Image

    from dtrain.evaluation.metrics.statistics import Statistics

    if isinstance(value, dict | list | tuple) and depth < 4:
        for item in list(value.values()) if isinstance(value, dict) else value:
            yield from data_in(item, depth + 1)
    elif isinstance(value, bytes | bytearray):
        if value.startswith(PNG):
            yield value
    elif isinstance(value, Image.Image | Statistics):
        yield value
    elif isinstance(value, np.ndarray | torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        shape = tuple(value.shape)
        picture = shape[-2:] == (SIDE, SIDE) or shape[-3:] == (SIDE, SIDE, 1)  # x_0, x_t, an output, a sample
        computed = isinstance(value, torch.Tensor) and value.grad_fn is not None  # activations, losses
        features = shape[-1:] == (DIMENSIONS,) and len(shape) <= 2 and value.any()  # and moments of more than none
        if picture or computed or features:
            yield value


class Trace:
    """Which files of the package have the picture in a function's arguments, variables or results, in each of `inside`.

    held: by function of `inside`, in the order in which they first had it. computed: where a new one appeared, in a
    function of the file itself and not in one that it calls.
    """

    def __init__(self, inside):
        self._inside = {function.__code__: name for name, function in inside.items()}
        self._now, self._busy = None, False
        self._seen = {}  # by id; kept, so that no id is given twice
        self.held = {name: {} for name in inside}
        self.computed = set()

    def __call__(self, frame, event, result):
        if self._busy or event not in ("call", "return") or not file_of(frame):
            return
        self._busy = True
        if event == "call":
            self._now = self._inside.get(frame.f_code, self._now)
        if self._now is not None:
            self._note(frame, event, result)
        if event == "return" and frame.f_code in self._inside:
            self._now = None
        self._busy = False

    def _note(self, frame, event, result):
        here, caller = file_of(frame), frame.f_back
        while not file_of(caller):  # past torch, which calls a network's forward
            caller = caller.f_back
        held = self.held[self._now]
        for one in data_in(list(frame.f_locals.values())):
            held.setdefault(here)
            self._new(one, here if event == "return" else file_of(caller))
        for one in data_in(result) if event == "return" else ():
            held.setdefault(here)
            held.setdefault(file_of(caller))
            self._new(one, here)

    def _new(self, one, file):
        if id(one) not in self._seen:
            self._seen[id(one)] = one
            self.computed.add(file)


def file_of(frame):
    path = frame.f_code.co_filename
    return path.removeprefix(f"{PACKAGE.parent}/") if path.startswith(f"{PACKAGE}/") else None


def train_traced(config):
    """On a rank: a step and an evaluation. Returns (files that had the picture, those that computed from it)."""
    from dtrain.evaluation.evaluate import evaluate
    from dtrain.evaluation.reference import Reference
    from dtrain.training.run_training import train
    from dtrain.training.steps import Steps

    trace = Trace({"step": Steps._update, "evaluation": evaluate, "reference": Reference.open.__func__})
    sys.setprofile(trace)
    try:
        train(config)
    finally:
        sys.setprofile(None)
    return list(trace.held["step"] | trace.held["evaluation"] | trace.held["reference"]), trace.computed


@pytest.fixture(scope="module")
def found(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("architecture")
    data = folder / "digits"  # where no earlier evaluation has left its reference
    shutil.copytree(digits, data, ignore=shutil.ignore_patterns("reference-*"))
    config = tiny(
        *(data, folder / "run"),
        *("train.steps=1", "train.micro_batch=12", "eval.every=1", "eval.num_samples=24", "eval.features=pixels"),
    )
    # A slow machine would have kept there what a trace is to see being read.
    return run_ranks(train_traced, 1, config, environment={"XDG_CACHE_HOME": str(folder / "cache")})[0]


def listed(heading):
    """Files that begin a line of the list under a heading of the page."""
    text = re.search(rf"^##+ {heading}\n(.*?)(?=^##|\Z)", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    return re.findall(r"^(?:\d+\.|-) `(dtrain/[\w/]+\.py)`", text, re.MULTILINE)


def test_the_picture_is_of_the_rooms_that_there_are():
    assert PICTURE.read_text() == drawn(), "draw it again: python -m tests.rooms"


def test_the_page_lists_the_files_that_a_picture_goes_through_in_their_order(found):
    held, _ = found
    way, handing_on = listed("The way of a picture"), listed("Files that hand it on")
    assert set(way) & set(handing_on) == set()
    assert set(held) == {*way, *handing_on}
    assert [file for file in held if file in way] == way
    assert len(way) <= MOST


def test_files_that_hand_a_picture_on_compute_nothing_from_it(found):
    _, computed = found
    assert computed & set(listed("Files that hand it on")) == set()
