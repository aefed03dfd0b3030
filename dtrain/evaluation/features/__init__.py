"""From uint8 images to the vectors that are compared. Begin with `build.py`: the extractors by name."""
