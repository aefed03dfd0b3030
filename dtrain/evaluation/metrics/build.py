"""From the names in `eval.metrics` to numbers."""

from torch import Tensor

from dtrain.config import Eval
from dtrain.evaluation.features.build import Extractor
from dtrain.evaluation.metrics.frechet import bootstrap_interval, fd_infinity, frechet_distance
from dtrain.evaluation.metrics.inception_score import inception_score
from dtrain.evaluation.metrics.kernel import kernel_distance
from dtrain.evaluation.metrics.neighbours import density_and_coverage, memorisation, precision_and_recall
from dtrain.evaluation.metrics.statistics import Statistics
from dtrain.evaluation.names import metric_name
from dtrain.evaluation.requirements import DENSITY, PRECISION


def compute(
    e: Eval,
    extractor: Extractor,
    statistics: Statistics,
    reference: Statistics | None,
    features: Tensor | None,
    reference_features: Tensor | None,
    training: Tensor | None = None,
    comparable: bool = True,
) -> dict[str, float]:
    """Every metric of `eval.metrics` under its journal name. Features where `needs_…` says so, (N, D) and (M, D).

    training: features of training images, for memorisation. comparable: whether the statistics compared with are of
    images resized as the samples are.

    Beside a value stands what is known of its spread: `fid_low` and `fid_high` (95 %, with eval.bootstrap), the `_std`
    over subsets of kid and is, the `_error` of fd_infinity's fit; and beside memorisation the
    `_held_out` images' own.
    """
    found: dict[str, float] = {}

    def put(metric: str, value: float, **spread: float) -> None:
        found[metric_name(metric, extractor.name, "", comparable)] = value
        found.update({metric_name(metric, extractor.name, suffix, comparable): s for suffix, s in spread.items()})

    if "fd" in e.metrics:
        distance = frechet_distance(statistics, reference)
        put("fd", distance)
        if e.bootstrap:
            low, high = bootstrap_interval(features, reference, e.seed, e.bootstrap, distance)
            put("fd", distance, low=low, high=high)
    if "fd_infinity" in e.metrics:
        extrapolated = fd_infinity(features, reference, e.seed)
        put("fd_infinity", extrapolated.value, error=extrapolated.error)
    if "kid" in e.metrics:
        kid = kernel_distance(features, reference_features, e.seed)
        put("kid", kid.mean, std=kid.std)
    for pair, computed in ((PRECISION, precision_and_recall), (DENSITY, density_and_coverage)):
        if set(pair) & set(e.metrics):
            for metric, value in zip(pair, computed(features, reference_features), strict=True):
                if metric in e.metrics:
                    put(metric, value)
    if "memorisation" in e.metrics:
        put("memorisation", memorisation(features, training), held_out=memorisation(reference_features, training))
    if "is" in e.metrics:
        score = inception_score(extractor.probabilities(features))
        put("is", score.mean, std=score.std)
    return found
