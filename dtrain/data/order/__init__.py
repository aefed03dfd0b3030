"""Which sample is the k-th image of a run. Begin with `order.py`, a pure function of (seed, place); design, decision 1.

`mixture.py` joins several data sets, `skipped.py` leaves ranges out, `streams.py` says how many streams there are.
"""
