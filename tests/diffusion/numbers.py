"""A process, normal numbers and perfect outputs, for tests of processes and objectives."""

import numpy as np
import torch

from dtrain.diffusion.gaussian import GaussianDiffusion
from dtrain.diffusion.schedule import linear

PROCESS = GaussianDiffusion(linear(1000))


def normal(*shape, seed=0):
    """Standard normal float32 numbers of this shape, from NumPy's generator."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape, dtype=np.float32))


def perfect_output(x0, noise, t, prediction):
    """What a perfect network returns at timestep t of PROCESS, from the definitions."""
    alpha, sigma = float(PROCESS.schedule.alpha[t]), float(PROCESS.schedule.sigma[t])
    return {"eps": noise, "x0": x0, "v": alpha * noise - sigma * x0}[prediction]
