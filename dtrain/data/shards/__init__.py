"""Shards and the manifest that lists them. Begin with `manifest.py`: what a data set consists of.

`tar.py` reads a shard's headers, `indexing.py` makes manifests, `reader.py` reads single samples by offset and checks
their crc32, `verify.py` compares every byte. `remote.py` and `cache.py` serve shards behind a URL.
"""
