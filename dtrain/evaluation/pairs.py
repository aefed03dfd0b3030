"""`dtrain pairs`: samples with the keys of their noise, as shards that a flow trains on (Liu et al. 2023, reflow).

A shard is a whole number of blocks of `eval.batch_size`, and one rank draws it: what it holds is a function of the
weights and the settings alone, so that any number of ranks writes the same bytes, however often they were killed.
"""

import io
import itertools
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from dtrain import distributed
from dtrain.conditions.build import Said, taken
from dtrain.config import Config
from dtrain.data.shards import manifest as manifests
from dtrain.data.shards.indexing import index_shards
from dtrain.data.shards.pairs import Pairs
from dtrain.data.shards.sample_files import CAPTION_FIELD, DRAWN_FIELD, LABEL_FIELD, NOISE_KEY_FIELD
from dtrain.encoding.encode import quiet, unfinished
from dtrain.errors import UserError
from dtrain.evaluation.evaluate import sampling_of
from dtrain.evaluation.generate import Generator
from dtrain.evaluation.opened import Opened, open_generator, weights_name
from dtrain.evaluation.requirements import check_walks
from dtrain.evaluation.sample import labels_in_turn, prompts_in_turn
from dtrain.run import RunDirectory

SHARD = 1000  # samples, at least
DETERMINISTIC = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "heun", "euler")


def check(config: Config) -> None:
    """Raises UserError for samples that are no function of standard normals."""
    e = config.eval
    if e.sampler not in DETERMINISTIC or e.eta or e.churn:
        what = f"eval.eta {e.eta}" if e.eta else f"eval.churn {e.churn}" if e.churn else f"sampler {e.sampler}"
        raise UserError(
            f"{what} draws noise on its way, so a sample is no function of the noise that it began at; take one of "
            f"{', '.join(DETERMINISTIC)} without noise"
        )
    if getattr(config.diffusion, "noise", "normal") != "normal":
        raise UserError(
            f"the samples of diffusion.noise {config.diffusion.noise} begin at no standard normals; draw pairs "
            "from a run with normal noise"
        )


def draw_pairs(
    run: RunDirectory,
    config: Config,
    n: int,
    step: int | None,
    destination: str,
    on_progress: Callable[[int, int], None] = quiet,
    prompts: Sequence[str] = (),
) -> str:
    """Draw n samples, labels and prompts in turn, into the folder `destination`; a line that says what.

    A destination that an equal call made is kept, any other that holds something refused; of a call that was killed,
    the next keeps whole shards. on_progress: with this rank's evaluations of the network. A collective; raises
    UserError and NotFinite.
    """
    check_walks(config, run.path)
    check(config)
    distributed.initialize()
    opened = open_generator(run, config, distributed.device(), step)
    pairs = of(opened, config)
    asked = {"n": n, "prompts": list(prompts), **pairs.model_dump(mode="json")}
    target = Path(os.path.abspath(destination))
    if distributed.on_rank_0(_is_there, target, pairs, n):
        return f"{target}: keeping what is there, which the same request made"
    generator = opened.generator
    told = prompts_in_turn(list(prompts), n + config.eval.batch_size) if prompts else []
    said = distributed.agree(generator.conditions.saying, told) if told else {}
    folder = target.with_name(f".{target.name}.partial")
    with unfinished(folder, asked):
        distributed.agree(_draw, folder, generator, config, n, told, said, on_progress)
        return distributed.on_rank_0(_finish, folder, target, pairs, config, n)


def of(opened: Opened, config: Config) -> Pairs:
    """What the manifest says of these weights and settings."""
    generator = opened.generator
    return Pairs(
        checkpoint=opened.checkpoint,
        weights=weights_name(config.eval),
        process=config.diffusion.process,
        first_stage=generator.first_stage.fingerprint,
        shape=list(generator.shape),
        sampling=sampling_of(config.eval),
        generator=generator.noise,
    )


def _shards(n: int, block: int) -> list[range]:
    """The ids of each shard."""
    size = block * -(-SHARD // block)
    return [range(first, min(first + size, n)) for first in range(0, n, size)]


def _path(folder: Path, number: int) -> Path:
    return folder / f"pairs-{number:06d}.tar"


def _draw(
    folder: Path,
    generator: Generator,
    config: Config,
    n: int,
    prompts: Sequence[str],
    said: Said,
    on_progress: Callable[[int, int], None],
) -> None:
    """This rank's shards that are not whole yet."""
    from webdataset import TarWriter

    how, shards = config.eval, _shards(n, config.eval.batch_size)
    mine = range(distributed.rank(), len(shards), distributed.world_size())
    todo = [number for number in mine if not _path(folder, number).exists()]
    blocks = sum(-(-len(shards[number]) // how.batch_size) for number in todo)
    of, evaluations = blocks * generator.evaluations(how), itertools.count(1)
    labels = labels_in_turn(n + how.batch_size, config.model.num_classes)

    def fields_of(number: int, drawn: np.ndarray) -> dict[str, bytes]:
        key = np.array([how.seed, generator.noise, number], dtype=np.int64)
        fields = {DRAWN_FIELD: _npy(drawn), NOISE_KEY_FIELD: _npy(key)}
        if config.model.num_classes:
            fields[LABEL_FIELD] = str(int(labels[number])).encode()
        return fields | ({CAPTION_FIELD: prompts[number].encode()} if prompts else {})

    for number in todo:
        path, ids = _path(folder, number), shards[number]
        temporary = path.with_suffix(".tar.tmp")
        try:
            with open(temporary, "wb") as file:
                with TarWriter(file, mtime=0, encoder=False) as writer:
                    for first in range(0, len(ids), how.batch_size):
                        block = list(range(ids[first], ids[first] + how.batch_size))  # a shorter one rounds otherwise
                        count = lambda: on_progress(next(evaluations), of)  # noqa: E731
                        drawn = generator.x_0(block, labels[block], how, count, taken(said, block))
                        for one, row in zip(
                            ids[first : first + how.batch_size], drawn.float().cpu().numpy(), strict=False
                        ):
                            writer.write({"__key__": f"{one:08d}"} | fields_of(one, row))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError as e:
            raise UserError(f"cannot write {folder}: {e.strerror}; name a place with room") from None


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _finish(folder: Path, target: Path, pairs: Pairs, config: Config, n: int) -> str:
    """On rank 0, once all shards are whole: the manifest, and the folder's own name."""
    shards = [_path(folder, number) for number in range(len(_shards(n, config.eval.batch_size)))]
    names = manifests.class_names(config.data.manifest_path) if config.model.num_classes else None
    index_shards(shards, folder / "manifest.json", classes=names, pairs=pairs)
    for left in folder.iterdir():
        if left.name.startswith(".") or left.name == "encode.json":
            shutil.rmtree(left) if left.is_dir() else left.unlink()
    try:
        folder.rename(target)
    except OSError as e:
        raise UserError(f"cannot write {target}: {e.strerror}; the pairs are in {folder}") from None
    steps = f"{config.eval.sampler} in {config.eval.steps} steps, guidance {config.eval.guidance}"
    return f"{target}: {n:,} pairs of noise and samples, {steps}; train on them with diffusion.coupling=data"


def _is_there(target: Path, pairs: Pairs, n: int) -> bool:
    """Whether the same request made what is there. Raises UserError for anything else."""
    if not target.exists():
        return False
    try:
        found = manifests.load(target / "manifest.json")
    except UserError:
        raise UserError(f"{target} exists and holds no pairs; name another folder") from None
    if found.pairs is None or found.pairs.model_dump() != pairs.model_dump(mode="json") or found.samples != n:
        raise UserError(f"{target} holds pairs of other weights, settings or number; name another folder")
    manifests.check_shards(found, target)
    return True
