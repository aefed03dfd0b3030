"""What a network's output says about x_0 and ε: one 2 × 2 system, whatever the network predicts.

With x_t = α x_0 + σ ε, an output a·x_0 + b·ε is solved for both unknowns; its determinant is α b − σ a.
"""

from typing import NamedTuple

from torch import Tensor

Level = Tensor | float


class Apart(NamedTuple):
    """Two outputs for one x_t: x̂_0 is the first one's, and the noise of the next state the second one's."""

    output: Tensor
    renoise: Tensor


class Partly(NamedTuple):
    """An answer that counts where `anew` (N, 1, H, W) is true; elsewhere x_0 (N, C, H, W) is known."""

    answer: Tensor | Apart
    x0: Tensor
    anew: Tensor


def _mixture(prediction: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
    """(a, b): the output is a·x_0 + b·ε.

    v = α ε − σ x_0 is Salimans & Ho 2022; velocity = ε − x_0 is rectified flow (Liu et al. 2023); edm is −v of
    x_0/σ_data, where the levels are (√(1 − σ²)/σ_data, σ) (Karras et al. 2022).
    """
    if prediction == "edm":
        cos = (1 - sigma**2) ** 0.5
        return sigma * alpha / cos, -cos
    return {"eps": (0, 1), "x0": (1, 0), "v": (-sigma, alpha), "velocity": (-1, 1)}[prediction]


def target(prediction: str, x0: Tensor, noise: Tensor, alpha: Level, sigma: Level) -> Tensor:
    """What a perfect network would answer, were x_0 and ε known."""
    if prediction == "eps":
        return noise
    if prediction == "x0":
        return x0
    a, b = _mixture(prediction, alpha, sigma)
    return a * x0 + b * noise


def to_x0(prediction: str, output: Tensor, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
    """x̂_0. For ε it divides by α, so ε cannot be used where no signal is left."""
    if prediction == "x0":
        return output
    a, b = _mixture(prediction, alpha, sigma)
    return (b * x_t - sigma * output) / (alpha * b - sigma * a)


def to_eps(prediction: str, output: Tensor, x_t: Tensor, alpha: Level, sigma: Level) -> Tensor:
    """ε̂."""
    if prediction == "eps":
        return output
    a, b = _mixture(prediction, alpha, sigma)
    return (alpha * output - a * x_t) / (alpha * b - sigma * a)


def squared_error_weight(prediction: str, snr: Tensor, gamma: float) -> Tensor:
    """min-SNR-γ: the weight of the squared error of this prediction (Hang et al. 2023, section 3.4).

    All three are min(SNR, γ) times the squared error of x_0: ‖ε − ε̂‖² = SNR ‖x_0 − x̂_0‖² and
    ‖v − v̂‖² = (SNR + 1) ‖x_0 − x̂_0‖².
    """
    return snr.clamp(max=gamma) / {"eps": snr, "v": snr + 1, "x0": 1}[prediction]
