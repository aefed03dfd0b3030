"""The whole data plane on real photographs, against webdataset's own pipeline.

Needs DTRAIN_CIFAR10, a folder of CIFAR-10 as WebDataset shards of JPEG files with `cls` labels.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from dtrain.data.loader import train_batches
from dtrain.data.shards.indexing import index
from dtrain.data.stream import read_split
from tests.data.shard_files import configuration

CIFAR10 = os.environ.get("DTRAIN_CIFAR10")
pytestmark = pytest.mark.skipif(not CIFAR10, reason="DTRAIN_CIFAR10 names no folder of CIFAR-10 shards")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar10")
    shutil.copy(sorted(Path(CIFAR10).glob("*.tar"))[3], folder)
    return folder, index(str(folder))


def by_webdataset(folder, count: int):
    """Pixels (n, 3, 32, 32) and labels of the first samples; webdataset decodes with Pillow."""
    url = str(next(folder.glob("*.tar")))
    pipeline = webdataset.WebDataset(url, shardshuffle=False, nodesplitter=None).decode("rgb8").to_tuple("jpg", "cls")
    images, labels = zip(*pipeline.slice(count), strict=True)
    return np.stack(images).transpose(0, 3, 1, 2), list(labels)


def test_photographs_are_read_as_webdataset_reads_them(photographs):
    folder, manifest = photographs
    expected, labels = by_webdataset(folder, 2000)
    assert manifest.fields == ["cls", "jpg"]
    assert manifest.samples == len(labels)
    images, found = read_split(manifest, folder, 32, 3, 0, manifest.samples)
    assert found.tolist() == labels
    # Pillow and torchvision each bring a libjpeg-turbo; decoders may differ by a level.
    assert np.abs(images.numpy().astype(int) - expected).max() <= 1


def test_an_epoch_of_training_batches_is_the_shard(photographs):
    folder, manifest = photographs
    config = configuration(folder, 100, num_classes=10, image_size=32, shuffle_window=64)
    expected, labels = by_webdataset(folder, manifest.samples)
    batches = train_batches(config, manifest, 0, 1, 0)
    sums, seen = [], []
    for _ in range(manifest.samples // 100):
        batch = next(batches)
        sums += batch["image"].sum((1, 2, 3), dtype=torch.int64).tolist()
        seen += batch["label"].tolist()
    batches.close()
    assert sorted(seen) == sorted(labels)
    fingerprint = sorted(expected.astype(np.int64).sum((1, 2, 3)).tolist())
    assert np.abs(np.array(sorted(sums)) - fingerprint).max() <= 100
