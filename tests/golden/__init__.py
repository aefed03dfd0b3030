"""The ground that does not move: what short trainings computed, kept figure by figure.

A change that should compute the same is compared with the commit before it, bit for bit, on this machine:

    python -m tests.golden --against COMMIT

`figures.json` holds what the trainings of `configs/` gave when they were written and names the machine that wrote
them; `kept/` is a run directory with checkpoints as it was written then, which goes on for ever.
"""
