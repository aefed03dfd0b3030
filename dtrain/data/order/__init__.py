"""Which sample is the k-th image of a run. Begin with `order.py`, a pure function of (seed, k); design, decision 1.

`mixture.py` joins several sources, `skipped.py` leaves images out, `streams.py` says how many streams there are.
"""
