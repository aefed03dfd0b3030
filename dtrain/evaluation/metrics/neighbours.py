"""Improved precision and recall: how many samples lie where data is, and how much of the data where samples are.

Kynkäänniemi, Karras, Laine, Lehtinen & Aila (2019), "Improved precision and recall metric for assessing generative
models". Distances are made tile by tile: of 50,000 × 50,000 only 32 MB exist at a time.
"""

import torch
from torch import Tensor

from dtrain.evaluation.requirements import NEIGHBOURS

ROWS, COLUMNS = 1024, 8192  # of a tile of distances


def precision_and_recall(features: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """(precision, recall) of features (N, D) against reference (M, D), N, M > k.

    Precision is the share of features within the ball around some reference point that reaches its k-th nearest other
    reference point; recall the same with the sets exchanged. Computed in the features' dtype.
    """
    # Distances come from a·b, which loses digits where vectors are long against their distances: take out the mean.
    centre = reference.mean(0, keepdim=True)
    features, reference = features - centre, reference - centre
    precision = _share_covered(features, reference, radii(reference, k))
    recall = _share_covered(reference, features, radii(features, k))
    return precision, recall


def radii(points: Tensor, k: int) -> Tensor:
    """Distance of each point (N, D) to its k-th nearest other, (N,)."""
    found = []
    for rows in points.split(ROWS):
        nearest = rows.new_full((len(rows), k + 1), torch.inf)  # itself is one of them
        for columns in points.split(COLUMNS):
            both = torch.cat([nearest, torch.cdist(rows, columns)], dim=1)
            nearest = both.topk(k + 1, dim=1, largest=False).values
        found.append(nearest.max(dim=1).values)
    return torch.cat(found)


def _share_covered(points: Tensor, centres: Tensor, radius: Tensor) -> float:
    """The share of points (N, D) within `radius` (M,) of one of the centres (M, D)."""
    covered = 0
    for rows in points.split(ROWS):
        inside = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        for columns, reach in zip(centres.split(COLUMNS), radius.split(COLUMNS), strict=True):
            inside |= (torch.cdist(rows, columns) <= reach).any(1)
        covered += int(inside.sum())
    return covered / len(points)
