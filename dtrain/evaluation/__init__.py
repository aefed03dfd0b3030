"""Samples drawn on all ranks and compared with a held-out split. Begin with `evaluate.py`.

`generate.py` draws images, each a function of (seed, id); `invert.py` finds the noise that a picture is drawn from;
`features/` makes vectors of images, `metrics/` numbers of the vectors; `reference.py` is what they are compared with;
`requirements.py` asks before anything is computed.
"""
