"""This rank's batches. A rank that cannot read its own stands in for it, so that all ranks end together and say why.

Left alone, a rank that meets a damaged sample or a dead disk would leave, and the others would die waiting for it. So
it goes through one more step with rows that are not numbers, which moves nothing on any rank (`training/refusal.py`),
and raises its flag in that step's reduction. A healthy step pays nothing for this. As nothing has moved, the ranks are
whole, and save what they have before they end.
"""

import time
from contextlib import suppress

from dtrain import distributed
from dtrain.batch import Batch
from dtrain.config import Config
from dtrain.credentials import redacted
from dtrain.data.declared import declared
from dtrain.data.loader import Batches, LoaderFailure, train_batches
from dtrain.data.order.skipped import Skipped
from dtrain.data.shards.manifest import Manifest
from dtrain.data.stream import Report, stand_in
from dtrain.errors import SharedError, SharedFailure, UserError
from dtrain.files import opener
from dtrain.run import RunDirectory


class Feed:
    """Batches on this rank's device, one after the other from `next`, once `begin` has said where.

    report: how the batch given last was read. seconds: how long it was waited for. error: why this rank has none.
    """

    def __init__(self, config: Config, manifest: Manifest):
        self._config, self._manifest = config, manifest
        self._batches: Batches | None = None
        self.report = Report()
        self.seconds = 0.0
        self.error: UserError | LoaderFailure | None = None

    def begin(self, images: int, skipped: Skipped) -> None:
        """Go on, or anew, after `images` images seen, without those of `skipped`."""
        self.close()
        ranks = distributed.rank(), distributed.world_size()
        self._batches = train_batches(self._config, self._manifest, *ranks, images, skipped)

    def next(self, first: int) -> Batch:
        """The next batch, which begins at image `first`, or after an error one that stands in for it."""
        started = time.perf_counter()
        batch, self.report = self._read(first), self._batches.report if self.error is None else Report()
        if (device := distributed.device()).type != "cpu":
            batch = {name: column.to(device, non_blocking=True) for name, column in batch.items()}
        self.seconds = time.perf_counter() - started
        return batch

    def _read(self, first: int) -> Batch:
        if self.error is None:
            try:
                return next(self._batches)
            except UserError as e:
                self.error = e
            except LoaderFailure as e:
                self.error = self._kept(e)
        rows = self._config.data.batch_size // distributed.world_size()
        return stand_in(declared(self._config), first, rows)

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
        if self._batches is not None:
            self._batches.close()
