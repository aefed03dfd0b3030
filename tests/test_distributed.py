"""What a process sets for itself before it computes."""

import subprocess
import sys

FAULTS = """
import resource
import torch
from dtrain import distributed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        [torch.ones(7 * 2**20) for _ in range(10)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

distributed.prepare()
faults()
print(faults())
"""


def test_the_memory_of_freed_tensors_is_used_again():
    """10 times 10 tensors of 28 MiB: each 7,168 pages, where they are asked of the system every time."""
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 7168
