"""What the data was like: samples that had to be replaced, how many are too many, which source gave how much, and data
workers that had to be started again."""

from collections.abc import Callable
from dataclasses import asdict

from dtrain import distributed, terminal
from dtrain.config import Data
from dtrain.data.order.mixture import of_run
from dtrain.data.shards.manifest import Manifest
from dtrain.data.stream import Report
from dtrain.errors import SharedError
from dtrain.position import Position
from dtrain.tracking.tracker import Tracker
from dtrain.training.reduction import StepSums


class DataHealth:
    """Counts since this start, equal on every rank because they come out of the step's reduction.

    seed: of the run. say: shows the user a line.
    """

    def __init__(
        self,
        data: Data,
        seed: int,
        manifest: Manifest,
        position: Position,
        tracker: Tracker,
        say: Callable[[str], None],
    ):
        self._fraction = data.max_bad_fraction
        self._begin, self._epoch = position.images, manifest.samples + sum(m.samples for m in manifest.mixed)
        self._tracker, self._say = tracker, say
        self._replaced = 0
        self._events: list[tuple[str, Position, dict]] = []
        self._names = ["main", *(source.name for source in data.mix)]
        self._mixture = of_run(data, seed, manifest) if data.mix else None

    def journal(self, read: Report, position: Position) -> None:
        """Each replaced sample of this rank's batch, and each data worker that was started again for it, will be an
        event of the step that follows `position`.

        Written once the ranks have reduced that step: by then rank 0 has written which attempt this is.
        """
        after = Position(position.step + 1, position.images)
        for one in read.replaced:
            context = asdict(one) | {"source": self._names[one.source]}
            self._events.append(("bad_sample", after, context))
        for message in read.restarts:
            self._say(message)
            if distributed.rank() != 0:
                terminal.say(message)  # into this rank's log
            self._events.append(("fault", after, {"kind": "worker", "message": message}))

    def on_reduced(self, sums: StepSums) -> None:
        """Raises SharedError, on every rank at the same step, when more samples are bad than data.max_bad_fraction."""
        for event, position, context in self._events:
            self._tracker.write_own(event, position, context)
        self._events.clear()
        self._replaced += sums.replaced
        images = max(sums.position.images - self._begin, self._epoch)
        if self._replaced > self._fraction * images:
            raise SharedError(
                f"{self._replaced} bad samples of {images:,} images are more than data.max_bad_fraction "
                f"{self._fraction} allows; `dtrain verify` finds them, the journals of the run name them"
            )

    def metrics(self, images: int) -> dict[str, float]:
        """Images so far by source, where there are several."""
        if self._mixture is None:
            return {}
        return {f"images/{n}": c for n, c in zip(self._names, self._mixture.counts(images), strict=True)}
