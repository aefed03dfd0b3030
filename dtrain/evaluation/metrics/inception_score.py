"""Inception score: how sure a classifier is of each sample, and how many classes there are among them."""

import numpy as np
import torch
from torch import Tensor

from dtrain.evaluation.metrics.kernel import Spread
from dtrain.evaluation.requirements import SPLITS


def inception_score(probabilities: Tensor, splits: int = SPLITS) -> Spread:
    """exp E KL(p(y|x) ‖ p(y)) of class probabilities (N, classes), mean and standard deviation over N/splits in turn.

    Between 1 and the number of classes. Salimans et al. (2016), "Improved techniques for training GANs". Needs
    N ≥ splits; it rises with N.
    """
    p = probabilities.double()
    n = len(p)
    scores = []
    for i in range(splits):
        part = p[i * n // splits : (i + 1) * n // splits]
        divergence = (torch.xlogy(part, part) - torch.xlogy(part, part.mean(0, keepdim=True))).sum(1)
        scores.append(float(divergence.mean().exp()))
    return Spread(float(np.mean(scores)), float(np.std(scores)))
