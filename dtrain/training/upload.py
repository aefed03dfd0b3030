"""Batches on their way to a GPU, beside what it computes."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from dtrain.batch import Batch


class Sent(NamedTuple):
    """batch: on the device, but not to be read before `arrived`."""

    batch: Batch
    arrived: "torch.cuda.Event"


class Upload:
    """Copies pinned batches to a GPU, and completes them there, on a stream of its own: neither the host nor what
    computes waits for them.
    """

    def __init__(self, device: torch.device):
        self._device, self._stream = device, torch.cuda.Stream(device)

    def begin(self, batch: Batch, complete: Callable[[Batch], Batch]) -> Sent:
        with torch.cuda.stream(self._stream):
            sent = complete({name: column.to(self._device, non_blocking=True) for name, column in batch.items()})
            return Sent(sent, self._stream.record_event())

    def end(self, sent: Sent) -> Batch:
        """The batch, for what is queued from now on: the device waits, not the host."""
        computes = torch.cuda.current_stream(self._device)
        computes.wait_event(sent.arrived)
        for column in sent.batch.values():
            column.record_stream(computes)  # else its memory is the next batch's while it is still being read
        return sent.batch
