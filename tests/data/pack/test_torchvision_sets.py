"""torchvision's data sets from tiny files in their real formats, read by its own classes; nothing is fetched."""

import hashlib
import io
import pickle
import struct

import numpy as np
import pytest
import scipy.io
from PIL import Image
from torchvision import datasets

from dtrain.cli import main
from dtrain.data.pack.pack import pack
from dtrain.data.pack.source import Choice
from dtrain.errors import UserError
from tests.data.shard_files import samples_of

RNG = np.random.default_rng(0)


def idx(array: np.ndarray) -> bytes:
    """Yann LeCun's format: a magic number, the sizes, the bytes."""
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("asked for the network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture
def mnist(tmp_path):
    made = {}
    for split, count in (("train", 12), ("t10k", 5)):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        folder = tmp_path / "root/FashionMNIST/raw"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{split}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels))
        made[split] = images, labels
    return tmp_path / "root", made


def pixels_of(folder) -> dict[bytes, int]:
    return {np.asarray(Image.open(io.BytesIO(s["png"]))).tobytes(): int(s["cls"]) for s in samples_of(folder)}


@pytest.mark.parametrize(("split", "part"), [(None, "train"), ("test", "t10k")])
def test_idx_files_are_packed_pixel_for_pixel_by_split(mnist, tmp_path, no_network, split, part):
    root, made = mnist
    choice = Choice(split=split, root=str(root))
    done = pack("torchvision:fashionmnist", tmp_path / "packed", choice=choice)
    images, labels = made[part]
    assert pixels_of(tmp_path / "packed/train") == {i.tobytes(): int(n) for i, n in zip(images, labels, strict=True)}
    assert done.classes == datasets.FashionMNIST.classes
    assert pack("torchvision:fashionmnist", tmp_path / "packed", choice=choice).kept


def test_cifar_batches_keep_their_colours_and_class_names(tmp_path, monkeypatch, no_network):
    """The published check sums are replaced by those of the tiny files; what reads them is torchvision's."""
    folder = tmp_path / "root/cifar-10-batches-py"
    folder.mkdir(parents=True)
    images = RNG.integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    parts = {
        "data_batch_1": {"data": images[:4].transpose(0, 3, 1, 2).reshape(4, -1), "labels": [3, 1, 4, 1]},
        "test_batch": {"data": images[4:].transpose(0, 3, 1, 2).reshape(2, -1), "labels": [5, 9]},
        "batches.meta": {"label_names": [f"kind {n}" for n in range(10)]},
    }
    sums = {}
    for name, part in parts.items():
        data = pickle.dumps(part)
        (folder / name).write_bytes(data)
        sums[name] = hashlib.md5(data).hexdigest()
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(datasets.CIFAR10, "meta", datasets.CIFAR10.meta | {"md5": sums["batches.meta"]})
    done = pack("torchvision:cifar10", tmp_path / "packed", choice=Choice(root=str(tmp_path / "root")))
    found = pixels_of(tmp_path / "packed/train")
    assert found == {image.tobytes(): n for image, n in zip(images[:4], [3, 1, 4, 1], strict=True)}
    assert done.classes == [f"kind {n}" for n in range(10)]
    assert done.notes == ("took the split train; beside it: test",)

    (folder / "data_batch_1").write_bytes(b"x")
    with pytest.raises(UserError, match=r"torchvision:cifar10 is not whole in .*root: put cifar-10-batches-py/"):
        pack("torchvision:cifar10", tmp_path / "other", choice=Choice(root=str(tmp_path / "root")))


def test_house_numbers_stored_colours_first_are_packed_colours_last(tmp_path, monkeypatch, no_network):
    images = RNG.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
    file = tmp_path / "train_32x32.mat"
    scipy.io.savemat(file, {"X": images.transpose(1, 2, 3, 0), "y": np.array([[1], [10], [3], [4], [9]])})
    known = datasets.SVHN.split_list
    entry = [*known["train"][:2], hashlib.md5(file.read_bytes()).hexdigest()]
    monkeypatch.setattr(datasets.SVHN, "split_list", known | {"train": entry})
    done = pack("torchvision:svhn", tmp_path / "packed", choice=Choice(root=str(tmp_path)))
    assert pixels_of(tmp_path / "packed/train") == {
        i.tobytes(): n for i, n in zip(images, [1, 0, 3, 4, 9], strict=True)
    }
    assert done.classes == [str(n) for n in range(10)]


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashionmnist", "kmnist", "svhn", "stl10", "usps"])
def test_files_that_are_not_there_are_one_line_and_never_fetched_unasked(tmp_path, no_network, name):
    message = rf"torchvision:{name} is not whole in .*root: put .* there, name another folder with --root, or fetch it"
    with pytest.raises(UserError, match=message):
        pack(f"torchvision:{name}", tmp_path / "packed", choice=Choice(root=str(tmp_path / "root")))
    assert list(tmp_path.iterdir()) == []


def test_unknown_names_and_splits_say_which_there_are(mnist, tmp_path):
    with pytest.raises(UserError, match=r"torchvision:cifar is not one of torchvision:cifar10, torchvision:cifar100, "):
        pack("torchvision:cifar", tmp_path / "packed")
    with pytest.raises(UserError, match=r"torchvision:mnist has no split val; it holds train, test"):
        pack("torchvision:mnist", tmp_path / "packed", choice=Choice(split="val"))
    with pytest.raises(UserError, match=r"--label-column means nothing for torchvision:mnist; leave it away"):
        pack("torchvision:mnist", tmp_path / "packed", choice=Choice(label_column="x"))


def test_the_command_packs_and_says_what_it_took(mnist, tmp_path, monkeypatch, capsys):
    root, _ = mnist
    command = ["pack", "torchvision:fashionmnist", str(tmp_path / "packed"), "--root", str(root), "--holdout", "2"]
    monkeypatch.setattr("sys.argv", ["dtrain", *command])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/packed: packed 10 samples for training and 2 held out",
        "took the split train; beside it: test",
        "pictures: 12 png",
        "classes: 0 T-shirt/top, 1 Trouser, 2 Pullover, 3 Dress, 4 Coat, 5 Sandal, 6 Shirt, 7 Sneaker, 8 Bag, "
        "9 Ankle boot",
    ]
