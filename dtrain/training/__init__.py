"""A training. Begin with `run_training.py`, from config to outcome, then `steps.py`, one step after the other.

player.py, zero_state.py        the only door to DeepSpeed; options.py, ema.py belong to it
feed.py, batch.py               this rank's batches
saving.py, evaluation.py        what is due after a step
check.py, start.py, identity.py whether a run may begin or go on
safety/                         what protects a run:  record/  what tells of it
"""
