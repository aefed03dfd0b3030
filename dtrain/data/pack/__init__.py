"""From pictures of any kind to shards. Begin with `pack.py`, which writes the splits.

`source.py` says what can be packed, `sources.py` opens each kind (`folders.py`, `parquet.py`, `torchvision_sets.py`),
`fitness.py` decides which pictures training could decode, `writing.py` writes the tar files.
"""
