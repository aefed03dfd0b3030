"""A flow's network with its time turned round: the same function of x and of the level of noise, by other weights.

Published flows (SiT, Ma et al. 2024) count the time s from noise, 0, to data, 1, and predict dx/ds = x_0 − ε. Here t
goes from data, 0, to noise, 1, and the network predicts dx/dt = ε − x_0. So s = 1 − t, and the answer has another sign:

    cos((1 − t) ω) = cos ω cos(t ω) + sin ω sin(t ω),   sin((1 − t) ω) = sin ω cos(t ω) − cos ω sin(t ω)

is a reflection of the pairs that the time embedder's first layer takes, and the sign goes into the last layer. Of a
network that predicts x_0 (JiT) no sign changes. Done twice it gives the weights that were there before.
"""

import torch
from torch import Tensor

from dtrain.models.dit import DiT
from dtrain.models.layers import time_frequencies
from dtrain.models.mmdit import MMDiT
from dtrain.models.unet import UNet


def time_turned(state: dict[str, Tensor], model: DiT | MMDiT | UNet, prediction: str = "velocity") -> dict[str, Tensor]:
    """The weights of a network that is told t in [0, 1], as those of one that is told 1 − t and predicts the opposite.

    state: name → tensor of this model's names and shapes; the answer has its dtypes, and is computed in float64.
    prediction: velocity | x0; x_0 is the same in both times.
    """
    time, last = "t_embedder.mlp.0.weight", "conv_out" if isinstance(model, UNet) else "final_layer.linear"
    of_cos, of_sin = state[time].double().chunk(2, dim=1)  # (D, F/2) each
    embedder, exact = model.t_embedder, torch.promote_types(torch.float32, state[time].dtype)
    frequencies = time_frequencies(embedder.frequencies, exact, embedder.shift).double()
    cos, sin = frequencies.cos(), frequencies.sin()
    turned = torch.cat([of_cos * cos + of_sin * sin, of_cos * sin - of_sin * cos], dim=1)
    signed = (f"{last}.weight", f"{last}.bias") if prediction == "velocity" else ()
    opposite = {name: -state[name] for name in signed}
    return state | opposite | {time: turned.to(state[time].dtype)}


def without_variance(state: dict[str, Tensor], model: DiT) -> dict[str, Tensor]:
    """Without the output's second half of channels, where the file has them and the model has not.

    SiT's networks keep those of DiT's learned variance, and nobody reads them.
    """
    channels, found = model.out_channels, dict(state)
    for part, wanted in model.final_layer.linear.named_parameters(prefix="final_layer.linear"):
        value = found.get(part)
        if value is not None and len(value) == 2 * len(wanted):
            found[part] = value.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)  # a patch's pixels first
    return found
