"""From the names in `eval.metrics` to numbers, and what each of them needs to be computed at all."""

from torch import Tensor

from dtrain.config import Eval
from dtrain.errors import UserError
from dtrain.evaluation.features import OF_THE_MODEL, Extractor, metric_name
from dtrain.evaluation.frechet import bootstrap_interval, fd_infinity, frechet_distance
from dtrain.evaluation.inception_score import SPLITS, inception_score
from dtrain.evaluation.kernel import kernel_distance
from dtrain.evaluation.neighbours import NEIGHBOURS, precision_and_recall
from dtrain.evaluation.statistics import Statistics

OF_MOMENTS = {"fd"}
OF_REFERENCE_FEATURES = {"kid", "precision", "recall"}


def needs_features(e: Eval) -> bool:
    """Whether the samples' features have to be kept; the Fréchet distance alone lives on moments."""
    return bool(set(e.metrics) - OF_MOMENTS - OF_THE_MODEL) or bool(e.bootstrap and "fd" in e.metrics)


def needs_reference_features(e: Eval) -> bool:
    return bool(set(e.metrics) & OF_REFERENCE_FEATURES)


def needs_split(e: Eval) -> bool:
    """Whether statistics in a file are not enough."""
    return needs_reference_features(e) or bool(set(e.metrics) & OF_THE_MODEL)


def check(e: Eval, extractor: Extractor) -> None:
    """Raises UserError for what could not be computed after all the sampling."""
    n, dimensions = e.num_samples, extractor.dimensions
    if "is" in e.metrics and not extractor.classes:
        raise UserError(
            f"the Inception score needs features with classes, which {extractor.name} are not; take inception"
        )
    if "is" in e.metrics and n < SPLITS:
        raise UserError(f"the Inception score is taken over {SPLITS} parts; raise eval.num_samples {n}")
    if "fd_infinity" in e.metrics and n < 4 * dimensions:
        raise UserError(
            f"fd_infinity of {extractor.name} needs at least {4 * dimensions} samples (4 a dimension), not {n}"
        )
    if {"precision", "recall"} & set(e.metrics) and n <= NEIGHBOURS:
        raise UserError(f"precision and recall need more than {NEIGHBOURS} samples; raise eval.num_samples {n}")
    if e.bootstrap and "fd" not in e.metrics:
        raise UserError(
            "eval.bootstrap gives an interval of fd, which eval.metrics does not name; add fd or set it to 0"
        )
    if e.bootstrap == 1:
        raise UserError("eval.bootstrap is 1, and a spread needs at least 2 resamplings; 50 is a good number")


def compute(
    e: Eval,
    extractor: Extractor,
    statistics: Statistics,
    reference: Statistics | None,
    features: Tensor | None,
    reference_features: Tensor | None,
) -> dict[str, float]:
    """Every metric of `eval.metrics` under its journal name. Features where `needs_…` says so, (N, D) and (M, D).

    Beside a value stands what is known of its spread: `fid_low` and `fid_high` (95 %, with eval.bootstrap), the `_std`
    over subsets of kid and is, the `_error` of fd_infinity's fit.
    """
    found: dict[str, float] = {}

    def put(metric: str, value: float, **spread: float) -> None:
        found[metric_name(metric, extractor.name)] = value
        found.update({metric_name(metric, extractor.name, suffix): s for suffix, s in spread.items()})

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
    if {"precision", "recall"} & set(e.metrics):
        for metric, value in zip(
            ("precision", "recall"), precision_and_recall(features, reference_features), strict=True
        ):
            if metric in e.metrics:
                put(metric, value)
    if "is" in e.metrics:
        score = inception_score(extractor.probabilities(features))
        put("is", score.mean, std=score.std)
    return found
