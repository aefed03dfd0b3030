"""What every batch of a training holds, as its parts declare it. Imports no torch and no NumPy but for plug-ins.

The stream, its room in /dev/shm and the rows that stand in for a batch all follow from this.
"""

from typing import NamedTuple

from dtrain.config import Config, Section, Text
from dtrain.config.conditions import Picture as PictureSection
from dtrain.data.fields.caption import Caption
from dtrain.data.fields.embedded import Embedded, TokenCounts
from dtrain.data.fields.field import Field, Label, Picture, arrays_of
from dtrain.data.fields.moments import Moments
from dtrain.data.fields.pairs import Drawn, NoiseOfKey
from dtrain.data.fields.tokens import Bytes, OfFolder
from dtrain.draws import Draw, Purpose, purpose_of
from dtrain.errors import UserError


class Declared(NamedTuple):
    """fields: read from each sample. draws: random numbers of each row. Both are in a batch under their names.

    generator: the run's, which says where normals are drawn. flip: whether a row says if it is to be mirrored.
    """

    fields: tuple[Field, ...]
    draws: tuple[Draw, ...]
    generator: int
    flip: bool

    @property
    def sent(self) -> tuple[Draw, ...]:
        """The draws that come with a batch. As many numbers as a picture has are drawn on its device instead."""
        return tuple(draw for draw in self.draws if self.generator == 1 or draw.law != "normal")

    @property
    def extensions(self) -> list[tuple[str, ...]]:
        """The files that each field may be."""
        return [field.extensions for field in self.fields]

    @property
    def row_bytes(self) -> list[int]:
        """The bytes of a row of each tensor of a batch on its way to its device, `k` included."""
        mirrored = [1] if self.flip else []
        return [8, *mirrored, *(field.row_bytes for field in self.fields), *(draw.row_bytes for draw in self.sent)]


def declared(config: Config) -> Declared:
    """Raises UserError where two parts call what they ask for alike."""
    data, diffusion = config.data, config.diffusion
    fields: list[Field] = []
    draws: list[Draw] = []
    if config.objective.diffuses:
        draws.append(Draw("time", Purpose.TIME, "stratified" if diffusion.stratified else "uniform"))
        if config.is_coupled:
            fields += [NoiseOfKey("noise", config.shape), Drawn("drawn", config.shape)]
        else:
            draws.append(Draw("noise", Purpose.NOISE, "normal", config.shape))
        draws += diffusion.draws(config.shape)
    if config.model.num_classes:
        fields.append(Label("label", config.model.num_classes))
        draws.append(Draw("drop", Purpose.LABEL_DROP, "uniform"))
    draws += config.model.draws().values()
    for name, array in data.arrays.items():
        fields += arrays_of(name, array.field, array.shape, array.dtype, array.ragged)
    fields += [section.build(config, name) for name, section in data.fields.items()]
    for name, section in (("", config.first_stage), *config.conditions.items(), ("", config.objective)):
        fields += fields_of(name, section, config)
        draws += _draws_of(name, section, config)
    if config.first_stage.reads_cache:
        fields.append(Moments("moments", config.shape))
    elif config.reads_pictures:
        fields.append(Picture("image", data.image_size, data.channels, data.upright))  # the dearest is read last
    names = ["k", "mirrored", *(field.name for field in fields), *(draw.name for draw in draws)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two parts of this config call something in a batch {min(twice)!r}; rename one")
    return Declared(tuple(fields), tuple(draws), config.run.generator, data.flip)


def fields_of(name: str, section: Section, config: Config) -> list[Field]:
    """The fields of the part that this section describes, of conditions by their name."""
    if isinstance(section, PictureSection):
        return [shown(name, section, config)] if section.field else []
    if not isinstance(section, Text):
        return section.fields(config)
    if section.cached is None:
        return [caption(name, section)]
    tokens = Embedded(name, section.length, section.width, section.cached)
    return [tokens, TokenCounts(tokens)]


def shown(name: str, section: PictureSection, config: Config) -> Picture:
    """The files from which the condition of this name takes its pictures: its own, or the image itself."""
    data = config.data
    if section.field is None:
        return Picture("image", data.image_size, data.channels, data.upright)
    return Picture(name, data.image_size, section.channels(data.channels), data.upright, (section.field,))


def caption(name: str, section: Text) -> Caption:
    """Captions as the condition of this name reads them."""
    return Caption(name, section.field, section.length, Bytes() if section.trained else OfFolder(section.encoder))


def _draws_of(name: str, section: Section, config: Config) -> list[Draw]:
    if isinstance(section, Text):
        return [Draw(f"{name}_drop", purpose_of(f"conditions.{name}.drop"), "uniform")]
    if isinstance(section, PictureSection):
        wanted = ("drop", "amount") if section.amount else ("drop",)
        return [Draw(f"{name}_{what}", purpose_of(f"conditions.{name}.{what}"), "uniform") for what in wanted]
    return section.draws(config)
