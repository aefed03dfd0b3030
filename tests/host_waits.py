"""What would make the host wait for a GPU, found without one.

torch's `meta` device stands for the GPU: its tensors have no values, so whoever reads one raises; and what is copied
between it and the host is seen by a dispatch mode. Where values are needed, everything on the CPU counts as being on
the device, but for what was copied to the host and what was made of that alone.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

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
COPIES = {aten._to_copy, aten.copy_}


class HostWaits(TorchDispatchMode):
    """found: the operators that read, index by a mask, or copy between devices and wait, while the mode is entered.

    on_cpu: whether tensors of the CPU count as being on the device; host: those that would be the host's with a GPU
    too, such as Adam's counts.
    """

    def __init__(self, on_cpu: bool = False, host: Iterable[Tensor] = ()):
        super().__init__()
        self.found: list[str] = []
        self._on_cpu = on_cpu
        self._host = WeakTensorKeyDictionary(dict.fromkeys(host, True))

    def _of_host(self, tensor: Tensor) -> bool:
        return tensor in self._host if self._on_cpu else not tensor.is_meta

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        packet = function.overloadpacket
        is_cast = bool(given and made) and given[0].dtype != made[0].dtype  # which names its own device
        to_host = packet is aten._to_copy and kwargs.get("device") == torch.device("cpu") and not is_cast
        of_host = bool(given) and all(map(self._of_host, given))
        if self._on_cpu and (to_host or of_host):
            self._host.update(dict.fromkeys(made, True))
        sides = {self._of_host(t) for t in (*given, *made) if t.dim() or packet in COPIES}  # scalars go with the call
        queued = packet in COPIES and not to_host and (kwargs.get("non_blocking") or args[2:3] == (True,))
        masked = packet in (aten.index, aten.index_put_) and any(t.dtype == torch.bool for t in given[1:])
        if (len(sides) > 1 and not queued) or ((packet in READS or masked) and not of_host):
            self.found.append(str(packet))
        return result
