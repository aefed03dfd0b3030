"""Checks of what a run meets: its folder, data, tracking, weights, disk and the time it has."""

import os
import sqlite3
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from urllib.parse import unquote, urlsplit

from dtrain import distributed
from dtrain.checkpoint.directory import complete
from dtrain.cluster.finding import Finding, bad, ok, warning
from dtrain.config import Config, Data, Eval, Run, Tracking, Train
from dtrain.credentials import without_credentials
from dtrain.data.fields.check import check_fields, check_split, check_training
from dtrain.data.shards import manifest as manifests
from dtrain.data.shards.remote import is_url
from dtrain.errors import UserError
from dtrain.evaluation.features import weights
from dtrain.first_stage.requirements import check as check_first_stage
from dtrain.run import RunDirectory
from dtrain.tracking.journal import read as read_journal
from dtrain.tracking.tracker import tracking_uri
from dtrain.training.safety.stopping import LEAST_MARGIN_SECONDS, deadline

SLOW_FSYNC = 1.0  # seconds for a MiB
REACH_SECONDS = 5.0  # for an answer of MLflow's
GRACE_SECONDS = 300.0  # the most that a job script asks SLURM for between its signal and the end
GIB = 2**30


def file_system(place: Path) -> Finding:
    """Write, fsync and rename where a run will lie; under a launcher, whether every rank sees it. A collective."""
    folder = _existing(place)
    name = "file system"
    probe = folder / f".doctor-{os.environ.get('MASTER_PORT', os.getpid())}"
    shown, seconds, problem = probe.with_suffix(".done"), 0.0, None
    try:
        if distributed.rank() == 0:
            try:
                seconds = _durable(probe, shown)
            except OSError as e:
                problem = f"cannot write {folder}: {e.strerror}"
        distributed.gather_objects(None)  # nobody looks before it is there
        seen = distributed.gather_objects((os.uname().nodename, shown.exists()))
    finally:
        distributed.gather_objects(None)
        if distributed.rank() == 0:
            for path in (probe, shown):
                path.unlink(missing_ok=True)
    if problem:
        return bad(name, problem, "take another run.dir, or mend its permissions")
    blind = sorted({node for node, sees in seen if not sees})
    if blind:
        return bad(name, f"{', '.join(blind)} cannot see {folder}", "put run.dir on a file system that all nodes share")
    found = f"{folder}: 1 MiB written, fsynced and renamed in {1e3 * seconds:.0f} ms"
    if distributed.world_size() > 1:
        found += f", seen by {len(seen)} ranks"
    if seconds > SLOW_FSYNC:
        return warning(name, found, "checkpoints will be slow; take a faster run.dir")
    return ok(name, found)


def _durable(probe: Path, shown: Path) -> float:
    started = time.perf_counter()
    with open(probe, "wb") as file:
        file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
    os.rename(probe, shown)
    descriptor = os.open(shown.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return time.perf_counter() - started


def _existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def shards(data: Data, full: bool, progress: Callable[[float], None]) -> Finding:
    """Every shard against its manifest: its size, or with `full` every byte; progress(share of the bytes read)."""
    from dtrain.data.shards.verify import verify

    name, problems, samples, count, elsewhere = "shards", [], 0, 0, 0
    try:
        manifest = manifests.load_all(data)
        sets = [(m, s.shards) for m, s in zip((manifest, *manifest.mixed), (data, *data.mix), strict=True)]
        if data.holdout:
            held_out = manifests.load_holdout(data)
            sets.append((held_out, held_out.place))
        size, read = sum(shard.bytes for one, _ in sets for shard in one.shards), 0

        def on_bytes(number: int) -> None:
            nonlocal read
            read += number
            progress(read / size)

        for one, place in sets:
            samples, count = samples + one.samples, count + len(one.shards)
            if full:
                problems += [f"{shard} {problem}" for shard, problem in verify(one, place, on_bytes).items()]
            elif is_url(place) or place.startswith("pipe:"):
                elsewhere += len(one.shards)
            else:
                problems += [p for shard in one.shards if (p := manifests.shard_problem(one, place, shard))]
    except UserError as e:
        return bad(name, str(e), "make the manifest with `dtrain index`, or name the right data.shards")
    if problems:
        more = f" and {len(problems) - 1:,} more" if len(problems) > 1 else ""
        return bad(name, f"{problems[0]}{more}", "restore them, or run `dtrain index` again")
    found = f"{samples:,} samples in {count:,} shards, {'every byte' if full else 'sizes'} as their manifests say"
    if elsewhere:
        return warning(name, f"{found}; {elsewhere:,} are remote and were not looked at", "`--full` reads them")
    return ok(name, found)


def samples(config: Config, full: bool) -> Finding:
    """Whether every sample has what the run reads; all labels with `full`, else some."""
    name = "samples"
    try:
        manifest = manifests.load_all(config.data)
        check_first_stage(config, manifest)
        check_fields(config, manifest)
        lines = check_training(config, manifest, full)
        if config.data.holdout:
            check_split(manifests.load_holdout(config.data))
    except UserError as e:
        return bad(name, str(e), "see that every sample has a picture, and a label where the model has classes")
    if lines:
        more = f" and {len(lines) - 1:,} more of the kind" if len(lines) > 1 else ""
        return warning(name, f"{lines[0]}{more}", "pack the shards without them")
    with_label = " and a class number" if config.model.num_classes else ""
    return ok(name, f"each has a picture{with_label}" + ("" if full else ", as far as an index and some labels tell"))


def disk_space(config: Config) -> Finding:
    """Free space where checkpoints go, against what they will take."""
    import torch

    from dtrain.cluster.memory import Sizes, checkpoint_bytes
    from dtrain.models.build import allocate

    with torch.device("meta"):
        size = checkpoint_bytes(Sizes.of(allocate(config)), len(config.ema))
    folder = _existing(config.run.path)
    there = len(complete(RunDirectory(config.run.path).checkpoints))
    wanted = max(1, config.train.keep_last + 1 - there)
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    found = f"{folder} has {free / GIB:,.2f} GiB free; {wanted} checkpoints of {size / GIB:,.3f} GiB will come"
    advice = "free some space, take another run.dir, or a smaller train.keep_last"
    if free < size:
        return bad("disk space", found, advice)
    if free < wanted * size or (config.train.keep_every and free < 2 * wanted * size):
        return warning("disk space", found, advice)
    return ok("disk space", found)


def mlflow(run: Run, tracking: Tracking) -> Finding:
    """Whether the tracking store answers, within seconds; training itself never waits for it."""
    name, later = "MLflow", "training goes on without it, and `dtrain sync RUN` sends the journal later"
    if not tracking.enabled:
        return ok(name, "tracking.enabled is false; the journal is written all the same")
    uri = tracking_uri(RunDirectory(run.path), tracking)
    if uri.startswith(("http://", "https://")):
        asked, uri = _health(uri), without_credentials(uri)
        try:
            with urllib.request.urlopen(asked, timeout=REACH_SECONDS) as answer:
                return ok(name, f"{uri} answers {answer.status}")
        except urllib.error.HTTPError as e:
            return bad(name, f"{uri} answers {e.code} {e.reason}", f"mend tracking.uri or the credentials; {later}")
        except (OSError, ValueError) as e:
            return bad(name, f"{uri} cannot be reached: {getattr(e, 'reason', e)}", f"mend tracking.uri; {later}")
    if uri.startswith("sqlite:///"):
        path = Path(uri.removeprefix("sqlite:///"))
        if not path.exists():
            folder = _existing(path.parent)
            if os.access(folder, os.W_OK):
                return ok(name, f"{path} will be made")
            return bad(name, f"cannot write {folder}", f"name another tracking.uri; {later}")
        try:
            with closing(sqlite3.connect(f"file:{path}?mode=rw", uri=True, timeout=REACH_SECONDS)) as store:
                runs = store.execute("select count(*) from runs").fetchone()[0]
        except sqlite3.Error as e:
            return bad(name, f"{path}: {e}", f"name another tracking.uri; {later}")
        return ok(name, f"{path} holds {runs} runs")
    return warning(name, f"{uri} was not looked at", "the first run will show whether it answers")


def _health(uri: str) -> urllib.request.Request:
    """What asks a server whether it is there; user and password of the address go where servers look for them."""
    parts = urlsplit(uri)
    user, at, host = parts.netloc.rpartition("@")
    request = urllib.request.Request(f"{parts.scheme}://{host}{parts.path.rstrip('/')}/health")
    if at:
        request.add_header("Authorization", f"Basic {b64encode(unquote(user).encode()).decode()}")
    return request


def inception(evaluation: Eval | None) -> Finding:
    """The weights that `fid` needs, and their hash; evaluation: of the config, where there is one."""
    name, wanted = "Inception", evaluation.features if evaluation and evaluation.every else None
    try:
        found = weights.find(weights.INCEPTION, evaluation.weights if evaluation else None)
    except UserError as e:
        return bad(name, str(e), "delete it, or copy it again")
    if found:
        return ok(name, f"{found} has the right sha256")
    missing = f"{weights.INCEPTION.name} is not on this machine"
    if wanted == "inception":
        advice = f"put it there now if nodes have no internet: {weights.INCEPTION.url}"
        return warning(name, f"{missing}; the first evaluation downloads it", advice)
    if wanted == "auto":
        advice = f"copy it to {weights.cache_folder()}, from {weights.INCEPTION.url}"
        return warning(name, f"{missing}: other features are taken, and no fid", advice)
    return ok(name, f"{missing}, and this config does not ask for it" if evaluation else missing)


def walltime(run: Run, train: Train) -> Finding:
    """The time left, by train.deadline or SLURM, against the run's own steps, saves and evaluations."""
    name, now = "walltime", time.time()
    try:
        end = deadline(train.deadline, now)
    except UserError as e:
        return bad(name, str(e), "mend train.deadline")
    lines = read_journal(RunDirectory(run.path).journal_file)
    step, save, evaluation = (
        max((line["metrics"].get(key, 0.0) for line in lines if line["event"] == event), default=None)
        for event, key in (("train", "step_seconds"), ("checkpoint", "seconds"), ("eval", "seconds"))
    )
    known = [(step, "step"), (save, "save"), (evaluation, "evaluation")]
    measured = ", ".join(f"a {what} {seconds:,.2f} s" for seconds, what in known if seconds is not None)
    if end is None:
        return ok(name, f"no limit is known; {measured or 'nothing was measured yet'}")
    left = end - now
    found = f"{left:,.0f} s are left; {measured or 'how long a save takes was not measured yet'}"
    stop = LEAST_MARGIN_SECONDS + 2 * (save or 0) + 3 * (step or 0)
    if left <= stop:
        return bad(name, f"{found}: too few to do a step and save", "ask for more time")
    if (evaluation or 0) + stop > min(GRACE_SECONDS, left / 4):
        advice = "ask for more time, or take fewer eval.num_samples or eval.steps; or evaluate in jobs of its own"
        return warning(name, f"{found}: a stop that falls into an evaluation may come too late", advice)
    return ok(name, found)
