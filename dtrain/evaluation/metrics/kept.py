"""Features that are kept one by one, for the metrics that moments are not enough for."""

import torch
import torch.distributed as dist
from torch import Tensor

from dtrain import distributed


class KeptFeatures:
    """This rank's blocks of features, in the host's memory; `gather` puts all ranks' in order on rank 0."""

    def __init__(self, dimensions: int, device: torch.device | str = "cpu"):
        self._dimensions, self._device = dimensions, device  # the device is where ranks talk to each other
        self._blocks: dict[int, Tensor] = {}

    def update(self, number: int, features: Tensor) -> None:
        """Features (n, D) of block `number`, which no other rank has."""
        self._blocks[number] = features.to("cpu", torch.float32)

    def gather(self) -> Tensor | None:
        """All blocks in the order of their numbers, float32 (N, D) on rank 0; None elsewhere. A collective.

        Block by block from its owner to rank 0, so that nothing exists twice but one block.
        """
        own = {number: len(block) for number, block in self._blocks.items()}
        owners = {
            number: (rank, rows)
            for rank, blocks in enumerate(distributed.gather_objects(own))
            for number, rows in blocks.items()
        }
        me = distributed.rank()
        total = sum(rows for _, rows in owners.values())
        out = distributed.agree(lambda: torch.empty(total, self._dimensions) if me == 0 else None)  # may have no room
        at = 0
        for number, (owner, rows) in sorted(owners.items()):
            if me == 0 and owner == 0:
                out[at : at + rows] = self._blocks[number]
            elif me == 0:
                received = torch.empty(rows, self._dimensions, device=self._device)
                dist.recv(received, src=owner)
                out[at : at + rows] = received.cpu()
            elif me == owner:
                dist.send(self._blocks[number].to(self._device).contiguous(), dst=0)
            at += rows
        self._blocks.clear()
        return out
