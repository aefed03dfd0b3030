"""torchvision's small labelled data sets, read by its own classes from files that are there."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtrain.data.pack.source import Choice, Source, arrays
from dtrain.errors import UserError

ROOT = "data/torchvision"


@dataclass(frozen=True)
class _Set:
    """cls: in torchvision.datasets. files: what lies in the root. splits: the first is the default."""

    cls: str
    files: str
    splits: tuple[str, ...] = ("train", "test")
    by_name: bool = False  # the class takes `split`, others `train`


_IDX = "/raw/ with train-images-idx3-ubyte and the three files beside it, unpacked"
SETS = {
    "cifar10": _Set("CIFAR10", "cifar-10-batches-py/ (from cifar-10-python.tar.gz)"),
    "cifar100": _Set("CIFAR100", "cifar-100-python/ (from cifar-100-python.tar.gz)"),
    "mnist": _Set("MNIST", f"MNIST{_IDX}"),
    "fashionmnist": _Set("FashionMNIST", f"FashionMNIST{_IDX}"),
    "kmnist": _Set("KMNIST", f"KMNIST{_IDX}"),
    "svhn": _Set("SVHN", "train_32x32.mat, test_32x32.mat or extra_32x32.mat", ("train", "test", "extra"), True),
    "stl10": _Set("STL10", "stl10_binary/ (from stl10_binary.tar.gz)", ("train", "test", "unlabeled"), True),
    "usps": _Set("USPS", "usps.bz2 and usps.t.bz2"),
}


def torchvision_set(name: str, choice: Choice) -> Source:
    """One split of a data set, its pixels as PNG. Raises UserError where it is unknown or its files are not there."""
    if name not in SETS:
        raise UserError(f"torchvision:{name} is not one of {', '.join(f'torchvision:{n}' for n in SETS)}")
    from torchvision import datasets

    known = SETS[name]
    split = choice.split or known.splits[0]
    if split not in known.splits:
        raise UserError(f"torchvision:{name} has no split {split}; it holds {', '.join(known.splits)}")
    root = Path(choice.root or ROOT)
    which = {"split": split} if known.by_name else {"train": split == "train"}
    try:
        if choice.download:
            root.mkdir(parents=True, exist_ok=True)
        found = getattr(datasets, known.cls)(root, **which, download=choice.download)
    # Its classes say by all of these that files are missing, cut off, or of another check sum.
    except (RuntimeError, OSError, ValueError, AssertionError, EOFError, KeyError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        if choice.download:
            raise UserError(f"torchvision:{name} could not be fetched into {root} ({reason}); try again") from None
        raise UserError(
            f"torchvision:{name} is not whole in {root}: put {known.files} there, name another folder with --root, or "
            "fetch it with --download"
        ) from None

    images = np.ascontiguousarray(found.data)  # (N, H, W), (N, H, W, 3) or (N, 3, H, W)
    if images.ndim == 4 and images.shape[1] == 3:
        images = np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    labels = np.asarray(found.targets if hasattr(found, "targets") else found.labels, dtype=np.int64)
    beside = ", ".join(s for s in known.splits if s != split)
    notes = (f"took the split {split}; beside it: {beside}",)
    if labels.max(initial=-1) < 0:
        return arrays(images, None, None, notes=notes)
    classes = list(getattr(found, "classes", None) or (str(n) for n in range(int(labels.max()) + 1)))
    return arrays(images, labels, classes, notes=notes)
