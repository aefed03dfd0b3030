"""How fast data comes, beside webdataset in the same run: medians of alternating repetitions, one process, one thread.

    python benchmarks/data.py SHARDS      a folder of WebDataset shards of JPEG files with `cls`, such as CIFAR-10's
    python benchmarks/data.py SHARDS --seconds-per-run 3 --repetitions 5

Prints one row a claim: the claim, dtrain, webdataset, ratio, bound. Exit code 1 where a bound is missed.
"""

import argparse
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import torch
import webdataset

from dtrain.config import validate
from dtrain.data.shards.indexing import index
from dtrain.data.shards.manifest import Manifest, load
from dtrain.data.stream import Completion, StepDataset

BATCH = 250


def config_of(shards: str, batch_size: int = BATCH, **data):
    tree = {
        "run": {"name": "benchmark"},
        "data": {"shards": shards, "image_size": 32, "batch_size": batch_size, "workers": 0} | data,
        "model": {"name": "dit", "depth": 1, "width": 32, "heads": 2, "patch": 2, "num_classes": 10},
        "train": {"steps": 1},
    }
    return validate(tree, "the benchmark")


def by_webdataset(urls: list[str]):
    return webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None).decode("rgb8").to_tuple("jpg", "cls")


def webdataset_rate(urls: list[str], seconds: float) -> float:
    done, started = 0, time.perf_counter()
    for _ in by_webdataset(urls):
        done += 1
        if done % 100 == 0 and time.perf_counter() - started > seconds:
            break
    return done / (time.perf_counter() - started)


def dtrain_rate(dataset: StepDataset, seconds: float, complete: Completion | None) -> float:
    step, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        complete(dataset[step]) if complete else dataset.read(step)
        step += 1
    return step * BATCH / (time.perf_counter() - started)


def resume_seconds(manifest: Manifest, shards: str) -> float:
    """From a manifest on disk to the first batch at 90 % of the epoch."""
    started = time.perf_counter()
    StepDataset(config_of(shards), load(manifest.path), 0, 1, int(manifest.samples * 0.9)).read(0)
    return time.perf_counter() - started


def webdataset_resume_seconds(urls: list[str], samples: int) -> float:
    """Its own way: skip what was seen."""
    started = time.perf_counter()
    skipped = webdataset.WebDataset(urls, shardshuffle=False, nodesplitter=None).slice(int(samples * 0.9), samples)
    for _ in islice(skipped.decode("rgb8").to_tuple("jpg", "cls"), BATCH):
        pass
    return time.perf_counter() - started


def throttled_seconds(folder: Path, repetitions: int) -> list[float]:
    """The first batch of 128 images of 100 kB from shards of 500 MB at 50 MB/s for all connections together."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tests.data.servers import serve
    from tests.data.shard_files import picture, write_shards

    photograph = picture(0, 182, 3, "PNG")  # noise: 100 kB
    count = 500_000_000 // (len(photograph) + 2048)
    samples = [{"png": photograph, "cls": b"1"}] * (2 * count)
    write_shards(folder, samples, count)
    manifest = index(str(folder))
    seconds = []
    for _ in range(repetitions):
        with serve(folder) as (url, behaviour), tempfile.TemporaryDirectory() as cache:
            behaviour.bytes_per_second = 50e6
            place = {"manifest": str(manifest.path), "cache_dir": cache}
            started = time.perf_counter()
            StepDataset(config_of(url, 128, **place), manifest, 0, 1, 0)[0]
            seconds.append(time.perf_counter() - started)
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shards", type=Path)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--seconds-per-run", type=float, default=2.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    urls = [str(p) for p in sorted(options.shards.glob("*.tar"))]
    with tempfile.TemporaryDirectory() as folder:
        manifest = index(str(options.shards), Path(folder) / "manifest.json")
        dataset = StepDataset(config_of(str(options.shards)), manifest, 0, 1, 0)
        complete = Completion(config_of(str(options.shards)))
        runs = {name: [] for name in ("read", "full", "peer", "resume", "peer resume")}
        for _ in range(options.repetitions):
            runs["read"].append(dtrain_rate(dataset, options.seconds_per_run, complete=None))
            runs["peer"].append(webdataset_rate(urls, options.seconds_per_run))
            runs["full"].append(dtrain_rate(dataset, options.seconds_per_run, complete=complete))
            runs["resume"].append(resume_seconds(manifest, str(options.shards)))
            runs["peer resume"].append(webdataset_resume_seconds(urls, manifest.samples))
        throttled = throttled_seconds(Path(folder) / "large", options.repetitions)
    m = {name: statistics.median(values) for name, values in runs.items()}
    first = statistics.median(throttled)
    rows = [
        ("decoded images/s", m["read"], m["peer"], m["read"] / m["peer"], 4.0),
        ("with keyed randomness, images/s", m["full"], m["peer"], m["full"] / m["peer"], 2.0),
        ("resume at 90 %, s", m["resume"], m["peer resume"], m["peer resume"] / m["resume"], 20.0),
    ]
    print(f"{'median of ' + str(options.repetitions):34}{'dtrain':>12}{'webdataset':>12}{'ratio':>8}{'bound':>8}")
    for claim, ours, peer, ratio, bound in rows:
        print(f"{claim:34}{ours:12,.3f}{peer:12,.3f}{ratio:8.1f}{bound:8.1f}")
    print(f"{'first batch at 50 MB/s, s':34}{first:12.2f}{'':12}{'':8}{3.0:8.1f}")
    missed = [claim for claim, _, _, ratio, bound in rows if ratio < bound] + (["first batch"] if first > 3 else [])
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
