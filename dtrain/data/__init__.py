"""From shards to batches. Begin with `stream.py`: `dataset[step]` is everything a rank needs for that step.

    shards/   files: tar, manifest, reading by offset, verifying, remote places and their cache
    order/    which sample is the k-th image of a run: pure functions, no I/O
    fields/   what a sample's files become: pixels, labels, arrays
    pack/     from pictures of any kind to shards

`loader.py` makes batches ahead in worker processes. Nothing here knows a model or a run directory.
"""
