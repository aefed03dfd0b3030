"""From features to numbers. Begin with `build.py`: the metrics by name; `statistics.py` holds the moments."""
