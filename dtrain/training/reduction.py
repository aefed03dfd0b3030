"""One small vector summed over the ranks each step, in the background, read one step later (design, decision 5).

Everything the ranks must agree on travels in it, so a step has no other collective of ours and never waits for this
one. Behind the sums every rank has places of its own, so that the sum also tells who was slow.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import torch
import torch.distributed as dist

from dtrain.data.stream import Report
from dtrain.diffusion.times import LEVEL_BINS
from dtrain.position import Position

SUMS = (
    "loss",
    "grad_norm",
    "stop",
    "written",
    "failed",
    "no_room",
    "error",
    "replaced",
    "bytes_read",
    "cache_hits",
    "cache_misses",
    "truncated",
)
NOTHING = Report()
OWN = ("step_seconds", "data_seconds")
LEVELS = 2 * LEVEL_BINS  # sums and counts of the loss by noise level
NONE = MappingProxyType({})


@dataclass(frozen=True)
class StepSums:
    """The sums of a step over all ranks, once it is reduced; equal on every rank."""

    position: Position  # after the step
    taken: bool  # moved the weights; a refused step counts images, but not as a step
    loss: float  # mean over the global batch
    grad_norm: float  # of the mean gradient, before clipping
    stop: bool  # some rank wants the run to stop
    written: bool  # every rank has written its part of the checkpoint in flight
    failed: bool  # some rank could not
    no_room: bool  # rank 0 found the disk too full for a checkpoint
    error: bool  # some rank could not read its batch
    replaced: int  # samples that could not be used
    bytes_read: int  # from disks and networks
    cache_hits: int  # blocks of remote shards
    cache_misses: int
    step_seconds: list[float]  # of each rank, data included
    data_seconds: list[float]  # of each rank, waiting for its batch
    levels: list[float]  # sums, then counts, of unweighted losses by noise level
    named: dict[str, float]  # what an objective reports beside: means over the global batch
    truncated: int = 0  # captions that were cut
    vectors: Mapping[str, torch.Tensor] = field(default_factory=dict)  # float64, for the objective's next step


class _Reading:
    """The sums on their way to the host. From a GPU they are copied beside the next step, on a stream of their own, so
    that reading them waits for nothing that was queued after them.
    """

    def __init__(self, vector: torch.Tensor, work: dist.Work | None):
        self._vector, self._work, self._copied = vector, work, None
        if not vector.is_cuda:
            return
        stream = _copying_stream(vector.device)
        stream.wait_stream(torch.cuda.current_stream(vector.device))
        with torch.cuda.stream(stream):
            if work is not None:
                work.wait()  # NCCL's: this stream waits, not the host
            self._vector = torch.empty(vector.shape, dtype=vector.dtype, pin_memory=True)
            self._vector.copy_(vector, non_blocking=True)
            self._copied = stream.record_event()
        vector.record_stream(stream)

    def values(self) -> list[float]:
        if self._copied is not None:
            self._copied.synchronize()
        elif self._work is not None:
            self._work.wait()
        return self._vector.tolist()


@functools.cache
def _copying_stream(device: torch.device) -> "torch.cuda.Stream":
    return torch.cuda.Stream(device)


class StepReduction:
    """named: names of further sums, vectors: of further vectors, with their sizes; every step gives some of them."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        batch_size: int,
        named: Sequence[str] = (),
        vectors: Mapping[str, int] = NONE,
    ):
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self._named, self._vectors = list(named), dict(vectors)
        self._pending: tuple[Position, bool, _Reading] | None = None

    def start(
        self,
        position: Position,
        loss_sum: torch.Tensor,
        grad_norm: torch.Tensor | float,
        levels: torch.Tensor,
        *,
        taken: bool = True,
        stop: bool,
        written: bool,
        failed: bool,
        no_room: bool,
        error: bool = False,
        read: Report = NOTHING,
        step_seconds: float,
        data_seconds: float,
        named: Mapping[str, tuple[torch.Tensor | float, torch.Tensor | int]] = NONE,
        vectors: Mapping[str, tuple[torch.Tensor, int]] = NONE,
    ) -> None:
        """Begin the reduction of this step.

        loss_sum: the sum of this rank's per-image losses, a scalar tensor.
        levels: float64 (16,), as `StepLosses.by_level` gives it. named: (sum, count), scalars, of this rank's rows.
        vectors: (sum, count) of this rank's rows.
        """
        assert self._pending is None, "read the previous step first"
        flags = len(SUMS) + len(OWN) * self.world_size
        behind = flags + LEVELS + 2 * len(self._named)
        size = behind + sum(1 + n for n in self._vectors.values())
        # Only pinned memory is copied to a GPU without a wait for it.
        vector = torch.zeros(size, dtype=torch.float64, pin_memory=loss_sum.is_cuda)
        own = [stop, written, failed, no_room, error]
        own += [len(read.replaced), read.bytes_read, read.cache_hits, read.cache_misses, read.truncated]
        vector[2 : len(SUMS)] = torch.tensor(own, dtype=torch.float64)
        vector[len(SUMS) + self.rank : flags : self.world_size] = torch.tensor([step_seconds, data_seconds])
        vector = vector.to(loss_sum.device, non_blocking=True)
        vector[0] = loss_sum.detach()  # stays on the device: reading it here would wait for the step
        vector[1] = grad_norm
        vector[flags : flags + LEVELS] = levels
        for name, (total, count) in named.items():
            place = flags + LEVELS + 2 * self._named.index(name)
            vector[place], vector[place + 1] = total, count
        for name, n in self._vectors.items():
            if name in vectors:
                vector[behind + 1 : behind + 1 + n], vector[behind] = vectors[name]
            behind += 1 + n
        work = dist.all_reduce(vector, async_op=True) if self.world_size > 1 else None
        self._pending = (position, taken, _Reading(vector, work))

    def finish(self) -> StepSums | None:
        """The sums of the step begun last; None when there is none."""
        if self._pending is None:
            return None
        position, taken, reading = self._pending
        self._pending = None
        values = reading.values()
        loss, norm, stop, written, failed, no_room, error, *read = values[: len(SUMS)]
        replaced, bytes_read, hits, misses, truncated = (round(value) for value in read)
        behind = len(SUMS) + len(OWN) * self.world_size
        own, levels, rest = values[len(SUMS) : behind], values[behind : behind + LEVELS], values[behind + LEVELS :]
        named, rest = rest[: 2 * len(self._named)], rest[2 * len(self._named) :]
        pairs = zip(self._named, named[::2], named[1::2], strict=True)
        vectors = {}
        for name, n in self._vectors.items():
            (count, *total), rest = rest[: 1 + n], rest[1 + n :]
            if count:
                vectors[name] = torch.tensor(total, dtype=torch.float64) / count
        return StepSums(
            position,
            taken,
            loss=loss / self.batch_size,
            grad_norm=norm / self.world_size,
            stop=stop > 0,
            written=round(written) == self.world_size,
            failed=failed > 0,
            no_room=no_room > 0,
            error=error > 0,
            replaced=replaced,
            bytes_read=bytes_read,
            cache_hits=hits,
            cache_misses=misses,
            step_seconds=own[: self.world_size],
            data_seconds=own[self.world_size :],
            levels=levels,
            named={name: total / count for name, total, count in pairs if count},
            truncated=truncated,
            vectors=vectors,
        )
