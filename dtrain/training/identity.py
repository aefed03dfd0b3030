"""Whether a run directory holds a run that a config may go on with, and what the config then means."""

from functools import partial

from dtrain import config as configuration
from dtrain.checkpoint.directory import complete
from dtrain.config import Config
from dtrain.data.order.streams import with_streams
from dtrain.data.shards.manifest import Manifest
from dtrain.errors import UserError
from dtrain.run import RunDirectory
from dtrain.tracking.journal import Tail


def has_trained(run: RunDirectory) -> bool:
    """Whether it has made a step. Until then nothing binds who starts it, such as a first start's mistake."""
    return bool(complete(run.checkpoints)) or _has_step(Tail(run.journal_file))


def _has_step(journal: Tail) -> bool:
    """A step stands near the beginning of a journal, whose rest is not read then."""
    return any(any(e["event"] == "train" for e in lines) for lines in iter(partial(journal.read, 1), []))


def continued(run: RunDirectory, wanted: Config) -> Config:
    """`wanted` as the run goes on with it: a key that neither it nor the run names keeps its earlier meaning."""
    return configuration.continued(wanted, run.config_file) if _binds(run) else wanted


def resolved(run: RunDirectory, wanted: Config, manifest: Manifest) -> Config:
    """`wanted` as the run goes on with it, in as many data.streams as it began in, where neither says how many.

    Raises UserError when there are more streams than samples.
    """
    streams = run.config().data.streams if wanted.data.streams is None and _binds(run) else None
    config = continued(run, wanted)
    return config.model_copy(update={"data": with_streams(config.data, manifest, streams)})


def reconcile(run: RunDirectory, wanted: Config) -> dict[str, tuple]:
    """What differs from the config of the last start: key → (was, is). Empty for a new run.

    Raises UserError when an identity key differs of a run that has trained: it would no longer be the same run.
    """
    if not run.config_file.exists():
        return {}
    was, now = run.config(), wanted
    old, new = configuration.identity(was), configuration.identity(now)
    changed = [f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in old | new if old.get(k) != new.get(k)]
    if changed and has_trained(run):
        raise UserError(
            f"{run.path} holds a run with another identity: {'; '.join(changed)}. "
            f"Give this run a new run.name, or take the old values"
        )
    flat_old, flat_new = (configuration.flat(c.model_dump(mode="json")) for c in (was, now))
    return {k: (flat_old.get(k), flat_new.get(k)) for k in flat_old | flat_new if flat_old.get(k) != flat_new.get(k)}


def _binds(run: RunDirectory) -> bool:
    return run.config_file.exists() and has_trained(run)
