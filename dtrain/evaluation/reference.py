"""What samples are compared with: the features of a held-out split, computed by all ranks together or read from a file.

`dtrain reference SHARDS` writes a file beside the shards (`reference_origin.stored_path`). It names the data, the
extractor and the preprocessing it was made from; where one of them has changed it is stale and refused, never used or
replaced.
What an evaluation computes is kept too, for the next one (`reference_store`).
"""

import hashlib
import io
import json
from dataclasses import asdict, dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from dtrain import distributed
from dtrain.conditions.build import Said
from dtrain.config import Config, Data, Eval
from dtrain.data.declared import caption
from dtrain.data.fields.picture import normalize
from dtrain.data.fields.samples import read_captions, read_labels, read_split
from dtrain.data.shards import manifest as manifests
from dtrain.data.shards.cache import BlockCache, cache_of
from dtrain.data.shards.manifest import Manifest
from dtrain.data.shards.reader import ShardReader
from dtrain.data.shards.sample_files import IMAGE_FIELDS
from dtrain.errors import UserError
from dtrain.evaluation.control import HeldOutPictures
from dtrain.evaluation.embedding import embedded, of_training
from dtrain.evaluation.features.build import Extractor, check_finite, extractor
from dtrain.evaluation.generate import OnProgress, quiet, which_not_finite
from dtrain.evaluation.metrics.kept import KeptFeatures
from dtrain.evaluation.metrics.moments import MomentStream
from dtrain.evaluation.metrics.statistics import Statistics, read, save
from dtrain.evaluation.names import (
    OF_STATISTICS,
    about_reference,
    is_comparable,
    options_of,
    resize_of_reference,
)
from dtrain.evaluation.reference_origin import AS_IT_IS, Changed, Origin, preprocessing, stored_path
from dtrain.evaluation.reference_store import ReferenceStore
from dtrain.evaluation.requirements import check_asked, check_metrics, needs_reference_features, split_of


@dataclass(frozen=True, eq=False)
class Reference:
    """What samples are compared with; `Reference.open` reads it.

    extractor:  of `eval.features`
    manifest:   of the held-out split, None where statistics in a file are enough
    statistics: of `eval.reference`, else of the file beside the split, else computed from it, now or before
    hash:       of what `statistics` come from, for a metric's context
    labels:     int64 (M,) of the split, None without `data.holdout`
    captions:   of the split, M of each condition that is told in words
    pictures:   of the split, of each condition that is told pictures; None where none is
    features:   float32 (M, D) of the split on rank 0 where a metric needs them, else None
    training:   float32 (M, D) of training images on rank 0 where memorisation is measured, else None
    validation: its first `eval.validation_images`: float32 (n, C, H, W) in [−1, 1] and labels (n,); likewise
    changed:    what data.exif and data.scaling made of the split
    resize:     how the images behind another tool's statistics were resized for Inception; None where all is our own
    about:      a line that says what a distance to these is called, and why; None where that is no question
    kept:       a line that says where what was computed is kept; None where nothing was
    """

    extractor: Extractor
    manifest: Manifest | None
    statistics: Statistics
    hash: str
    labels: Tensor | None = None
    captions: Said = dataclass_field(default_factory=dict)
    pictures: HeldOutPictures | None = None
    features: Tensor | None = None
    training: Tensor | None = None
    validation: tuple[Tensor, Tensor] | None = None
    changed: Changed = AS_IT_IS
    resize: str | None = None
    about: str | None = None
    kept: str | None = None

    def of_validation(self) -> Said:
        """What the images of `validation` are told beside their labels."""
        rows = range(len(self.validation[0]))
        return dict(self.captions) | (self.pictures.of(rows) if self.pictures else {})

    @property
    def comparable(self) -> bool:
        """Whether the images behind the statistics were resized as the samples are."""
        return is_comparable(self.extractor.name, self.resize)

    @classmethod
    def open(cls, config: Config, device: torch.device, on_block: OnProgress = quiet) -> "Reference":
        """A collective; what one rank meets, all raise (`distributed.agree`).

        Raises UserError, before anything is computed, where an evaluation could not end well, and NotFinite.
        """
        data, e = config.data, config.eval
        # Every rank finds or fetches its weights: ranks of one machine wait for each other, machines may differ.
        found: Extractor = distributed.agree(
            extractor, e.features, data.image_size, data.channels, e.weights, device, e.resize
        )
        distributed.agree(check_asked, e)
        split = distributed.agree(split_of, config)
        distributed.agree(check_metrics, e, found, None if split is None else split.samples)
        held_out: dict[str, Any] = {}
        cache, changed = None, AS_IT_IS
        if split is not None:
            distributed.on_rank_0(manifests.check_shards, split, split.place)
            cache = distributed.agree(cache_of, data, split.place)  # its folder may be refused on one machine alone
            changed = distributed.on_rank_0(Changed.of, split, data.image_size, data.upright, data.scaling, cache)
            held_out["labels"] = distributed.agree(_labels, split, cache, config.model.num_classes)
            held_out["captions"] = distributed.agree(_captions, config, split, cache)
            held_out["pictures"] = HeldOutPictures(config, split, cache) if config.pictures else None
            first = min(e.validation_images, split.samples)
            size, channels, how = data.image_size, data.channels, (data.upright, data.scaling)
            images, labels = distributed.agree(read_split, split, split.place, size, channels, 0, first, cache, *how)
            held_out["validation"] = normalize(images), labels
        stored = distributed.on_rank_0(_stored, data, e, found, split, changed)
        keep = needs_reference_features(e)
        if stored is None or keep:
            computed, features, kept = _computed(data, found, split, changed, device, keep, cache, on_block)
            held_out |= {"features": features, "kept": kept}
        if "memorisation" in e.metrics:
            held_out["training"] = of_training(config, found, device, on_block)
        statistics, hash, resize, about = stored or (computed, split.hash, None, None)
        return cls(found, split, statistics, hash, **held_out, changed=changed, resize=resize, about=about)


def _computed(
    data: Data,
    features: Extractor,
    split: Manifest,
    changed: Changed,
    device: torch.device,
    keep: bool,
    cache: BlockCache | None,
    on_block: OnProgress,
) -> tuple[Statistics, Tensor | None, str | None]:
    """(statistics, features on rank 0 if they are to be kept, what to say of where they are) of the split.

    Of this evaluation or an earlier one. A collective.
    """
    store = ReferenceStore(
        Origin.of(split, features, data.image_size, data.channels, changed),
        split.path.parent,
        stored_path(split.path.parent, features, data.image_size, changed).stem,
        split.samples,
        features.dimensions,
    )
    found = distributed.on_rank_0(store.find, keep)
    if found is not None:
        path, statistics = found
        return statistics, store.features(path) if keep and distributed.rank() == 0 else None, None
    size, channels, how = data.image_size, data.channels, (data.upright, data.scaling)
    statistics, rows = compute(split, features, size, channels, device, keep, on_block, cache, *how)
    return statistics, rows, distributed.on_rank_0(store.keep, statistics, rows)


def _stored(
    data: Data, e: Eval, features: Extractor, split: Manifest | None, changed: Changed
) -> tuple[Statistics, str, str | None, str | None] | None:
    """Statistics in a file, their hash, how their images were resized, and what to say of that."""
    size, channels = data.image_size, data.channels
    path, manifest = Path(e.reference or ""), None
    if not e.reference:
        path, manifest = stored_path(split.path.parent, features, size, changed), split
        if not path.exists():
            return None
    resize = resize_of_reference(e, features.name, path)
    known = None if manifest is None else changed
    found = read_reference(path, features, size, channels, manifest, data.upright, data.scaling, known)
    about = about_reference(features.name, path, resize) if OF_STATISTICS & set(e.metrics) else None
    return *found, resize, about


def _labels(manifest: Manifest, cache: BlockCache | None, classes: int) -> Tensor:
    """int64 (M,) of a split. Raises UserError where one is no class of the model, of `classes`; 0: it has none."""
    labels = read_labels(manifest, manifest.place, cache)
    most = int(labels.max())
    if classes and most >= classes:  # the next one after the last would be drawn without a class
        raise UserError(
            f"{manifest.path} has labels up to {most}, but model.num_classes is {classes}, so they go from 0 to "
            f"{classes - 1}; name another data.holdout"
        )
    return labels


def _captions(config: Config, manifest: Manifest, cache: BlockCache | None) -> Said:
    """Of a split, M of each condition that is told in words."""
    return {
        name: read_captions(manifest, manifest.place, caption(name, section), cache)
        for name, section in config.texts.items()
    }


def read_reference(
    path: Path,
    features: Extractor,
    image_size: int,
    channels: int,
    manifest: Manifest | None = None,
    upright: bool = True,
    scaling: str = "bicubic",
    changed: Changed | None = None,
) -> tuple[Statistics, str]:
    """(statistics, hash) of a file of ours or another tool's (which can only be held to its dimensions).

    `manifest` is the data it must be of; by default the one that the file itself names, if that still exists. upright,
    scaling: how the run turns and scales pictures, which matters where it makes a difference to the data. changed: what
    it makes of `manifest`, where that is known already. Raises UserError for a stale or damaged file.
    """
    stored, named = read(path), manifest is None
    if stored.source:
        try:
            origin = Origin(**json.loads(stored.source))
        except (ValueError, TypeError):
            raise UserError(f"{path} is damaged (its source cannot be read); run `dtrain reference` again") from None
        if manifest is None and Path(origin.manifest).exists():
            manifest = manifests.load(origin.manifest)
        data = origin.data if manifest is None else manifest.hash
        said = Changed.said(origin.preprocessing)
        if manifest is None:
            changed = Changed(upright and said.upright, scaling == "bicubic" and said.bicubic)
        elif changed is None:
            changed = Changed.of(manifest, image_size, upright, scaling, None)
        now = Origin(origin.manifest, data, features.fingerprint, preprocessing(image_size, channels, changed))
        for part in ("data", "extractor", "preprocessing"):
            was, is_now = getattr(origin, part), getattr(now, part)
            if was != is_now:
                ignored = "" if upright else " --exif ignore"
                ignored += "" if scaling == "bicubic" else f" --scaling {scaling}"
                other = named and changed != said  # which has a name of its own
                then = "and name its file in eval.reference" if other else "again"
                raise UserError(
                    f"{path} is stale: its {part} was {was[:40]}, is {is_now[:40]}; "
                    f"run `dtrain reference {Path(origin.manifest).parent} {options_of(features.name)}{ignored}` {then}"
                )
    if stored.statistics.dimensions != features.dimensions:
        raise UserError(
            f"{path} holds statistics of {stored.statistics.dimensions} dimensions, but {features.name} has "
            f"{features.dimensions}; they are of other features"
        )
    if stored.source:
        return stored.statistics, origin.data  # as if it had been computed on the spot
    with open(path, "rb") as f:
        return stored.statistics, hashlib.file_digest(f, "sha256").hexdigest()


def compute(
    manifest: Manifest,
    features: Extractor,
    image_size: int,
    channels: int,
    device: torch.device,
    keep: bool = False,
    on_block: OnProgress = quiet,
    cache: BlockCache | None = None,
    upright: bool = True,
    scaling: str = "bicubic",
) -> tuple[Statistics, Tensor | None]:
    """(statistics, kept features on rank 0) of a whole split. A collective; each rank reads its share.

    Raises NotFinite where features are no finite numbers.
    """
    moments = MomentStream(features.dimensions, device)
    kept = KeptFeatures(features.dimensions, device)

    def embed() -> list[int]:
        bad: list[int] = []
        size = image_size, channels
        how = device, on_block, cache, upright, scaling
        for number, first, found in embedded(manifest, manifest.place, features, *size, *how):
            bad += [first + row for row in which_not_finite(found)]
            moments.update(found)
            if keep:
                kept.update(number, found)
        return bad

    bad = distributed.agree(embed)  # an image that cannot be read is one rank's to find
    check_finite(bad, manifest.samples, f"images of {manifest.path}", features.name)
    return moments.compute(), kept.gather() if keep else None


def make(
    shards: str,
    name: str,
    weights: str | None,
    image_size: int | None,
    out: Path | None,
    on_block: OnProgress = quiet,
    upright: bool = True,
    resize: str | None = None,
    scaling: str = "bicubic",
) -> str:
    """`dtrain reference`: write the statistics of a split; what was done, in one line. A collective.

    shards: a folder with a manifest.json, or the manifest. image_size: default, the shorter side of the first image.
    upright: pictures are turned as their EXIF data say. scaling: as `data.scaling`.
    resize: as `eval.resize`.
    """
    path = Path(shards) / "manifest.json" if Path(shards).is_dir() else Path(shards)
    manifest = distributed.agree(manifests.load, path)
    distributed.on_rank_0(manifests.check_shards, manifest, path.parent)
    size, channels = distributed.agree(_first_image, manifest)
    size = image_size or size
    device = distributed.device()
    features = distributed.agree(extractor, name, size, channels, weights, device, resize)
    changed = distributed.on_rank_0(Changed.of, manifest, size, upright, scaling, None)
    origin = Origin.of(manifest, features, size, channels, changed)
    target = out or stored_path(path.parent, features, size, changed)
    how = {"upright": upright, "scaling": scaling}
    statistics, _ = compute(manifest, features, size, channels, device, on_block=on_block, **how)

    def write() -> None:
        try:
            save(statistics, target, origin.fingerprint, json.dumps(asdict(origin)))
        except OSError as e:
            raise UserError(f"cannot write {target}: {e.strerror}; name a writable place with --out") from None

    distributed.on_rank_0(write)
    return (
        f"{target}: {features.name} of {statistics.count:,} images at {size} pixels, {features.dimensions} dimensions"
    )


def _first_image(manifest: Manifest) -> tuple[int, int]:
    """(shorter side in pixels, channels) of a split's first image, taken for all."""
    reader = ShardReader(manifest, manifest.path.parent)
    for field, data in reader.read(0, IMAGE_FIELDS).items():
        try:
            picture = Image.open(io.BytesIO(data))
        except OSError:
            raise UserError(f"{reader.name(0, field)} is no image that can be read; restore it") from None
        return min(picture.size), 1 if picture.mode in ("1", "L") else 3
    raise UserError(f"{reader.name(0)} is of a sample without a jpg, jpeg or png; pack the shard without it")
