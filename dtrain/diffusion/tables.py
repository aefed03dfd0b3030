"""A process' tables where a batch is: each is copied to a device once, and not once a call.

A copy from the host's memory makes the host wait until the device has done all that it was given before.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_copies = WeakTensorKeyDictionary()  # table → device → its copy there


def on_device(table: Tensor, device: torch.device) -> Tensor:
    """The table on this device, bit for bit; itself where it is there. It must never be written to again."""
    if table.device == device:
        return table
    copies = _copies.setdefault(table, {})
    if device not in copies:
        with torch.inference_mode(False):  # training takes the one that an evaluation has made
            copies[device] = table.to(device)
    return copies[device]
