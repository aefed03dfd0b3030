"""This rank's batches. A rank that cannot read its own stands in for it, so that all ranks end together and say why.

Left alone, a rank that meets a damaged sample or a dead disk would leave, and the others would die waiting for it. So
it goes through one more step with rows that are not numbers, which moves nothing on any rank (`training/refusal.py`),
and raises its flag in that step's reduction. A healthy step pays nothing for this. As nothing has moved, the ranks are
whole, and save what they have before they end.
"""

import time
from contextlib import suppress
from typing import NamedTuple

from dtrain import distributed
from dtrain.batch import Batch
from dtrain.config import Config
from dtrain.credentials import redacted
from dtrain.data.declared import declared
from dtrain.data.loader import Batches, LoaderFailure, train_batches
from dtrain.data.order.skipped import Skipped
from dtrain.data.shards.manifest import Manifest
from dtrain.data.stream import Completion, Report, stand_in
from dtrain.errors import SharedError, SharedFailure, UserError
from dtrain.files import opener
from dtrain.run import RunDirectory
from dtrain.training.upload import Sent, Upload


class _Made(NamedTuple):
    batch: Batch | Sent | None  # None after an error
    report: Report = Report()
    error: UserError | LoaderFailure | None = None


class Feed:
    """Batches on this rank's device, one after the other from `next`, once `begin` has said where.

    report: how the batch given last was read. seconds: how long this rank waited for it, `ahead` included. error: why
    this rank has none.
    """

    def __init__(self, config: Config, manifest: Manifest):
        self._config, self._manifest = config, manifest
        self._batches: Batches | None = None
        self._complete = Completion(config, compiled=bool(config.train.compile))
        self._upload = None if distributed.device().type == "cpu" else Upload(distributed.device())
        self._made: _Made | None = None  # ahead
        self._seconds_ahead = 0.0
        self.report = Report()
        self.seconds = 0.0
        self.error: UserError | LoaderFailure | None = None

    def begin(self, images: int, skipped: Skipped) -> None:
        """Go on, or anew, after `images` images seen, without those of `skipped`."""
        self.close()
        ranks = distributed.rank(), distributed.world_size()
        self._batches = train_batches(self._config, self._manifest, *ranks, images, skipped)

    def ahead(self) -> None:
        """Send the next batch to a GPU, while that computes what was queued. A CPU has nothing to gain by it."""
        if self._upload is not None and self._made is None:
            started = time.perf_counter()
            self._made = self._make()
            self._seconds_ahead = time.perf_counter() - started

    def next(self, first: int) -> Batch:
        """The next batch, which begins at image `first`, or after an error one that stands in for it."""
        started = time.perf_counter()
        (batch, self.report, self.error), self._made = self._made or self._make(), None
        if batch is None:
            rows = self._config.data.batch_size // distributed.world_size()
            stood_in = stand_in(declared(self._config), first, rows)
            batch = {name: column.to(distributed.device()) for name, column in stood_in.items()}
        elif self._upload is not None:
            batch = self._upload.end(batch)
        self.seconds, self._seconds_ahead = self._seconds_ahead + time.perf_counter() - started, 0.0
        return batch

    def fail(self, error: UserError) -> None:
        """The batch given last is what this rank cannot use: it has none any more, nor what was made ahead."""
        self.error, self._made = error, _Made(None, error=error)

    def _make(self) -> _Made:
        if self.error is not None:
            return _Made(None, error=self.error)
        try:
            batch = next(self._batches)
        except UserError as e:
            return _Made(None, error=e)
        except LoaderFailure as e:
            return _Made(None, error=self._kept(e))
        made = self._complete(batch) if self._upload is None else self._upload.begin(batch, self._complete)
        return _Made(made, self._batches.report)

    def _kept(self, error: LoaderFailure) -> LoaderFailure:
        """The error with the file that its details were written to."""
        path = RunDirectory(self._config.run.path).logs / f"rank-{distributed.rank()}.traceback"
        with suppress(OSError):
            if error.details:
                with open(path, "w", opener=opener) as file:
                    file.write("\n".join(redacted(line, code=True) for line in error.details.split("\n")))
                return LoaderFailure(f"{error} (rank {distributed.rank()}; its traceback is in {path})")
        return error

    def raise_on_all(self) -> None:
        """On every rank, once they have agreed that one has an error: raises the first rank's, as a SharedFailure where
        it is no mistake in the data. A collective.
        """
        kind = SharedFailure if isinstance(self.error, LoaderFailure) else SharedError
        own = None if self.error is None else (kind, str(self.error))
        kind, message = next(e for e in distributed.gather_objects(own) if e is not None)
        raise kind(message)

    def close(self) -> None:
        self._made = None
        if self._batches is not None:
            self._batches.close()
