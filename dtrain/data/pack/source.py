"""What can be packed: `Source`, and what there is to choose of one.

Each source hands out small items in its own process, which a worker process turns into a sample's files.
"""

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.data.pack.fitness import CANNOT_ENCODE, FORMATS, Files, encoded, fit, image_field
from dtrain.data.pack.left_out import LeftOut
from dtrain.data.shards.sample_files import CAPTION_FIELD, LABEL_FIELD, class_number
from dtrain.errors import UserError

FORMS = (
    "a folder of pictures, or of class folders; a .parquet file or a folder of them; an .npz; "
    "the manifest.json of shards; sklearn:digits; sklearn:digit-pairs; torchvision:cifar10 and its like"
)


_CLASS = "{class}"  # in a template of captions


@dataclass(frozen=True)
class Choice:
    """What to take of a source that holds several things; None where there is nothing to choose.

    split: by its folder's or its files' name. label_column, image_column, caption_column: of a table. captions: those
    of the .txt files beside pictures. caption_template: of a caption that is made of the class, `{class}` in it.
    class_names: with commas between, of a source that has none. root: folder of torchvision's files. download: fetch
    them where they are missing.
    """

    split: str | None = None
    label_column: str | None = None
    image_column: str | None = None
    root: str | None = None
    download: bool = False
    captions: bool = False
    caption_column: str | None = None
    caption_template: str | None = None
    class_names: str | None = None

    def only(self, source: str, *options: str) -> None:
        """UserError for an option that was given and means nothing for this source."""
        for option, value in vars(self).items():
            if value and option not in options:
                raise UserError(f"--{option.replace('_', '-')} means nothing for {source}; leave it away")

    @property
    def request(self) -> dict[str, str | bool]:
        """What of it decides which samples are packed."""
        keys = ("split", "label_column", "image_column", "caption_column", "captions")
        keys += ("caption_template", "class_names")
        return {key: value for key in keys if (value := getattr(self, key)) not in (None, False)}


@dataclass(frozen=True)
class Source:
    """Image files, labelled or not, that can be packed.

    item(i): what `files` needs of the i-th sample; both it and `files` can go to another process.
    files(item): raises Unfit for a sample to be left out, which is reported as unfit(i, reason).
    content: hex digest that changes when the source does.
    foreign: its pictures were made elsewhere, so each is decoded, and left out where training would refuse it.
    left_out: what was seen at once not to be packed. notes: lines to show about what was taken.
    spool: for a source that can only be read from its beginning. Called with a folder to write to and a function of the
    samples done, it gives the `item` that then holds.
    """

    samples: int
    classes: list[str] | None
    content: str
    item: Callable[[int], Any]
    files: Callable[[Any], Files]
    foreign: bool = False
    unfit: Callable[[int, str], LeftOut] | None = None
    left_out: tuple[LeftOut, ...] = ()
    notes: tuple[str, ...] = ()
    spool: Callable[[Path, Callable[[int], None]], Callable[[int], Any]] | None = None

    def ready(self, form: str | None) -> "Source":
        """With `files` as they are packed: checked, and in the format `form`; one that has it stays as it is."""
        if self.foreign:
            return replace(self, files=partial(fit, self.files, form))
        if form is None:
            return self
        return replace(self, item=lambda i: (i, self.item(i)), files=partial(_encoded, self.files, form))


def arrays(
    images: np.ndarray,
    labels: np.ndarray | None,
    classes: list[str] | None,
    captions: list[str] | None = None,
    **more: Any,
) -> Source:
    """A source of uint8 pixels (N, H, W) or (N, H, W, 3), packed as PNG files, class numbers (N,) and N captions."""
    content = hashlib.sha256(images.tobytes())
    if labels is not None:
        content.update(labels.astype("<i8").tobytes())
    if captions is not None:
        content.update("\0".join(captions).encode())

    def item(i: int) -> tuple[np.ndarray, int | None, str | None]:
        return images[i], None if labels is None else int(labels[i]), None if captions is None else captions[i]

    return Source(len(images), classes, content.hexdigest(), item, _png, **more)


def _png(item: tuple[np.ndarray, int | None, str | None]) -> Files:
    from PIL import Image

    pixels, label, caption = item
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return captioned(labelled({"png": file.getvalue()}, label), caption)


def labelled(files: Files, label: int | None) -> Files:
    return files if label is None else files | {LABEL_FIELD: str(label).encode()}


def captioned(files: Files, caption: str | None) -> Files:
    return files if caption is None else files | {CAPTION_FIELD: caption.encode()}


def by_class(source: Source, names: str | None, template: str | None) -> Source:
    """With these names of its classes, and a caption of each sample's. Raises UserError for what cannot be."""
    classes = source.classes if names is None else [name.strip() for name in names.split(",")]
    if names is not None:
        if source.classes not in (None, classes) and any(not name.isdigit() for name in source.classes):
            raise UserError(f"--class-names: the classes have names already: {', '.join(source.classes[:5])}, …")
        if "" in classes or len(set(classes)) < len(classes):
            raise UserError(f"--class-names {names}: each class needs a name of its own")
        check_classes(classes, "class")
    if template is None:
        return replace(source, classes=classes)
    if _CLASS not in template:
        raise UserError(f"--caption-template {template!r} has no {_CLASS}, which stands for the name of the class")
    if classes is None:
        raise UserError("--caption-template needs classes with names; give them by --class-names")
    return replace(source, classes=classes, files=partial(_told, source.files, classes, template))


def _told(files: Callable[[Any], Files], classes: list[str], template: str, item: Any) -> Files:
    """Without a class, the caption is empty: an image without words."""
    sample = files(item)
    if CAPTION_FIELD in sample:
        raise UserError("--caption-template: the samples have captions already; leave it away")
    number = class_number(sample[LABEL_FIELD]) if LABEL_FIELD in sample else None
    if number is not None and number >= len(classes):
        raise UserError(f"a sample has the class {number}, and there are {len(classes)} names of classes; name all")
    return captioned(sample, "" if number is None else template.replace(_CLASS, classes[number]))


def _encoded(files: Callable[[Any], Files], form: str, item: tuple[int, Any]) -> Files:
    i, own = item
    sample = files(own)
    field = image_field(sample)
    if field is None or field in FORMATS[form]:
        return sample
    try:
        picture = encoded(sample.pop(field), form)
    except CANNOT_ENCODE as e:
        raise UserError(f"sample {i} of the source cannot be decoded ({e}); leave it out") from None
    return {FORMATS[form][0]: picture} | sample


def check_classes(classes: list[str], what: str) -> None:
    """Raises UserError for names that could be neither kept as JSON nor shown. what: what has such a name."""
    if unreadable := [name for name in classes if not name.isprintable()]:
        raise UserError(f"the {what} {unreadable[0]!r} has a name that cannot be kept; rename it")
