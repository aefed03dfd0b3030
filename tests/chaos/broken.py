"""`dtrain chaos` on a product that is broken on purpose: it takes bytes of a checkpoint for good that are not.

The ranks are forked from a parent that has imported this module, so that it is the training that is broken, and not
the judge.
"""

import os
import sys
from functools import partial

import numpy as np

from dtrain.chaos import forked

if __name__ == "__main__":
    from dtrain.chaos import schedule
    from dtrain.cli import main

    forked.preload("dtrain.training.run_training", "dtrain.training.evaluation", "tests.chaos.broken")
    # By its first evaluation a run has two checkpoints, so that the second fault is the damage.
    schedule.everything = lambda job: [
        partial(schedule.kill_in_an_evaluation, job, "eval", "any", "all"),
        partial(schedule.damage_after_a_kill, "an exchanged file"),
    ]
    sys.argv[0] = "dtrain"
    main()
else:
    from dtrain.checkpoint import format

    def block(checkpoint, rank, number):
        index, path = checkpoint._indexes[rank], checkpoint._indexes.data_file(rank)
        start = number * index.block
        with open(path, "rb") as f:
            return np.frombuffer(os.pread(f.fileno(), min(index.block, index.size - start), start), np.uint8)

    format.Checkpoint._block = block
