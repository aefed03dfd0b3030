"""What a metric is called, and how the images behind it were resized: a name promises no more than is known.

Inception takes 299 pixels, and each way to them gives other features: the Fréchet distance of the same photographs
resized in two ways is not zero. So `fid` is of clean-fid's resizing on both sides, `fid_tf` of the old TensorFlow one,
as published ImageNet figures are; all else is `fd_<features>` (design, decision 8). Without torch and NumPy.
"""

import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

from dtrain.config import Eval
from dtrain.config.evaluation import BOUNDS, DENSITIES, OF_THE_MODEL, OF_WHAT_IS_ASKED
from dtrain.errors import UserError

OF_STATISTICS = {"fd", "fd_infinity"}  # those that a file of another tool may stand behind
OF_PAIRS = ("psnr", "ssim")  # of each reconstruction and its original
OF_LATENTS = ("latent_mean", "latent_std", "posterior_std")  # over all elements of the held-out pictures' latents
# Metric of the model → the parts that add up to it, behind its name.
PARTS = dict.fromkeys(BOUNDS, ("prior", "chain", "decoder")) | dict.fromkeys(DENSITIES, ("prior", "volume"))
PARTS |= {"straightness": ()}
SPREADS = {"fd": ("low", "high"), "fd_infinity": ("error",), "kid": ("std",), "is": ("std",)}
SPREADS |= {"memorisation": ("held_out",)}

CLEAN, TENSORFLOW, UNKNOWN = "clean", "tensorflow", "unknown"
RESIZING = {"inception": CLEAN, "inception_tf": TENSORFLOW}  # features → how their images are resized
FRECHET = {"inception": "fid", "inception_tf": "fid_tf"}
WORDS = {CLEAN: "clean-fid's resizing", TENSORFLOW: "the old TensorFlow resizing", "pytorch": "PyTorch's resizing"}
# As clean-fid names statistics: <name>_<mode>_<split>_<size>.npz
CLEAN_FID = re.compile(r"_(clean|legacy_tensorflow|legacy_pytorch)_[^_]+_(?:\d+|na)\.npz$", re.IGNORECASE)


def metric_name(metric: str, features: str, suffix: str = "", comparable: bool = True) -> str:
    """The journal's key of a metric: `<metric>_<features>`, as `fd_pixels`; a bound is of no features, and neither is
    what compares a sample with what it was asked for.

    comparable: whether what is compared with is known to have been resized as the samples are; only then the Fréchet
    distance of Inception's features is called `fid`. A suffix names what belongs to the value: `kid_inception_std`.
    """
    if metric in OF_THE_MODEL or metric in OF_WHAT_IS_ASKED:
        return metric
    name = FRECHET[features] if metric == "fd" and features in FRECHET and comparable else f"{metric}_{features}"
    return f"{name}_{suffix}" if suffix else name


def reconstructed(name: str) -> str:
    """What a metric of features is called where the images are reconstructions of the held-out ones: `rfd_pixels`."""
    return f"r{name}"


def obeyed(condition: str) -> str:
    """What it is called how far samples show the picture that this condition asked for."""
    return f"control_{condition}"


def metric_names(
    e: Eval, features: str, comparable: bool, reconstructs: bool = False, pictures: Iterable[str] = ()
) -> list[str]:
    """The keys of all that an evaluation writes, each metric before what belongs to it.

    pictures: names of the conditions whose pictures are computed.
    """
    if reconstructs:
        return [reconstructed(name) for name in metric_names(e, features, comparable)] + [*OF_PAIRS, *OF_LATENTS]
    found = []
    for metric in e.metrics:
        found.append(metric_name(metric, features, "", comparable))
        if metric in OF_THE_MODEL:
            found += [f"{metric}_{part}" for part in PARTS[metric]]
        elif metric != "fd" or e.bootstrap:
            found += [metric_name(metric, features, suffix, comparable) for suffix in SPREADS.get(metric, ())]
    return [*found, *map(obeyed, pictures)]


def options_of(features: str) -> str:
    """The options of `dtrain reference` with which it computes these features."""
    return "--features inception --resize tensorflow" if features == "inception_tf" else f"--features {features}"


def is_comparable(features: str, reference_resize: str | None) -> bool:
    """Whether both sides were resized alike; None is said of what dtrain itself computed."""
    return reference_resize in (None, RESIZING.get(features))


def resize_of_reference(e: Eval, features: str, path: str | Path) -> str | None:
    """How the images behind the statistics in a file were resized, `unknown` where no file says it.

    None where that is no question: the file is dtrain's own and names its features, or they are not Inception's. What
    the file says counts, else what `eval.resize` says. Raises UserError where these two contradict each other.
    """
    if features not in RESIZING or is_ours(path):
        return None
    said = declared(path)
    if said and e.resize and said != e.resize:
        fix = f"set eval.resize={said}" if said in RESIZING.values() else "leave eval.resize out"
        raise UserError(f"{path} is of {WORDS[said]}, and eval.resize is {e.resize}; {fix}, or name another reference")
    return said or e.resize or UNKNOWN


def is_ours(path: str | Path) -> bool:
    return "source" in _arrays(path)


def declared(path: str | Path) -> str | None:
    """How images were resized, by what a file holds or is called: clean, tensorflow or pytorch; None: it does not say.

    ADM's evaluator, whose files alone hold the moments of spatial features too, resizes as TensorFlow did. clean-fid's
    names hold their mode.
    """
    if {"mu_s", "sigma_s"} <= _arrays(path):
        return TENSORFLOW
    found = CLEAN_FID.search(Path(path).name)
    return found and found[1].lower().removeprefix("legacy_")


def _arrays(path: str | Path) -> set[str]:
    """Names of the arrays in an .npz; none of what is no .npz, which its reader refuses."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {name.removesuffix(".npy") for name in archive.namelist()}
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile):
        return set()


def about_reference(features: str, path: str | Path, reference_resize: str | None) -> str | None:
    """What to tell the user of a distance that is not called as he may expect; None where there is nothing."""
    if is_comparable(features, reference_resize):
        return None
    ours = RESIZING[features]
    other, name = metric_name("fd", features), metric_name("fd", features, comparable=False)
    if reference_resize == UNKNOWN:
        return (
            f"{path} does not say how its images were resized, so the distance to it is {name}, not {other}; where you "
            "know, set eval.resize to clean or tensorflow"
        )
    fix = "; with eval.resize=tensorflow it is fid_tf" if reference_resize == TENSORFLOW else ""
    return f"{path} is of {WORDS[reference_resize]}, samples of {WORDS[ours]}: the distance is {name}, not {other}{fix}"
