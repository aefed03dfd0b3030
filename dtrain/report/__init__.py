"""One HTML page about runs: what they are, their curves, samples, sweeps, and what happened to them, by the clock.

The page needs nothing but itself: no network, no other file. It is made of the run directories alone, without torch,
unless nearest neighbours are asked for.
"""

from dtrain.report.page import write_report

__all__ = ["write_report"]
