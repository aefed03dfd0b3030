"""What tells of a run while it trains: speed, time, losses by level, progress. Begin with `throughput.py`."""
