"""Gamma numbers out of standard normals: the quantile of the same probability, read from a table.

A gamma number u of shape k is k (1 + r)³ with r near normal (Wilson & Hilferty 1931), so y = 3 √k r is near the normal
number z itself, and a smooth function of it. The table has y and its slope at knots of z; between them a cubic takes
sums and products alone. So the numbers follow from those of a key without rejection, at the same cost for all, and
float64 has the same bits on every device. ε = (u − k)/√k is y (1 + r + r²/3): nothing large is subtracted.
"""

import math
from functools import cached_property

import torch
from torch import Tensor

from dtrain.diffusion.tables import on_device

END, EACH = 7, 8  # knots of z from −END to END, so many in each unit
KNOTS = 2 * END * EACH + 1
LEAST = 1.0  # shape; below it the law has a pole
LARGE = 1000.0  # shapes whose quantiles an expansion gives
_NEWTON = 40  # steps at most: far tails of small shapes take most


class GammaLaw:
    """ε = (u − k)/√k of u ~ Γ(k, 1), of mean 0 and variance 1, for each of some shapes k, float64 (K,) of LEAST on."""

    def __init__(self, shapes: Tensor):
        assert shapes.min() >= LEAST
        self.shapes = shapes

    def standardised(self, z: Tensor, number: Tensor | int) -> Tensor:
        """ε, float64, of standard normals z (N, …), of the shape of this number or those of numbers int64 (N,)."""
        values, slopes, width = (on_device(one, z.device) for one in self._tables)
        if isinstance(number, int):
            number = torch.full((len(z),), number, device=z.device)
        number = number.view(-1, *[1] * (z.dim() - 1))
        at = (z.double().clamp(-END, END) + END) * EACH
        left = at.floor().clamp(max=KNOTS - 2)
        f = at - left
        index = number * KNOTS + left.long()  # (N, …)
        a, b = values[index], values[index + 1]
        da, db = slopes[index], slopes[index + 1]
        change = b - a
        y = a + f * (da + f * (3 * change - 2 * da - db + f * (da + db - 2 * change)))
        r = y * width[number]
        return y * (1 + r * (1 + r * (1 / 3)))

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """y and its slope a knot, float64 (K · KNOTS,) each, and 1/(3 √k), (K,)."""
        z = torch.linspace(-END, END, KNOTS, dtype=torch.float64, device="cpu")[None]
        k = self.shapes[:, None]
        m = _log_quantile(k, z)
        y = 3 * k.sqrt() * torch.expm1(m / 3)
        slope = k.sqrt() * (m / 3 - 0.5 * z.square() - 0.5 * math.log(2 * math.pi) - _log_density(k, m)).exp()
        return y.flatten(), (slope / EACH).flatten(), 1 / (3 * self.shapes.sqrt())


def _log_quantile(k: Tensor, z: Tensor) -> Tensor:
    """m = ln(u/k), float64 (K, M), of k (K, 1) and z (1, M), with P(Γ(k, 1) < u) = Φ(z).

    Of large shapes an expansion in 1/√k; torch's incomplete gamma function is wrong there beyond 4.5 deviations.
    """
    found = torch.empty(len(k), z.shape[1], dtype=torch.float64, device="cpu")
    large = k[:, 0] >= LARGE
    found[large] = torch.log1p(_expansion(k[large], z) / k[large].sqrt())
    if not large.all():
        found[~large] = _solved(k[~large], z)
    return found


def _expansion(k: Tensor, z: Tensor) -> Tensor:
    """ε to the order of 1/k³ (Cornish & Fisher 1960): within 1.3e-9 to |z| = 7 at k = 1,000."""
    s = k.rsqrt()
    terms = (
        z,
        (z**2 - 1) / 3,
        (z**3 - 7 * z) / 36,
        -(3 * z**4 + 7 * z**2 - 16) / 810,
        (9 * z**5 + 256 * z**3 - 433 * z) / 38880,
        (12 * z**6 - 243 * z**4 - 923 * z**2 + 1472) / 204120,
        -(3753 * z**7 + 4353 * z**5 - 289517 * z**3 - 289717 * z) / 146966400,
    )
    return sum(s**order * term for order, term in enumerate(terms))


def _solved(k: Tensor, z: Tensor) -> Tensor:
    """By Newton's method on the logarithm of the nearer tail."""
    lower = z < 0
    wanted = torch.special.log_ndtr(-z.abs())
    normal = 1 - 1 / (9 * k) + z / (3 * k.sqrt())
    near_zero = (wanted + torch.lgamma(k + 1)) / k - k.log()  # u^k = P Γ(k + 1) for small u
    m = torch.where(normal > 0.3, 3 * normal.clamp(min=0.3).log(), near_zero)
    for _ in range(_NEWTON):
        u = k * m.exp()
        tail = torch.where(lower, torch.special.gammainc(k, u), torch.special.gammaincc(k, u))
        step = (tail.log() - wanted) * tail / _log_density(k, m).exp()
        moved = torch.where(lower, -step, step).clamp(-1, 1)
        m = m + moved
        if moved.abs().max() < 1e-15:
            break
    return m


def _log_density(k: Tensor, m: Tensor) -> Tensor:
    """ln of the density of m: k ln u − u − ln Γ(k) with u = k e^m, without the difference of large numbers."""
    stirling = 0.5 * (k / (2 * math.pi)).log() - 1 / (12 * k) + 1 / (360 * k**3)
    plain = k * k.log() - k - torch.lgamma(k)
    return k * (m - torch.expm1(m)) + torch.where(k > 100, stirling, plain)
