"""What an evaluation needs to end well, asked before anything is computed; without torch, for who submits a job."""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from dtrain import plugins
from dtrain.config import Config, Data, Eval
from dtrain.config.encoders import INDEX, WEIGHTS
from dtrain.config.evaluation import OF_THE_MODEL, OF_WHAT_IS_ASKED
from dtrain.config.folders import config_json
from dtrain.config.guidance import CLASS
from dtrain.data.fields.check import check_classes, check_split
from dtrain.data.shards import manifest as manifests
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import UserError, from_where
from dtrain.evaluation.features import weights
from dtrain.evaluation.features.dinov2_folder import Dinov2Folder
from dtrain.evaluation.features.torchscript import read_program
from dtrain.evaluation.names import (
    CLEAN,
    OF_STATISTICS,
    RESIZING,
    TENSORFLOW,
    about_reference,
    is_comparable,
    metric_name,
    metric_names,
    resize_of_reference,
)
from dtrain.files import read_json

PREPROCESSOR = "preprocessor_config.json"  # of a CLIPModel's folder
OF_MOMENTS = {"fd"}
PRECISION, DENSITY = ("precision", "recall"), ("density", "coverage")
OF_REFERENCE_FEATURES = {"kid", *PRECISION, *DENSITY, "memorisation"}
SPLITS = 10  # parts of the samples that the Inception score is taken over
NEIGHBOURS, NEIGHBOURS_OF_DENSITY = 3, 5  # as their authors took
LEAST_KL = 1e-2  # beside an error that is summed over the picture; 0.5 is the bound of a decoder with deviation 1


class Features(Protocol):
    """What is known of features without computing any."""

    name: str  # as in `fd_<name>`
    dimensions: int  # D, the length of a feature vector
    classes: int  # of an extractor's `probabilities`; 0: it classifies nothing


@dataclass(frozen=True)
class Known:
    """Features whose size is known before their network is loaded."""

    name: str
    dimensions: int
    classes: int


def needs_features(e: Eval) -> bool:
    """Whether the samples' features have to be kept; the Fréchet distance alone lives on moments."""
    return bool(set(e.metrics) - OF_MOMENTS - OF_THE_MODEL - OF_WHAT_IS_ASKED.keys()) or bool(
        e.bootstrap and "fd" in e.metrics
    )


def needs_reference_features(e: Eval) -> bool:
    return bool(set(e.metrics) & OF_REFERENCE_FEATURES)


def needs_split(e: Eval) -> bool:
    """Whether statistics in a file are not enough."""
    return needs_reference_features(e) or bool(set(e.metrics) & OF_THE_MODEL)


def check_evaluation(config: Config) -> None:
    """Raises the UserError that an evaluation would, as far as settings, manifests and names of files tell."""
    check_guidance(config)
    if config.eval.guide_with is not None:
        from dtrain.evaluation.guide import check_guide  # it needs torch

        check_guide(config)
    check_asked(config.eval)
    if (split := split_of(config)) is not None:
        manifests.check_shards(split, split.place)
        check_split(split)
    features = known_features(config.eval, config.data)
    if features is not None:
        check_metrics(config.eval, features, None if split is None else split.samples)
    if config.eval.reference and not Path(config.eval.reference).is_file():
        raise UserError(f"no statistics at {config.eval.reference}{from_where(config.eval.reference)}")
    if features is not None and config.eval.reference:
        resize_of_reference(config.eval, features.name, config.eval.reference)


def check_asked(e: Eval) -> None:
    """Raises UserError where the networks that compare samples with what they were asked for are not there."""
    if "clip_score" in e.metrics:
        ClipFolder.of(e.clip_model)
    if "agreement" in e.metrics:
        read_program(e.classifier, "eval.classifier")


class ClipFolder(NamedTuple):
    """What a folder says of its CLIPModel. size: pixels a side; width: of the common space; length: tokens taken;
    padding: the token behind a caption. normalisation: means and deviations of red, green and blue in [0, 1].
    """

    size: int
    width: int
    length: int
    padding: int
    normalisation: tuple[list[float], list[float]]

    @classmethod
    def of(cls, folder: str) -> "ClipFolder":
        """Raises UserError for what is missing, with what to copy where."""
        tree = config_json(folder, "a CLIPModel", "copy a folder that transformers has saved")
        saved = "copy it from where the folder comes from"
        if not isinstance(tree, dict) or tree.get("model_type") != "clip":
            raise UserError(f"{folder} describes no CLIPModel of both towers, which eval.clip_model needs")
        if not any((Path(folder) / name).is_file() for name in (WEIGHTS, INDEX)):
            raise UserError(f"{folder} has no {WEIGHTS}, which eval.clip_model needs; {saved}, or save it anew")
        missing = next((n for n in ("tokenizer_config.json", PREPROCESSOR) if not (Path(folder) / n).is_file()), None)
        if missing:
            raise UserError(f"{folder} has no {missing}, which eval.clip_model needs; {saved}")
        try:
            text, vision, seen = tree["text_config"], tree["vision_config"], read_json(Path(folder) / PREPROCESSOR)
            scale = [float(v) for v in seen["image_mean"]], [float(v) for v in seen["image_std"]]
            # What config.json leaves out is as transformers has it.
            size, width = int(vision.get("image_size", 224)), int(tree.get("projection_dim", 512))
            return cls(
                size, width, int(text.get("max_position_embeddings", 77)), int(text.get("pad_token_id", 1)), scale
            )
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as e:
            raise UserError(f"{folder} does not describe its CLIPModel ({e!r}); copy it again") from None


def about_names(config: Config) -> list[str]:
    """What to say before an evaluation of metrics that are not called as a user may expect, a line each."""
    e, features = config.eval, named_features(config.eval, config.data)
    if features is None:
        return []
    resize = resize_of_reference(e, features.name, e.reference) if e.reference else None
    of_statistics = e.reference and OF_STATISTICS & set(e.metrics)
    lines = [about_reference(features.name, e.reference, resize) if of_statistics else None]
    lines.append(_unknown_best(config, features.name, is_comparable(features.name, resize)))
    return [line for line in lines if line]


def check_best(config: Config) -> None:
    """Raises UserError for a `train.keep_best` that no evaluation of this config gives, with the name to take.

    What `auto` features are is known where they are computed: that may be another machine.
    """
    e, features = config.eval, named_features(config.eval, config.data)
    if features is None or (e.features == "auto" and features.name not in RESIZING):
        return
    resize = resize_of_reference(e, features.name, e.reference) if e.reference else None
    if wrong := _unknown_best(config, features.name, is_comparable(features.name, resize)):
        raise UserError(wrong)


def check_generates(config: Config, run: str | Path) -> None:
    """Raises UserError for a run that has nothing to draw."""
    if config.reconstructs:
        raise UserError(
            f"{run} is an autoencoder, and eval.images is reconstructions, which `dtrain evaluate` measures; with "
            "eval.images prior (--images prior) it decodes latents of N(0, I)"
        )


def check_walks(config: Config, run: str | Path) -> None:
    """Raises UserError for a run without a process, which no picture can be put into."""
    if not config.objective.diffuses:
        raise UserError(
            f"{run} is an autoencoder, which walks from no noise to pictures; `dtrain evaluate` measures it, and a "
            "training takes it as first_stage.source"
        )


def about_prior(config: Config) -> str | None:
    """What to say of an autoencoder whose divergence has hardly any weight; None where there is nothing."""
    if (weight := getattr(config.objective, "kl_weight", LEAST_KL)) >= LEAST_KL:
        return None
    if config.reconstructs:
        return (
            f"objective.kl_weight {weight:g}: it leaves the latents no prior to sample; pictures are drawn by a model "
            "that is trained on them, with first_stage.kind kl"
        )
    return (
        f"objective.kl_weight {weight:g}: it hardly draws the latents to N(0, I), which eval.images prior decodes; "
        f"expect bad pictures, or train with {LEAST_KL:g} or more"
    )


def _unknown_best(config: Config, features: str, comparable: bool) -> str | None:
    wanted, pictures = config.train.keep_best, [name for name, one in config.pictures.items() if one.operator]
    given = metric_names(config.eval, features, comparable, config.reconstructs, pictures)
    if wanted is None or wanted in (*given, "seconds"):
        return None
    distance = metric_name("fd", features, comparable=comparable)
    take = distance if distance in given and wanted.startswith(("fid", "fd_")) else None
    take = take or difflib.get_close_matches(wanted, given, 1, 0)[0]
    return f"no evaluation of this config gives train.keep_best {wanted}, but {', '.join(given)}; take {take}"


def split_of(config: Config) -> Manifest | None:
    """The held-out split to compare with; None where statistics in a file are enough. Raises UserError."""
    e = config.eval
    if config.data.holdout:
        manifest = manifests.load_holdout(config.data)
        check_classes(config.model.num_classes, manifest, "name another data.holdout")
        return manifest
    if needs_split(e) or not e.reference:
        wanted = "a split" if needs_split(e) else "something to compare with"
        raise UserError(f"{', '.join(e.metrics)} need {wanted}: name its manifest in data.holdout")
    if e.labels == "data" and config.model.num_classes:
        raise UserError("eval.labels is `data`, but there is no data.holdout to take labels from; set `uniform`")
    return None


def known_features(e: Eval, data: Data) -> Known | None:
    """`named_features`, once the file behind them has been read and is the right one. Raises UserError."""
    features = named_features(e, data)
    if e.features in ("auto", "inception"):
        weights.find(weights.INCEPTION, e.weights)
    elif features is None and plugins.find("features", e.features) is None:
        read_program(e.features)
    return features


def named_features(e: Eval, data: Data) -> Known | None:
    """What `eval.features` stands for; None for a TorchScript file or a plug-in, which only itself knows its size.

    Reads no weights. Raises UserError where Inception's is named and missing. A download is left to the evaluation, and
    so are packages: a job's container may have others than the machine it is submitted from.
    """
    name, resize = e.features, e.resize
    found = weights.place(weights.INCEPTION, e.weights) if name in ("auto", "inception") else None
    is_inception = name == "inception" or found is not None
    check_resize(resize, name, is_inception)
    if name == "dinov2":
        described = Dinov2Folder.of(e.weights)
        return Known(described.name, described.width, 0)
    if name == "pixels":
        return Known(name, data.channels * data.image_size**2, 0)
    if is_inception:
        return Known("inception_tf" if resize == TENSORFLOW else "inception", 2048, 1008)
    if name in ("auto", "effnet_lite0"):
        return Known("effnet_lite0", 1280, 1000)
    return None


def check_resize(resize: str | None, features: str, is_inception: bool) -> None:
    """Raises UserError for the resizing of TensorFlow, which is a part of Inception's file, where that is not taken."""
    if resize not in (None, CLEAN, TENSORFLOW):
        raise UserError(f"{resize!r} is no resizing of Inception's images; take {CLEAN} or {TENSORFLOW}")
    if resize == TENSORFLOW and not is_inception:
        here = "; its weight file is not on this machine" if features == "auto" else ""
        raise UserError(
            f"eval.resize tensorflow is Inception's own, and eval.features is {features}{here}; take "
            "eval.features=inception, or leave eval.resize out"
        )


def check_guidance(config: Config) -> None:
    """Raises UserError where guidance would contrast with a model that nothing has trained."""
    guidance, (begun, steps) = config.eval.guidance, config.eval.asked
    if not steps or config.eval.guide_with is not None:
        return
    if config.model.num_classes and config.diffusion.label_dropout == 0 and CLASS not in begun:
        raise UserError(
            f"eval.guidance {guidance} contrasts the model with itself without a class, which "
            "diffusion.label_dropout 0 never trains; take guidance 1, or train with label_dropout 0.1"
        )
    for name, section in config.texts.items():
        if section.dropout == 0 and name not in begun:
            raise UserError(
                f"eval.guidance {guidance} contrasts the model with itself without words, which "
                f"conditions.{name}.dropout 0 never trains; take guidance 1, or train with dropout 0.1"
            )


def check_metrics(e: Eval, features: Features, references: int | None = None) -> None:
    """Raises UserError for what could not be computed after all the sampling.

    references: images to compare with, where statistics in a file do not stand for them.
    """
    n, dimensions = e.num_samples, features.dimensions
    if n < 2 and set(e.metrics) - OF_THE_MODEL:
        raise UserError(f"eval.num_samples {n}: one sample has no spread to compare; take thousands")
    if references is not None and references < 2 and {"fd", "fd_infinity", "kid"} & set(e.metrics):
        raise UserError(f"the held-out split has {references} image, and one has no spread to compare; hold out more")
    for pair, k in ((PRECISION, NEIGHBOURS), (DENSITY, NEIGHBOURS_OF_DENSITY)):
        if references is not None and references <= k and set(pair) & set(e.metrics):
            raise UserError(
                f"{' and '.join(pair)} need more than {k} held-out images, not {references}: with fewer every sample "
                "counts as near; hold out more"
            )
    if "is" in e.metrics and not features.classes:
        raise UserError(
            f"the Inception score needs features with classes, which {features.name} are not; take inception"
        )
    if "is" in e.metrics and n < SPLITS:
        raise UserError(f"the Inception score is taken over {SPLITS} parts; raise eval.num_samples {n}")
    if "fd_infinity" in e.metrics and n < 4 * dimensions:
        raise UserError(
            f"fd_infinity of {features.name} needs at least {4 * dimensions} samples (4 a dimension), not {n}"
        )
    if set(PRECISION) & set(e.metrics) and n <= NEIGHBOURS:
        raise UserError(f"precision and recall need more than {NEIGHBOURS} samples; raise eval.num_samples {n}")
    if e.bootstrap and "fd" not in e.metrics:
        raise UserError(
            "eval.bootstrap gives an interval of fd, which eval.metrics does not name; add fd or set it to 0"
        )
    if e.bootstrap == 1:
        raise UserError("eval.bootstrap is 1, and a spread needs at least 2 resamplings; 50 is a good number")
