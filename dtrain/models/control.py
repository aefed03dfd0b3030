"""A backbone that obeys pictures: trained copies of its first half beside it, itself frozen (Zhang et al. 2023).

    h_i = base_i(h_{i−1}) + scale · zero_i(copy_i),   copy_0 = what the base begins with + zero(convolutions(picture))

Every zero layer begins at 0, so at the beginning the answer is the base's, bit for bit. For a DiT each block of the
copy adds to the same block of the base (as in PixArt-δ, Chen et al. 2024), for a UNet each place of its way down to
what the way up takes from there, and the middle to the middle. Shapes: N rows, S side of the picture in pixels.
"""

from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrain.models.dit import DiT
from dtrain.models.layers import Conv2d, Linear, xavier_uniform
from dtrain.models.on_base import OnBase
from dtrain.models.unet import UNet

HINT_CHANNELS = (16, 32, 96, 256)  # of the picture's convolutions; each after the first halves the side
SCALES = 2  # of a row: what is added is multiplied with the first, and by the second to the power of how shallow it is


class Hint(nn.Module):
    """From a picture to what is added to the copy's first activations; its last layer begins at 0.

    shrink: pixels of a side that become one. Halvings are convolutions; an odd factor that is left, an average.
    """

    def __init__(self, channels: int, out: int, shrink: int):
        super().__init__()
        halvings = (shrink & -shrink).bit_length() - 1  # how often 2 divides it
        widths = [HINT_CHANNELS[min(i, len(HINT_CHANNELS) - 1)] for i in range(halvings + 1)]
        self.average = shrink >> halvings
        self.conv_in = Conv2d(channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for width, wider in pairwise(widths):
            self.blocks.append(Conv2d(width, width, 3, padding=1))
            self.blocks.append(Conv2d(width, wider, 3, padding=1, stride=2))
        self.conv_out = Conv2d(widths[-1], out, 3, padding=1)

    def forward(self, picture: Tensor) -> Tensor:
        """(N, c, S, S) in [0, 1] → (N, out, S / shrink, S / shrink)."""
        h = F.silu(self.conv_in(picture.to(self.conv_in.weight.dtype)))
        for block in self.blocks:
            h = F.silu(block(h))
        return self.conv_out(F.avg_pool2d(h, self.average) if self.average > 1 else h)


class DiTCopy(DiT):
    """The first half of a DiT's blocks, with a zero layer behind each. sizes: as of `DiT`, of the whole base."""

    def __init__(self, *args, depth: int, picture: tuple[int, int], **sizes):
        """picture: its channels and its side."""
        super().__init__(*args, depth=(depth + 1) // 2, **sizes)
        del self.final_layer
        width = self.condition_width
        self.hint = Hint(picture[0], width, picture[1] * self.patch // self.image_size)
        self.joins = nn.ModuleList(Linear(width, width) for _ in self.blocks)

    def forward(self, picture: Tensor, x: Tensor, t: Tensor, y: Tensor | None = None, **condition: Tensor):
        """What is to be added to the base's blocks, (N, T, D) each."""
        x, c, told = self.embedded(x, t, y, condition)
        x = x + self.hint(picture).flatten(2).transpose(1, 2)  # (N, T, D)
        rotation, found = self.rotation(x), []
        for number, join in enumerate(self.joins):
            x = self.called(number, x, c, told, y, rotation)
            found.append(join(x))
        return found


class UNetCopy(UNet):
    """A UNet's way down and its middle, with a zero layer behind each that the way up takes. sizes: as of `UNet`."""

    def __init__(self, *args, picture: tuple[int, int], **sizes):
        """picture: its channels and its side."""
        super().__init__(*args, **sizes)
        channels = [self.width]
        for level in self.down:
            out = level.blocks[0].conv2.out_channels
            channels += [out] * (len(level.blocks) + (level.resample is not None))
        del self.up, self.norm_out, self.conv_out
        self.hint = Hint(picture[0], self.width, picture[1] // self.image_size)
        self.joins = nn.ModuleList(Conv2d(n, n, 1) for n in [*channels, channels[-1]])

    def forward(
        self, picture: Tensor, x: Tensor, t: Tensor, y: Tensor | None = None, keys: Tensor | None = None, **condition
    ):
        """What is to be added to what the base's way up takes, and to its middle, (N, C, H, W) each."""
        found = self.encoded(x, self.context(t, y, keys, condition), self.hint(picture))
        return [join(h) for h, join in zip(found, self.joins, strict=True)]


class Controlled(OnBase):
    """A frozen base with a trained copy for each picture that it is told; its parameters are those of the copies."""

    def __init__(self, copies: dict[str, nn.Module]):
        super().__init__()
        self.copies = nn.ModuleDict(copies)

    @property
    def activation_checkpointing(self) -> bool:
        return next(iter(self.copies.values())).activation_checkpointing

    @activation_checkpointing.setter
    def activation_checkpointing(self, value: bool) -> None:
        for copy in self.copies.values():
            copy.activation_checkpointing = value

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor | None = None, keys: Tensor | None = None, **condition: Tensor
    ) -> Tensor:
        """As the base's. Of each picture `NAME`: NAME (N, c, S, S) in [0, 1] and NAME_scale (N, 2).

        NAME_scale: a row whose first is 0 is the base's alone; the second multiplies what the first connection adds,
        its root what the middle one adds, and not what the last one adds.
        """
        told = {name: value for name, value in condition.items() if name.removesuffix("_scale") not in self.copies}
        more = {"y": y} | ({} if keys is None else {"keys": keys})
        added: list[Tensor] = []
        for name, copy in self.copies.items():
            found = copy(condition[name], x, t, **more, **told)
            scaled = [_scaled(one, condition[f"{name}_scale"], i, len(found)) for i, one in enumerate(found)]
            added = [a + b for a, b in zip(added, scaled, strict=True)] if added else scaled
        half = added[0].dtype == torch.bfloat16 and not x.is_meta  # the base computes its products as the copies do
        with torch.autocast(x.device.type, torch.bfloat16) if half else nullcontext():
            return self.base(x, t, y, added=added, **told)

    def initial_value(self, name: str, shape: tuple[int, ...], seed: int) -> Tensor:
        """What a parameter of a copy begins as: the base's own of that name, or 0 where it joins or ends the hint."""
        _, _, local = name.removeprefix("copies.").partition(".")
        if local.startswith(("joins.", "hint.conv_out.")) or (local.startswith("hint.") and local.endswith(".bias")):
            return torch.zeros(shape)
        if local.startswith("hint."):
            return xavier_uniform(name, shape, seed)
        return self.base.get_parameter(local).detach().float().cpu()


def _scaled(added: Tensor, scale: Tensor, number: int, of: int) -> Tensor:
    """What connection `number` adds: exactly 0 in rows whose scale is 0, and unchanged where both numbers are 1."""
    shallow = 1 - number / (of - 1) if of > 1 else 0.0
    factor = (scale[:, 0] * scale[:, 1] ** shallow).to(added.dtype).view(-1, *[1] * (added.dim() - 1))
    return torch.where(factor == 0, 0, added * factor)
