"""How many samples lie where data is, and how much of the data where samples are: by balls around real images.

Improved precision and recall: Kynkäänniemi, Karras, Laine, Lehtinen & Aila (2019), "Improved precision and recall
metric for assessing generative models". Density and coverage: Naeem, Oh, Uh, Choi & Yoo (2020), "Reliable fidelity and
diversity metrics for generative models". Memorisation is by the same balls, around training images. Distances are made
tile by tile: of 50,000 × 50,000 only 32 MB exist at once.
"""

import torch
from torch import Tensor

from dtrain.evaluation.requirements import NEIGHBOURS, NEIGHBOURS_OF_DENSITY

ROWS, COLUMNS = 1024, 8192  # of a tile of distances


def precision_and_recall(features: Tensor, reference: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """(precision, recall) of features (N, D) against reference (M, D), N, M > k.

    Precision is the share of features within the ball around some reference point that reaches its k-th nearest other
    reference point; recall the same with the sets exchanged. Computed in the features' dtype.
    """
    features, reference = _centred(features, reference)
    precision = _share_covered(features, reference, radii(reference, k))
    recall = _share_covered(reference, features, radii(features, k))
    return precision, recall


def density_and_coverage(features: Tensor, reference: Tensor, k: int = NEIGHBOURS_OF_DENSITY) -> tuple[float, float]:
    """(density, coverage) of features (N, D) against reference (M, D), M > k.

    With a ball around each reference point that reaches its k-th nearest other one: density is the number of balls that
    a feature lies in, on average, divided by k (an outlier of the data adds one ball, while to precision it may add all
    of a region; above 1 where samples crowd where data is dense). Coverage is the share of balls with a feature in
    them; for samples of the data's own law it is 1 − Π_{i=1…k} (M − i)/(M + N − i) in expectation.
    """
    features, reference = _centred(features, reference)
    balls, met = 0, 0
    for centres, reach in zip(reference.split(ROWS), radii(reference, k).split(ROWS), strict=True):
        found = torch.zeros(len(centres), dtype=torch.bool, device=centres.device)
        for points in features.split(COLUMNS):
            inside = torch.cdist(centres, points) <= reach[:, None]
            balls += int(inside.sum())
            found |= inside.any(1)
        met += int(found.sum())
    return balls / (k * len(features)), met / len(reference)


def memorisation(features: Tensor, training: Tensor) -> float:
    """The share of features (N, D) that are nearer to some training point (M, D) than that one's nearest other is.

    1 where every sample is a copy of a training image. Points of the data's own law lie so near by chance too: what
    held-out images have is the value of a model that has memorised nothing. A sample as near counts, so that a copy of
    a training image which is there twice does.
    """
    features, training = _centred(features, training)
    reach, copies = radii(training, 1), 0
    for rows in features.split(ROWS):
        distance, nearest = rows.new_full((len(rows),), torch.inf), torch.zeros(len(rows), dtype=torch.int64)
        for number, columns in enumerate(training.split(COLUMNS)):
            found = torch.cdist(rows, columns).min(1)
            closer = found.values < distance
            distance = torch.where(closer, found.values, distance)
            nearest = torch.where(closer.cpu(), number * COLUMNS + found.indices.cpu(), nearest)
        copies += int((distance <= reach[nearest.to(reach.device)]).sum())
    return copies / len(features)


def _centred(features: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Both without the second one's mean: distances come from a·b, which loses digits where vectors are long."""
    centre = reference.mean(0, keepdim=True)
    return features - centre, reference - centre


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
