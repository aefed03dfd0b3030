"""What samples are compared with: files of ours and of other tools, and the refusal of what has gone stale."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from dtrain.data.shards.indexing import index
from dtrain.errors import SharedError, UserError
from dtrain.evaluation.metrics.frechet import frechet_distance
from dtrain.evaluation.metrics.statistics import Statistics, read
from dtrain.evaluation.reference import Reference, compute, make
from tests.data.shard_files import data_set, picture
from tests.digits import tiny

CPU = torch.device("cpu")


@pytest.fixture
def data(digits, tmp_path):
    """The digits' own copy for a test."""
    without_kept = shutil.ignore_patterns("reference-*")
    return Path(shutil.copytree(digits, tmp_path / "digits", ignore=without_kept))


@pytest.fixture
def read_again(monkeypatch):
    """A list that grows with every split whose images are read."""
    from dtrain.evaluation import reference

    splits = []

    def counted(manifest, *args, **kwargs):
        splits.append(manifest.path.parent.name)
        return compute(manifest, *args, **kwargs)

    monkeypatch.setattr(reference, "compute", counted)
    return splits


def test_a_reference_is_computed_once_and_equals_the_one_computed_on_the_spot(data, tmp_path, read_again):
    config = tiny(data, tmp_path)
    on_the_spot = Reference.open(config, CPU)
    said = make(str(data / "holdout"), "pixels", None, None, None)
    path = data / "holdout" / "reference-pixels-8px.npz"
    assert said == f"{path}: pixels of 360 images at 8 pixels, 64 dimensions"
    assert read_again == ["holdout", "holdout"]
    from_file = Reference.open(config, CPU)
    assert read_again == ["holdout", "holdout"]  # not a third time
    assert np.array_equal(from_file.statistics.mean, on_the_spot.statistics.mean)
    assert np.array_equal(from_file.statistics.cov, on_the_spot.statistics.cov)
    assert torch.equal(from_file.labels, on_the_spot.labels)
    assert from_file.hash == on_the_spot.hash
    assert from_file.features is None
    with np.load(path) as f:  # the names under which clean-fid, pytorch-fid and EDM look for them
        assert f["mu"].shape == (64,)
        assert f["sigma"].shape == (64, 64)
    kernel = Reference.open(tiny(data, tmp_path, "eval.metrics=[fd,kid]"), CPU)
    assert kernel.features.shape == (360, 64)
    np.testing.assert_allclose(np.cov(kernel.features.double().numpy(), rowvar=False), from_file.statistics.cov)


KERNEL = "eval.metrics=[fd,kid]"


def test_what_an_evaluation_computed_is_kept_beside_the_split_and_used_again(data, tmp_path, read_again):
    config, kernel = tiny(data, tmp_path), tiny(data, tmp_path, KERNEL)
    first = Reference.open(config, CPU)
    (path,) = (data / "holdout").glob("reference-pixels-8px-*.npz")
    assert first.kept == f"the reference of 360 images is kept in {path}"
    again = Reference.open(config, CPU)
    assert (read_again, again.kept) == (["holdout"], None)
    for part in ("mean", "cov"):
        assert np.array_equal(getattr(again.statistics, part), getattr(first.statistics, part))
    assert (again.hash, again.statistics.count) == (first.hash, 360)
    features = Reference.open(kernel, CPU).features  # the moments are not enough: read once more, and kept whole
    assert torch.equal(Reference.open(kernel, CPU).features, features)
    Reference.open(config, CPU)
    assert read_again == ["holdout", "holdout"]
    assert features.shape == (360, 64)


def test_a_kept_reference_of_anything_else_is_never_used(data, tmp_path, read_again):
    config = tiny(data, tmp_path)
    right = Reference.open(config, CPU).statistics
    (path,) = (data / "holdout").glob("reference-pixels-8px-*.npz")
    whole = path.read_bytes()
    with np.load(path) as f:
        own = dict(f)
    other = Reference.open(tiny(data, tmp_path, f"data.holdout={data}/train/manifest.json"), CPU)
    (others,) = (data / "train").glob("reference-pixels-8px-*.npz")
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    source = json.loads(str(own["source"]))
    forgeries = [others.read_bytes(), bytes(flipped), whole[:-100], b""]
    for part in ("data", "extractor", "preprocessing"):
        np.savez(tmp_path / "forged.npz", **own | {"source": json.dumps(source | {part: "0" * 64})})
        forgeries.append((tmp_path / "forged.npz").read_bytes())
    for number, forged in enumerate(forgeries):
        path.write_bytes(forged)
        found = Reference.open(config, CPU)
        assert read_again[2:] == ["holdout"] * (number + 1)
        assert found.kept is not None
        assert np.array_equal(found.statistics.cov, right.cov)
    # The data themselves changed in their place.
    for file in (data / "train").glob("*"):
        if file != others:
            shutil.copy(file, data / "holdout")
    assert np.array_equal(Reference.open(config, CPU).statistics.cov, other.statistics.cov)


def test_where_the_split_cannot_be_written_its_reference_is_kept_in_the_cache(data, tmp_path, read_again, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = tiny(data, tmp_path)
    Reference.open(config, CPU)
    (path,) = (data / "holdout").glob("reference-pixels-8px-*.npz")
    path.unlink()
    path.mkdir()  # root may write anywhere, but not a file over a folder
    kept = tmp_path / "cache" / "dtrain" / "references" / path.name
    assert Reference.open(config, CPU).kept == f"the reference of 360 images is kept in {kept}"
    assert Reference.open(config, CPU).kept is None
    assert read_again == ["holdout", "holdout"]


def test_a_stale_reference_is_refused_before_anything_is_computed(data, tmp_path, read_again):
    make(str(data / "holdout"), "pixels", None, None, None)
    read_again.clear()
    beside = data / "holdout" / "reference-pixels-8px.npz"
    elsewhere = Path(shutil.copy(beside, tmp_path / "mine.npz"))
    # The data changed: the training split's shards and manifest in the holdout's place.
    for file in (data / "holdout").glob("*"):
        if file != beside:
            file.unlink()
    for file in (data / "train").glob("*"):
        shutil.copy(file, data / "holdout")
    for overrides in ((), (f"eval.reference={elsewhere}",)):
        with pytest.raises(
            UserError, match=r"is stale: its data was .* run `dtrain reference .*holdout --features pix"
        ):
            Reference.open(tiny(data, tmp_path, *overrides), CPU)
    # Another preprocessing, and another extractor under the same name.
    shutil.copy(elsewhere, data / "train" / "reference-pixels-8px.npz")
    with pytest.raises(UserError, match="is stale: its data was"):
        Reference.open(tiny(data, tmp_path, f"data.holdout={data}/train/manifest.json"), CPU)
    make(str(data / "train"), "pixels", None, None, elsewhere)
    read_again.clear()
    for part, value in (("extractor", "0" * 64), ("preprocessing", "none")):
        forged = tmp_path / f"{part}.npz"
        with np.load(elsewhere) as f:
            source = json.loads(str(f["source"])) | {part: value}
            np.savez(forged, **{k: f[k] for k in ("mu", "sigma", "count", "fingerprint")}, source=json.dumps(source))
        with pytest.raises(UserError, match=f"is stale: its {part} was"):
            Reference.open(tiny(data, tmp_path, f"eval.reference={forged}"), CPU)
    assert read_again == []


@pytest.mark.parametrize("extra", [{}, {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}], ids=["clean-fid, EDM", "ADM"])
def test_files_of_other_tools_are_read(data, tmp_path, extra):
    """clean-fid and pytorch-fid write with savez_compressed, EDM with savez; float32 and float64 both occur."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 64))
    mean, cov = x.mean(0), np.cov(x, rowvar=False)
    for number, write in enumerate((np.savez, np.savez_compressed)):
        path = tmp_path / f"theirs-{number}.npz"
        write(path, mu=mean, sigma=cov, **extra)
        found = Reference.open(tiny(data, tmp_path, f"eval.reference={path}"), CPU)
        assert np.array_equal(found.statistics.mean, mean)
        assert np.array_equal(found.statistics.cov, cov)
        assert len(found.hash) == 64
        own = Statistics(200, mean, cov)
        assert frechet_distance(found.statistics, own) == pytest.approx(0, abs=1e-9)
    single = tmp_path / "single.npz"
    np.savez(single, mu=mean.astype(np.float32), sigma=cov.astype(np.float32))
    assert read(single).statistics.cov.dtype == np.float64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["eval.reference={npz}"], r"statistics of 5 dimensions, but pixels has 64"),
        (["eval.reference=nowhere.npz"], r"no statistics at nowhere\.npz"),
        (["eval.metrics=[kid]", "data.holdout=null"], r"kid need a split: name its manifest in data\.holdout"),
        (["eval.metrics=[fd, bpd]", "data.holdout=null", "eval.reference={npz}"], r"fd, bpd need a split: name its"),
        (["data.holdout=null"], "fd need something to compare with"),
        (["data.holdout=null", "eval.reference={npz}"], "no data.holdout to take labels from; set `uniform`"),
        (["eval.metrics=[is]"], "the Inception score needs features with classes, which pixels are not"),
        (["eval.metrics=[fd_infinity]"], r"fd_infinity of pixels needs at least 256 samples \(4 a dimension\), not 48"),
        (["eval.metrics=[precision]", "eval.num_samples=3"], "precision and recall need more than 3 samples"),
        (["eval.bootstrap=9", "eval.metrics=[kid]"], "an interval of fd, which eval.metrics does not name"),
        (["eval.bootstrap=1"], "a spread needs at least 2 resamplings"),
        (["eval.features=absent.pt"], r"there is no TorchScript file absent\.pt"),
    ],
)
def test_what_could_not_end_well_is_refused_before_sampling(digits, tmp_path, overrides, message):
    np.savez(tmp_path / "r.npz", mu=np.zeros(5), sigma=np.eye(5))
    with pytest.raises(UserError, match=message):
        Reference.open(tiny(digits, tmp_path, *[o.format(npz=tmp_path / "r.npz") for o in overrides]), CPU)


def test_an_unknown_extractor_is_refused_with_those_there_are(digits, tmp_path):
    with pytest.raises(UserError, match=r"'inceptoin' is no extractor .*auto, inception, dinov2, effnet_lite0, pix"):
        tiny(digits, tmp_path, "eval.features=inceptoin")


def test_labels_that_the_model_has_no_class_for_are_refused(digits, tmp_path):
    with pytest.raises(UserError, match=r"num_classes is 9, but .*holdout/manifest.json has 10 classes; name another"):
        Reference.open(tiny(digits, tmp_path, "model.num_classes=9"), CPU)
    assert Reference.open(tiny(digits, tmp_path, "model.num_classes=0"), CPU).labels.max() == 9
    unnamed = tmp_path / "holdout"
    shutil.copytree(digits / "holdout", unnamed)
    (unnamed / "manifest.json").unlink()
    index(str(unnamed))  # knows of no classes
    with pytest.raises(UserError, match=r"manifest.json has labels up to 9, but model.num_classes is 9, so"):
        Reference.open(tiny(digits, tmp_path, "model.num_classes=9", f"data.holdout={unnamed}/manifest.json"), CPU)


def test_a_split_of_one_image_is_refused_as_what_all_ranks_meet_so_that_a_training_goes_on(tmp_path):
    manifest = data_set(tmp_path, [{"png": picture(0, 8, 1), "cls": b"0"}])
    with pytest.raises(SharedError, match="a covariance needs at least 2 images, and there are 1"):
        Reference.open(tiny(tmp_path, tmp_path, f"data.holdout={manifest.path}", "eval.metrics=[bpd]"), CPU)
