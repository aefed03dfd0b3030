"""Inception's two resizings, and what a distance is called when its two sides are known to be alike, or are not."""

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtrain.diffusion.process import build as build_process
from dtrain.errors import UserError
from dtrain.evaluation.combinations import configured
from dtrain.evaluation.evaluate import evaluate, sampling_settings
from dtrain.evaluation.features import weights
from dtrain.evaluation.features.networks import Inception
from dtrain.evaluation.features.weights import WeightFile
from dtrain.evaluation.generate import Generator
from dtrain.evaluation.names import is_comparable, metric_name, metric_names, resize_of_reference
from dtrain.evaluation.opened import open_generator
from dtrain.evaluation.reference import Reference, make
from dtrain.evaluation.requirements import about_names, check_evaluation, known_features
from dtrain.evaluation.sweep import _key, sweep
from dtrain.report.evaluations import curves
from dtrain.report.runs import Run
from dtrain.run import RunDirectory
from dtrain.tracking.best import best_step, training_evaluations
from dtrain.tracking.journal import Journal
from dtrain.training.check import check_start
from tests.digits import tiny
from tests.evaluation.features.networks import Layers, saved
from tests.ranks import run_ranks
from tests.training.runs import train

CPU = torch.device("cpu")
FORTY_EIGHT = Path(__file__).parent.parent / "golden" / "data" / "holdout"


class InceptionFile(torch.nn.Module):
    """What the published file takes and gives: any size, which it resizes itself as TensorFlow 1 did, and a flag."""

    def __init__(self):
        super().__init__()
        self.layers, self.output = Layers(), torch.nn.Linear(2048, 1008)

    def forward(self, img: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        x = self.along(self.along(img.float(), 2), 3)
        features = self.layers((x - 128) / 128).flatten(1)
        return features if return_features else self.output(features)

    def along(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Pixel i of 299 lies at i·size/299 of the image, between the two next to it: no half pixel, no antialias."""
        at = torch.arange(299, device=x.device) * (x.shape[dim] / 299)
        low = at.long()
        shape = [1, 1, 1, 1]
        shape[dim] = 299
        share = (at - low).view(shape)
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        return x.index_select(dim, low) * (1 - share) + x.index_select(dim, high) * share


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return saved(InceptionFile(), tmp_path_factory.mktemp("weights") / "inception-2015-12-05.pt")


@pytest.fixture
def inception(file, monkeypatch):
    """dtrain takes the stand-in for the published file, as one that has its hash."""
    stand_in = WeightFile(file.name, "https://nowhere", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setattr(weights, "INCEPTION", stand_in)
    return ("eval.features=inception", f"eval.weights={file}")


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 3, 20, 33), dtype=np.uint8))


def pixel_by_pixel(image: np.ndarray) -> np.ndarray:
    """TensorFlow 1's resize_bilinear to 299 with corners not aligned, of (H, W), written out for every pixel."""
    (height, width), out = image.shape, np.empty((299, 299))
    for row in range(299):
        y = row * height / 299
        top, bottom = int(y), min(int(y) + 1, height - 1)
        for column in range(299):
            x = column * width / 299
            left, right = int(x), min(int(x) + 1, width - 1)
            above = image[top, left] + (image[top, right] - image[top, left]) * (x - left)
            below = image[bottom, left] + (image[bottom, right] - image[bottom, left]) * (x - left)
            out[row, column] = above + (below - above) * (y - top)
    return out


def test_with_tensorflows_resizing_features_are_those_of_images_enlarged_pixel_by_pixel(file, images):
    """And of torch-fidelity's own version of it; clean-fid's resizing gives others."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x as theirs

    network = torch.jit.load(file)

    def features(resized):
        return network.layers((resized.float() - 128) / 128).flatten(1).detach().numpy()

    found = Inception(file, resize="tensorflow")(images).numpy()
    np.testing.assert_allclose(found, features(theirs(images.float(), (299, 299), align_corners=False)), atol=1e-4)
    by_hand = np.stack([pixel_by_pixel(channel.astype(float)) for channel in images[0].numpy()])
    np.testing.assert_allclose(found[:1], features(torch.from_numpy(by_hand)[None]), atol=1e-4)
    assert np.abs(found - Inception(file)(images).numpy()).mean() > 0.01
    grey, whole = images[:, :1], images[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(*(Inception(file, resize="tensorflow")(pictures) for pictures in (grey, whole)))


def test_with_tensorflows_resizing_features_are_clean_fids_legacy_ones_of_saved_pngs(tmp_path, file, images):
    from cleanfid.fid import get_folder_features
    from cleanfid.inception_torchscript import InceptionV3W

    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_folder_features(
            str(tmp_path),
            InceptionV3W(str(file.parent), download=False, resize_inside=True),
            num_workers=0,
            batch_size=4,
            device=CPU,
            mode="legacy_tensorflow",
            verbose=False,
        )
    ours = Inception(file, resize="tensorflow")
    np.testing.assert_allclose(ours(images).numpy(), theirs, rtol=1e-5, atol=1e-6)
    assert (ours.name, ours.dimensions, ours.classes) == ("inception_tf", 2048, 1008)
    assert ours.fingerprint != Inception(file).fingerprint


def test_every_metric_of_the_older_resizing_carries_it_in_its_name(digits, tmp_path, inception):
    metrics = "eval.metrics=[fd,fd_infinity,kid,precision,recall,is]"
    config = tiny(digits, tmp_path, *inception, metrics, "eval.resize=tensorflow", "eval.bootstrap=9")
    known = known_features(config.eval, config.data)
    found = metric_names(config.eval, known.name, comparable=True)
    assert found[:3] == ["fid_tf", "fid_tf_low", "fid_tf_high"]
    assert found[3:5] == ["fd_infinity_inception_tf", "fd_infinity_inception_tf_error"]
    assert all("inception_tf" in name for name in found[3:])
    assert metric_name("fd", "inception_tf", comparable=False) == "fd_inception_tf"
    assert metric_name("fd", "inception", comparable=False) == "fd_inception"


class Halving(torch.nn.Module):
    def forward(self, x, t, y):
        return 0.5 * x


THEIRS = ("data.holdout=null", "eval.labels=uniform", "eval.num_samples=12", "eval.steps=2")


def evaluated(config):
    """(metrics, context, what is said of the reference) of a model that knows nothing."""
    generator = Generator.of(Halving(), build_process(config.diffusion), config, CPU)
    reference = Reference.open(config, CPU)
    return *evaluate(generator, config, reference), reference.about


@pytest.fixture
def theirs(tmp_path):
    """Writes statistics of 2048 numbers as another tool does, under a name; its path."""
    x = np.random.default_rng(0).normal(size=(40, 2048))

    def write(name: str, **more) -> Path:
        np.savez(tmp_path / name, mu=x.mean(0), sigma=np.cov(x, rowvar=False), **more)
        return tmp_path / name

    return write


ADM = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}


DECLARED = [  # file, more of its arrays, eval.resize, the name of the distance, the resizing in its context
    ("cifar10-32x32.npz", {}, None, "fd_inception", "unknown"),
    ("cifar10-32x32.npz", {}, "clean", "fid", "clean"),
    ("cifar10-32x32.npz", {}, "tensorflow", "fid_tf", "tensorflow"),
    ("VIRTUAL_imagenet64_labeled.npz", ADM, None, "fd_inception", "tensorflow"),
    ("VIRTUAL_imagenet64_labeled.npz", ADM, "tensorflow", "fid_tf", "tensorflow"),
    ("ffhq_clean_trainval70k_1024.npz", {}, None, "fid", "clean"),
    ("mine_legacy_tensorflow_custom_na.npz", {}, "tensorflow", "fid_tf", "tensorflow"),
    ("cifar10_legacy_pytorch_test_32.npz", {}, None, "fd_inception", "pytorch"),
]


def with_reference(digits, tmp_path, inception, path, asked, *more):
    choice = (f"eval.resize={asked}",) if asked else ()
    return tiny(digits, tmp_path, *inception, *THEIRS, f"eval.reference={path}", *choice, *more)


@pytest.mark.parametrize(("name", "more", "asked", "metric", "resize"), DECLARED)
def test_a_distance_to_another_tools_statistics_is_a_fid_only_where_their_resizing_is_declared(
    digits, tmp_path, inception, name, more, asked, metric, resize
):
    np.savez(tmp_path / name, mu=np.zeros(3), sigma=np.eye(3), **more)
    config = with_reference(digits, tmp_path, inception, tmp_path / name, asked)
    features = known_features(config.eval, config.data).name
    assert resize_of_reference(config.eval, features, config.eval.reference) == resize
    assert metric_name("fd", features, comparable=is_comparable(features, resize)) == metric
    said = about_names(config)  # what a start and --check print
    assert len(said) == (metric == "fd_inception")
    assert all("is fd_inception, not fid" in line and "\n" not in line for line in said)


@pytest.mark.parametrize(("name", "more", "asked", "metric", "resize"), [DECLARED[0], DECLARED[4]])
def test_an_evaluation_is_called_and_says_what_its_reference_allows(
    digits, tmp_path, inception, theirs, name, more, asked, metric, resize
):
    config = with_reference(digits, tmp_path, inception, theirs(name, **more), asked)
    metrics, context, about = evaluated(config)
    assert list(metrics) == [metric]
    assert context["reference_resize"] == resize
    assert ([about] if about else []) == about_names(config)


@pytest.mark.parametrize(
    ("name", "more", "asked", "fix"),
    [
        ("VIRTUAL_imagenet64_labeled.npz", ADM, "clean", "set eval.resize=tensorflow"),
        ("cifar10_clean_train_32.npz", {}, "tensorflow", "set eval.resize=clean"),
        ("cifar10_legacy_pytorch_train_32.npz", {}, "clean", "leave eval.resize out"),
    ],
)
def test_a_reference_that_declares_another_resizing_than_was_asked_for_is_refused(
    digits, tmp_path, inception, theirs, name, more, asked, fix
):
    chosen = (*THEIRS, f"eval.reference={theirs(name, **more)}", f"eval.resize={asked}")
    config = tiny(digits, tmp_path, *inception, *chosen)
    for refuse in (check_evaluation, lambda config: Reference.open(config, CPU)):
        with pytest.raises(UserError, match=f"{name} is of .*, and eval.resize is {asked}; {fix}, or name another"):
            refuse(config)


def test_dtrains_own_reference_is_of_a_resizing_and_refused_for_another(digits, tmp_path, inception):
    out, file = tmp_path / "own.npz", inception[1].partition("=")[2]
    assert ": inception_tf of 48 images" in make(str(FORTY_EIGHT), "inception", file, None, out, resize="tensorflow")
    chosen = (*inception, *THEIRS, f"eval.reference={out}")
    metrics, context, about = evaluated(tiny(digits, tmp_path, *chosen, "eval.resize=tensorflow"))
    assert (list(metrics), about, "reference_resize" in context) == (["fid_tf"], None, False)
    with pytest.raises(UserError, match=r"own\.npz is stale: its extractor .* --features inception` again"):
        Reference.open(tiny(digits, tmp_path, *chosen), CPU)


@pytest.mark.parametrize("features", ["pixels", "effnet_lite0", "auto"])
def test_the_older_resizing_without_inception_is_refused(digits, tmp_path, monkeypatch, features):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("DTRAIN_WEIGHTS", raising=False)
    config = tiny(digits, tmp_path, f"eval.features={features}", "eval.resize=tensorflow")
    for refuse in (check_evaluation, lambda config: Reference.open(config, CPU)):
        with pytest.raises(UserError, match=f"tensorflow is Inception's own, and eval.features is {features}"):
            refuse(config)
    with pytest.raises(UserError, match="'bilinear' is no resizing of Inception's images"):
        make(str(digits / "holdout"), "pixels", None, 8, tmp_path / "out.npz", resize="bilinear")


@pytest.mark.parametrize(
    ("wanted", "chosen", "take"),
    [
        ("fid", ("eval.features=pixels",), "take fd_pixels"),
        ("fid", ("{inception}", "eval.reference={theirs}"), "take fd_inception"),
        ("fid", ("{inception}", "eval.resize=tensorflow"), "take fid_tf"),
        ("fid_tf", ("{inception}",), "take fid"),
        ("kid_inception", ("{inception}", "eval.resize=tensorflow", "eval.metrics=[fd,kid]"), "take kid_inception_tf"),
    ],
)
def test_keep_best_of_a_metric_that_is_called_otherwise_says_the_name_to_take(
    digits, tmp_path, inception, theirs, wanted, chosen, take
):
    given = [
        o.format(inception=inception[0], theirs=theirs("theirs.npz")) for o in (*chosen, inception[1], "eval.every=2")
    ]
    if "pixels" in chosen[0]:
        given = [o for o in given if "weights" not in o]
    with pytest.raises(UserError) as refused:
        check_start(tiny(digits, tmp_path, *given, f"train.keep_best={wanted}"), 1)
    assert str(refused.value).endswith(take)
    right = take.removeprefix("take ")
    assert "train.keep_best" not in check_start(tiny(digits, tmp_path, *given, f"train.keep_best={right}"), 1)
    # A run that has begun goes on, and says so.
    begun = tiny(digits, tmp_path, *given, f"train.keep_best={wanted}")
    checkpoint = begun.run.path / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text("{}")
    assert take in "".join(about_names(begun))


def journaled(config, lines) -> RunDirectory:
    """A run with these (step, metrics, context) as its evaluations."""
    folder = config.run.path
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump())
    journal = Journal(folder / "journal.jsonl")
    journal.begin_attempt(0, 0, {})
    for step, metrics, context in lines:
        journal.append("eval", step, 64 * step, metrics, context)
    journal.close()
    return RunDirectory(folder)


@pytest.mark.parametrize("name", ["cifar10_clean_train_32.npz", "cifar10_legacy_pytorch_train_32.npz"])
def test_evaluations_from_before_the_context_said_the_resizing_still_count(digits, tmp_path, inception, theirs, name):
    """They have the same reference and the same name, so the best checkpoint stays and there is one curve."""
    chosen = with_reference(digits, tmp_path, inception, theirs(name), None, "eval.metrics=[fd,is]")
    metrics, context, _ = evaluated(chosen)
    distance = "fid" if "_clean_" in name else "fd_inception"
    assert {distance, "is_inception"} <= set(metrics)
    before = {key: value for key, value in context.items() if key != "reference_resize"}
    assert before != context
    values = {5: (2.0, 3.0, before), 10: (4.0, 9.0, before), 15: (3.0, 5.0, context)}
    run = journaled(chosen, [(s, {distance: d, "is_inception": i}, c) for s, (d, i, c) in values.items()])
    assert best_step(training_evaluations(run.journal_file), distance, [5, 10, 15]) == 5
    assert best_step(training_evaluations(run.journal_file), "is_inception", [5, 10, 15]) == 10
    drawn = curves([Run.read(run.path)])
    assert {metric: [len(c.lines) for c in found] for metric, found in drawn.items()} == {
        distance: [3],
        "is_inception": [3],
    }


def test_a_sweep_draws_nothing_anew_that_it_drew_before_the_context_said_the_resizing(
    digits, tmp_path, inception, theirs
):
    path = theirs("cifar10_clean_train_32.npz")
    config = with_reference(digits, tmp_path, inception, path, None, "train.steps=1")
    run_ranks(train, 1, config)
    run, at, reference = RunDirectory(config.run.path), configured(config, {"eta": 0.0}), Reference.open(config, CPU)
    checkpoint = open_generator(run, config, CPU).checkpoint
    # As keys were made then:
    named = sampling_settings(checkpoint, at.eval, reference) | {"n": 12, "metrics": ["fd"], "bootstrap": 0}
    named |= {"extractor": reference.extractor.fingerprint, "reference": reference.hash}
    key = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()
    line = {"event": "sweep", "key": key, "setting": {"eta": 0.0}, "step": 1, "images": 24, "attempt": 0, "time": 0.0}
    line |= {"metrics": {"fid": 12.5}, "context": {"features": "inception"}}
    (run.path / "sweep.jsonl").write_text(json.dumps(line) + "\n")
    assert sweep(run, config, {"eta": [0.0]}) == [line]

    unknown = with_reference(digits, tmp_path, inception, theirs("unknown.npz"), None)
    other = Reference.open(unknown, CPU)
    assert other.hash == reference.hash
    assert (
        _key(checkpoint, configured(unknown, {"eta": 0.0}).eval, other) != key
    )  # what it draws is called fd_inception
