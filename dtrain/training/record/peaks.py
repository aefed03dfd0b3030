"""What a GPU's maker says that its matrix units do: dense products (no sparsity), accumulated in fp32.

From NVIDIA's and AMD's data sheets. A share of it compares GPUs and papers; a share of what a matrix product reaches
here (`throughput.gemm_flops_per_second`) says what is left to gain on this machine.
"""

import re
from typing import NamedTuple


class Peak(NamedTuple):
    """10¹² operations a second, a multiply-add being two."""

    bf16: float
    tf32: float
    fp32: float


# Words of the device's name, the longer before the shorter that it holds → its peak; SXM unless the name says else.
PEAKS = {
    "B200": Peak(2250.0, 1125.0, 75.0),
    "GH200": Peak(989.4, 494.7, 66.9),
    "H200 NVL": Peak(835.5, 417.5, 60.0),
    "H200": Peak(989.4, 494.7, 66.9),
    "H100 NVL": Peak(835.5, 417.5, 60.0),
    "H100 PCIe": Peak(756.0, 378.0, 51.0),
    "H100": Peak(989.4, 494.7, 66.9),
    "H800": Peak(989.4, 494.7, 66.9),
    "A100": Peak(312.0, 156.0, 19.5),
    "A800": Peak(312.0, 156.0, 19.5),
    "L40S": Peak(362.0, 183.0, 91.6),
    "L40": Peak(181.0, 90.5, 90.5),
    "L4": Peak(121.0, 60.0, 30.3),
    "A40": Peak(149.7, 74.8, 37.4),
    "A30": Peak(165.0, 82.0, 10.3),
    "A10G": Peak(70.0, 35.0, 31.5),
    "A10": Peak(125.0, 62.5, 31.2),
    "RTX 4090": Peak(165.2, 82.6, 82.6),
    "RTX 3090": Peak(71.0, 35.6, 35.6),
    "MI300X": Peak(1307.4, 653.7, 163.4),
    "MI250X": Peak(383.0, 47.9, 47.9),  # both of its dies; it has no TF32
}


def nominal_flops_per_second(device_name: str, precision: str, tf32: str) -> float | None:
    """Of one device with this name at `deepspeed.precision` and `train.tf32`; None of one that is not in the table."""
    for part, peak in PEAKS.items():
        if re.search(rf"\b{part}\b", device_name):
            return 1e12 * (peak.bf16 if precision != "fp32" else peak.tf32 if tf32 == "all" else peak.fp32)
    return None
