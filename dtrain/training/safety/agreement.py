"""Before the first step all ranks compare what they were given; where one was given something else, none begins.

A rank on another node may read another manifest, another file of weights or another version of the code. It would train
on other data unnoticed, or end in an error that names something else.
"""

import hashlib
import json
import socket
from functools import cache
from pathlib import Path

import dtrain
from dtrain import config as configuration
from dtrain import distributed, plugins
from dtrain.config import Config
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import SharedError
from dtrain.first_stage.requirements import encoder_of, normalisation

# Where the same thing may lie elsewhere on another node. What lies there is compared by its content.
PLACES = ("data.shards", "data.manifest", "data.mix", "data.holdout", "data.holdout_shards", "data.cache_dir")
PLACES += ("run.init_from", "eval.weights", "eval.reference", "first_stage.source", "first_stage.statistics")
PLACES += ("objective.perceptual.file", "diffusion.perceptual.file", "objective.teacher")
_GLANCE = 1 << 20  # bytes at both ends of a file of weights that stand for it


def check_agreement(config: Config, manifest: Manifest) -> None:
    """A collective. Raises SharedError on all ranks that names the first rank that differs from rank 0, and in what."""
    ours = distributed.agree(given, config, manifest)
    everybody = distributed.gather_objects((socket.gethostname(), ours))
    (first_host, first), *others = everybody
    for rank, (host, theirs) in enumerate(others, start=1):
        for what in first | theirs:
            if (here := first.get(what)) != (there := theirs.get(what)):
                raise SharedError(
                    f"rank {rank} on {host} has another {what} than rank 0 on {first_host}: {there}, and {here} on "
                    "rank 0; give all ranks the same"
                )


def given(config: Config, manifest: Manifest) -> dict[str, str]:
    """What → value, or a digest of it, of all that decides what this rank will compute."""
    keys = configuration.flat(config.model_dump(mode="json"))
    found = {"version of dtrain": dtrain.__version__}
    found |= {f"`{key}`": repr(value) for key, value in keys.items() if not key.startswith(PLACES)}
    found["`data.mix`"] = repr([[source.name, source.weight] for source in config.data.mix])
    for number, one in enumerate((manifest, *manifest.mixed)):
        name = "manifest" if number == 0 else f"manifest of data.mix.{number - 1}"
        found[name] = f"one of {one.samples} samples with hash {one.hash[:12]}"
        found[f"side file of the {name}"] = _side(one)
    if config.run.init_from:
        found["run.init_from"] = _weights(Path(config.run.init_from))
    found |= {key: _weights(Path(path)) for key, path in config.weight_files.items()}
    if config.first_stage.kind == "kl":
        found |= {
            f"{what} of first_stage.source": str(value)[:12] for what, value in encoder_of(config.first_stage).items()
        }
        found["scale of the latents"] = repr(normalisation(config, manifest))
    found |= {f"code of the plug-in {name}": digest[:12] for name, digest in plugins.digests().items()}
    return found | {"code of dtrain": code_digest()}


def _side(manifest: Manifest) -> str:
    """The digest that the manifest states and that loading it has checked."""
    return json.loads(manifest.path.read_bytes())["members"]["sha256"][:12]


def _weights(path: Path) -> str:
    """A file by its size and both ends; a run or checkpoint by its own index, which rank 0 chooses."""
    if not path.is_file():
        return "a run or a checkpoint"
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(_GLANCE)
        file.seek(max(0, size - _GLANCE))
        digest = hashlib.sha256(head + file.read())
    return f"a file of {size:,} bytes, {digest.hexdigest()[:12]}"


@cache
def code_digest() -> str:
    """A digest of the names and texts of all Python files of the package."""
    folder = Path(dtrain.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]
