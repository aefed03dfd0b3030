"""What would make the host wait for a GPU, found without one.

torch's `meta` device stands for the GPU: its tensors have no values, so whoever reads one raises; and what is copied
between it and the host is seen by a dispatch mode.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {  # operators whose result, or its shape, the host must know: on a GPU each waits for all that was queued
    aten._local_scalar_dense,
    aten.is_nonzero,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.repeat_interleave,
}


class HostWaits(TorchDispatchMode):
    """found: the operators that read, index by a mask, or copy between devices, while the mode is entered."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        packet = function.overloadpacket
        masked = packet in (aten.index, aten.index_put_) and any(
            t.dtype in (torch.bool, torch.uint8) for t in given[1:]
        )
        devices = {t.device.type for t in (*given, *made) if t.dim() or packet in (aten._to_copy, aten.copy_)}
        if packet in READS or masked or len(devices) > 1:
            self.found.append(str(packet))
        return result
