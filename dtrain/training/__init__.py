"""A training, from its config to its outcome. Begin with `step.py`, one step as the algorithm says it.

`run_training.py` goes from the config to the outcome, `steps.py` from step to step.

players.py, player.py           the only door to DeepSpeed: its options.py, ema.py, zero_state.py
feed.py                         this rank's batches
saving.py, evaluation.py        what is due after a step
check.py, start.py, identity.py whether a run may begin or go on
safety/                         what protects a run:  record/  what tells of it
"""
