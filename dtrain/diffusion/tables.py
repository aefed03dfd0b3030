"""What the host and a device both know, so that neither has to wait for the other.

A copy from the host's memory, or a value read from the device, waits until the device has done all that it was given.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_copies = WeakTensorKeyDictionary()  # table → device → its copy there
_values = WeakTensorKeyDictionary()  # tensor → the number that fills it


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """The table on this device, bit for bit; itself where it is there. It must never be written to again."""
    if table.device == device:
        return table
    copies = _copies.setdefault(table, {})
    if device not in copies:
        with torch.inference_mode(False):  # training takes the one that an evaluation has made
            copies[device] = table.to(device)
    return copies[device]


def time_of_all(t: float, rows: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows,) of one time for all of them."""
    times = torch.full((rows,), t, dtype=dtype, device=device)
    _values[times] = torch.tensor(t, dtype=dtype, device="cpu").item()
    return times


def known(times: Tensor) -> float | None:
    """The one time that all rows of this tensor have, rounded as it is there; None unless `time_of_all` has made it."""
    return _values.get(times)
