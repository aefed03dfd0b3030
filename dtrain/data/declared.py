"""What every batch of a training holds, as its parts declare it. Imports no torch and no NumPy but for plug-ins.

The stream, its room in /dev/shm and the rows that stand in for a batch all follow from this.
"""

from typing import NamedTuple

from dtrain.config import Config
from dtrain.data.fields.field import Array, Field, Label, Picture
from dtrain.data.fields.moments import Moments
from dtrain.draws import Draw, Purpose
from dtrain.errors import UserError


class Declared(NamedTuple):
    """fields: read from each sample. draws: random numbers of each row. Both come in a batch under their names."""

    fields: tuple[Field, ...]
    draws: tuple[Draw, ...]

    @property
    def extensions(self) -> list[tuple[str, ...]]:
        """The files that each field may be."""
        return [field.extensions for field in self.fields]

    @property
    def row_bytes(self) -> list[int]:
        """The bytes of a row of each tensor of a batch, `k` included."""
        return [8, *(field.row_bytes for field in self.fields), *(draw.row_bytes for draw in self.draws)]


def declared(config: Config) -> Declared:
    """Raises UserError where two parts call what they ask for alike."""
    data, diffusion = config.data, config.diffusion
    fields: list[Field] = []
    draws: list[Draw] = []
    if config.objective.diffuses:
        draws.append(Draw("time", Purpose.TIME, "stratified" if diffusion.stratified else "uniform"))
        draws.append(Draw("noise", Purpose.NOISE, "normal", config.shape))
    if config.model.num_classes:
        fields.append(Label("label", config.model.num_classes))
        draws.append(Draw("drop", Purpose.LABEL_DROP, "uniform"))
    draws += config.model.draws().values()
    fields += [Array(name, array.field, array.shape, array.dtype) for name, array in data.arrays.items()]
    fields += [section.build(config, name) for name, section in data.fields.items()]
    for section in (config.first_stage, *config.conditions.values(), config.objective):
        fields += section.fields(config)
        draws += section.draws(config)
    if config.first_stage.reads_cache:
        fields.append(Moments("moments", config.shape))
    else:
        fields.append(Picture("image", data.image_size, data.channels, data.upright))  # the dearest is read last
    names = ["k", *(field.name for field in fields), *(draw.name for draw in draws)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two parts of this config call something in a batch {min(twice)!r}; rename one")
    return Declared(tuple(fields), tuple(draws))
