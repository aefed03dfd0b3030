"""The gradient's norm is brought to the host once a step, where ZeRO has just computed it.

DeepSpeed asks twice whether it is finite, and whoever judges the step once more; each would wait for the device again,
the last for the whole optimizer. So what DeepSpeed's functions give is on the host already: it clips by it as well, as
a tensor without dimensions may be on the CPU whatever it multiplies.
"""

import torch
from torch import Tensor


def read_once(zero, stage: int) -> None:
    """Let the norm of `zero`, DeepSpeed's optimizer of stage 1, 2 or 3, be a tensor of the CPU, and so all made of it.

    The values are the device's own, bit for bit. Only this instance is changed.
    """
    if stage == 3:
        of_groups = zero._get_norm_groups
        zero._get_norm_groups = lambda: list(_on_host(torch.stack(of_groups())))  # one read, however many groups
    else:
        whole = zero.scaled_global_norm
        zero.scaled_global_norm = lambda norm_type=2: _on_host(whole(norm_type))


def _on_host(norm: Tensor) -> Tensor:
    return norm.to("cpu", copy=True)  # a copy on a CPU too, so that a test can count them
