"""A training. Begin with `run_training.py`, from config to outcome, then `steps.py`, one step after the other.

players.py, player.py           the only door to DeepSpeed: its options.py, ema.py, zero_state.py
feed.py, batch.py               this rank's batches
saving.py, evaluation.py        what is due after a step
check.py, start.py, identity.py whether a run may begin or go on
safety/                         what protects a run:  record/  what tells of it
"""
