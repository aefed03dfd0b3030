"""From features to numbers. Begin with `build.py`: the metrics by name; `moments.py` holds mean and covariance."""
