"""What a large run costs beside its steps: 100,000 shards, 1,024 ranks at stage 3, a million steps, synthetic inputs.

    python benchmarks/scale.py               a few minutes and 6 GB of the temporary folder (TMPDIR)
    python benchmarks/scale.py --small       a hundredth of each, in seconds

Each row is a process of its own, from the start of Python on: seconds of the processor (and on the clock), the most
memory it had. Bounds: 2 s of the processor and 300 MiB, but for what happens once: the first hash of a side file on a
node, and rank 0's first commit of an attempt, which a thread does while training goes on.
Exit code 1 where one is missed. Data files of checkpoints and shards are holes that take no disk.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import zlib
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

MOST_SECONDS, MOST_MIB = 2.0, 300
ONCE = ("manifest, first", "rank 0: commit, the first")
FIELDS, SAMPLES = ("cls", "jpg"), 1000  # of a shard
KEYS = ("fp32", "exp_avg", "exp_avg_sq", "ema_0")
EVERY = {"ten": 10, "one": 1}  # runs: a line of the journal every so many steps
METRICS = ("loss", "grad_norm", "lr", *(f"loss_level_{i}" for i in range(8)), "images_per_second", "step_seconds")
METRICS += ("step_seconds_spread", "data_wait_seconds", "tflops", "mfu", "peak_memory_gib", "bytes_read", "bad_samples")


@dataclass(frozen=True)
class Scale:
    shards: int
    ranks: int
    steps: int


LARGE, SMALL = Scale(100_000, 1024, 1_000_000), Scale(1000, 10, 10_000)


# What is measured, each by a process of its own, in the folder that `make` has filled.


def manifest(scale: Scale) -> None:
    """As each rank of a start does: the manifest with its side file, and where a batch of a run lies."""
    import numpy as np

    from dtrain.data.order.order import Order
    from dtrain.data.shards.manifest import load

    found = load("data/manifest.json")
    order = Order(0, found.shard_sizes, 256, 4096)
    samples = order.sample(np.arange(10**9, 10**9 + 256))
    assert len(set(samples.tolist())) == 256
    assert found.members[samples].shape == (256, len(FIELDS))
    assert len(found.hash) == 64


def start_checks(scale: Scale) -> None:
    """As rank 0 of a start does: every shard is there in its length, and no sample lacks what the run reads."""
    from dtrain.data.shards.lacking import lacking
    from dtrain.data.shards.manifest import check_shards, load

    found = load("data/manifest.json")
    check_shards(found, "data")
    assert lacking(found, "data", [("jpg", "png"), ("cls",)]) == []


def many_samples(scale: Scale) -> None:
    """2^34 samples: where a batch of the run lies, and one record of the side file."""
    import numpy as np

    from dtrain.data.order.order import Order

    sizes = np.full(scale.shards, 2**34 // scale.shards)
    samples = Order(0, sizes, 256, 4096).sample(np.arange(2**36, 2**36 + 256))
    assert samples.max() > 2**32


def share(scale: Scale, ranks: int) -> None:
    """As a rank does that resumes at stage 3: open the checkpoint and read what it holds of `ranks` ranks' state."""
    import numpy as np

    from dtrain.checkpoint.format import Checkpoint

    checkpoint = Checkpoint.open("checkpoint/step-00000001", all_files=False)
    rank, wanted = ranks // 2, []
    for name, size in checkpoint.tensors.items():
        length = -(-size // ranks)
        start, stop = min(rank * length, size), min((rank + 1) * length, size)
        wanted.append((name, start, np.full(stop - start, np.nan, np.float32)))
    checkpoint.read_into(wanted)
    assert not any(values.any() for _, _, values in wanted)


def same_ranks(scale: Scale) -> None:
    share(scale, scale.ranks)


def fewer_ranks(scale: Scale) -> None:
    share(scale, scale.ranks * 3 // 4)


def all_indexes(scale: Scale) -> None:
    """An older checkpoint, whose manifest names its indexes alone."""
    from dtrain.checkpoint.format import Checkpoint

    assert Checkpoint.open("older/step-00000001").files == scale.ranks


def commit(scale: Scale) -> None:
    """As rank 0 does at the first save of an attempt, when all ranks have written."""
    from dtrain.checkpoint.format import Summary, write_manifest

    before = Path("checkpoint/step-00000001/manifest.json").read_bytes()
    tensors, meta = (json.loads(before)[key] for key in ("tensors", "meta"))
    write_manifest(Path("committed"), scale.ranks, tensors, meta, Summary())
    assert Path("committed/manifest.json").read_bytes() == before


def history(scale: Scale) -> None:
    """As rank 0 does at a start: what the journal tells beside its curves, and the best evaluation."""
    from dtrain.tracking.best import best_step
    from dtrain.tracking.history import History

    found = History.read("runs/ten/journal.jsonl")
    assert found.lost_steps(scale.steps // 2) == scale.steps // 2
    assert best_step(found.counting("eval"), "fd_pixels", range(0, scale.steps, scale.steps // 100))


MEASURED = (manifest, start_checks, many_samples, same_ranks, fewer_ranks, all_indexes, commit, history)
# Row → what it does, what it grows with.
ROWS = {
    ONCE[0]: (manifest, "shards, and samples at the first hash"),
    "manifest, a later start": (manifest, "shards"),
    "rank 0: shards and fields are there": (start_checks, "shards"),
    "order of 2^34 samples": (many_samples, "shards, streams"),
    "checkpoint, a rank's share": (same_ranks, "tensors, ranks"),
    "checkpoint, of 3/4 of the ranks": (fewer_ranks, "tensors, ranks"),
    "checkpoint, an older one": (all_indexes, "tensors × ranks"),
    ONCE[1]: (commit, "tensors × ranks"),
    "dtrain checkpoints list": (["checkpoints", "list", "runs/saved"], "tensors, ranks"),
    "rank 0: journal, log_every 10": (history, "bytes of the journal"),
    "dtrain status, log_every 10": (["status", "runs/ten"], "bytes of the journal"),
    "dtrain status, log_every 1": (["status", "runs/one"], "bytes of the journal"),
    "dtrain report, log_every 10": (["report", "runs/ten"], "bytes of the journal, evaluations"),
    "dtrain report, log_every 1": (["report", "runs/one"], "bytes of the journal, evaluations"),
}


# The inputs.


def make(folder: Path, scale: Scale) -> None:
    make_data(folder / "data", scale)
    make_checkpoint(folder, scale)
    for name, every in EVERY.items():
        make_run(folder / "runs" / name, scale, every)
    make_run(folder / "runs" / "saved", scale, scale.steps)
    (folder / "runs/saved/checkpoints").rmdir()
    (folder / "runs/saved/checkpoints").symlink_to(folder / "checkpoint")


def make_data(folder: Path, scale: Scale) -> None:
    """Shards that are holes, and a side file that places two members of 1,000 bytes a sample."""
    import numpy as np

    from dtrain.data.shards.manifest import RECORD, Document, Shard, SideFile

    folder.mkdir()
    size = 2 * 1536 * SAMPLES
    members = np.zeros((SAMPLES, len(FIELDS)), dtype=RECORD)
    members["offset"] = np.arange(members.size).reshape(members.shape) * 1536
    members["size"] = 1000
    one, digest, shards = members.tobytes(), hashlib.sha256(), []
    with (folder / "manifest.members").open("wb") as side:
        for number in range(scale.shards):
            name = f"train-{number:06d}.tar"
            with (folder / name).open("wb") as file:
                file.truncate(size)
            side.write(one)
            digest.update(one)
            sha256 = hashlib.sha256(name.encode()).hexdigest()
            shards.append(Shard(name=name, samples=SAMPLES, bytes=size, sha256=sha256))
    side = SideFile(file="manifest.members", sha256=digest.hexdigest())
    document = Document(format=1, fields=list(FIELDS), shards=shards, classes=None, members=side)
    (folder / "manifest.json").write_text(json.dumps(document.model_dump(), indent=1))


def make_checkpoint(folder: Path, scale: Scale) -> None:
    """What ranks write at stage 3, every value 0: of 1,024 a DiT-XL/2's 675 M parameters in 400 tensors, 10 MB each."""
    from dtrain.checkpoint import format

    path = folder / "checkpoint/step-00000001"
    path.mkdir(parents=True)
    most = 1152 * 1152 * scale.ranks // LARGE.ranks
    parameters = {f"blocks.{n // 14}.part.{n % 14}.weight": most * (1 + n % 3) * 5 // 8 - 7 * n for n in range(400)}
    tensors = {f"{name}:{key}": size for name, size in parameters.items() for key in KEYS}
    for rank in range(scale.ranks):
        pieces = []
        for name, size in tensors.items():
            length = -(-size // scale.ranks)
            start, stop = min(rank * length, size), min((rank + 1) * length, size)
            pieces += [(name, start, stop - start)] if stop > start else []
        layout = format.layout(pieces)
        stem = path / format.file_stem(rank)
        with stem.with_suffix(".safetensors").open("wb") as file:
            file.write(layout.header)
            file.truncate(layout.size)
        checksums, crc, at = [], zlib.crc32(layout.header), len(layout.header)
        for end in range(format.BLOCK, layout.size + format.BLOCK, format.BLOCK):
            checksums.append(zlib.crc32(bytes(min(end, layout.size) - at), crc))
            crc, at = 0, end
        index = {"format": format.FORMAT, "file": f"{stem.name}.safetensors", "bytes": layout.size}
        index |= {"block": format.BLOCK, "crc32": checksums}
        index["pieces"] = [[s.name, s.start, s.length, s.offset] for s in layout.slots]
        stem.with_suffix(".json").write_text(json.dumps(index, separators=(",", ":")))
    meta = {"step": 1, "images": 256, "optimizer_steps": 1}
    format.write_manifest(path, scale.ranks, tensors, meta, format.Summary())
    for copy, without in (("older/step-00000001", ("ranges", "bytes", "sha256")), ("committed", ())):
        (folder / copy).mkdir(parents=True)
        for file in path.glob("rank-*"):
            (folder / copy / file.name).hardlink_to(file)
        if without:
            text = json.loads((path / "manifest.json").read_bytes())
            body = {key: value for key, value in text.items() if key not in without}
            (folder / copy / "manifest.json").write_text(json.dumps({"sha256": format._hash(body), **body}))


def make_run(folder: Path, scale: Scale, every: int) -> None:
    """Ten attempts, a hundred checkpoints, 2,000 evaluations or fewer, by the journal's own writer's lines."""
    import random

    from dtrain.config import validate
    from dtrain.run import RunDirectory
    from dtrain.tracking.journal import Journal

    tree = {"run": {"name": folder.name}, "data": {"shards": "data", "image_size": 32, "batch_size": 256}}
    tree |= {"model": {"name": "dit", "size": "S/2"}, "train": {"steps": scale.steps}, "tracking": {"enabled": False}}
    run, drawn = RunDirectory(folder), random.Random(0)
    run.make_folders()
    run.save_config(validate(tree, "a benchmark's config"))
    evaluated = {"n": 5000, "steps": 50, "sampler": "ddim", "eta": 0.0, "seed": 0, "features": "pixels", "ema": "ema_0"}
    evaluated |= {"guidance": 1.0, "reference": "r" * 64, "holdout": "h" * 64}
    journal = Journal(run.journal_file)
    with run.journal_file.open("wb") as file:

        def write(event: str, step: int, metrics: dict, context: dict) -> None:
            file.write(journal._line(event, step, 256 * step, metrics, context))

        for journal.attempt in range(1, 11):
            begin, end = ((journal.attempt - 1 + n) * scale.steps // 10 for n in (0, 1))
            write(
                "attempt", begin, {}, {"data": "d" * 64, "batch_size": 256, "world_size": scale.ranks, "zero_stage": 3}
            )
            for step in range(begin + every, end + 1, every):
                write("train", step, {name: drawn.random() for name in METRICS}, {})
                if step % (scale.steps // 100) == 0:
                    write("checkpoint", step, {"seconds": 1.5}, {"path": f"step-{step:08d}", "hash": "h" * 64})
                if step % max(10, scale.steps // 2000) == 0:
                    write("eval", step, {"fd_pixels": drawn.random(), "seconds": 30.0}, evaluated)


# The table.


def measured(what, folder: Path, small: bool) -> tuple[float, float, float]:
    """(seconds of the processor, on the clock, MiB at most) of one process that does `what`."""
    place = str(Path(__file__).resolve().parent.parent)
    environment = os.environ | {"PYTHONPATH": place, "XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    if callable(what):
        arguments, does = ["--measure", what.__name__, *(["--small"] if small else [])], "benchmarks.scale"
    else:
        arguments, does = what, "dtrain.cli"
    # Not what `wait4` says of memory, which begins with this process's own.
    code = "import atexit, shutil, sys; atexit.register(shutil.copy, '/proc/self/status', 'status'); "
    command = [sys.executable, "-c", f"{code}from {does} import main; sys.exit(main())", *arguments]
    started = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} ended with {status}")
    seconds = time.perf_counter() - started
    peak = next(line for line in (folder / "status").read_text().splitlines() if line.startswith("VmHWM"))
    return used.ru_utime + used.ru_stime, seconds, int(peak.split()[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a hundredth of each")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    scale = SMALL if options.small else LARGE
    if options.measure:
        next(one for one in MEASURED if one.__name__ == options.measure)(scale)
        return 0
    missed = []
    with tempfile.TemporaryDirectory(prefix="dtrain-scale-") as name:
        make(Path(name), scale)
        load = os.getloadavg()[0]
        print(f"{scale.shards:,} shards, {scale.ranks:,} ranks, {scale.steps:,} steps, load {load:.1f}")
        print(f"{'':38}{'seconds':>9}{'on the clock':>14}{'MiB':>6}   grows with")
        for row, (what, grows) in ROWS.items():
            seconds, clock, mib = measured(what, Path(name), options.small)
            over = (seconds > MOST_SECONDS and row not in ONCE) or mib > MOST_MIB
            missed += [row] if over else []
            print(f"{row:38}{seconds:9.2f}{clock:14.2f}{mib:6.0f}   {grows}{'   MISSED' if over else ''}", flush=True)
    print(f"bounds: {MOST_SECONDS:g} s of the processor, {MOST_MIB} MiB; missed: {', '.join(missed) or 'none'}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
