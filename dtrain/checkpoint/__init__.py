"""Checkpoints that know no world size and no ZeRO stage. Begin with `format.py`; design, decision 4.

`writer.py` writes this rank's pieces while training goes on, `directory.py` says which are complete, `export.py` makes
of one a plain model or a folder for others (`diffusers.py`), `inspect.py` lists and prunes them.
"""
