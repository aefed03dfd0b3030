"""`dtrain encode`: what frozen networks say of a data set, as shards of their own. Begin with `encode.py`.

`pictures.py` makes latents, `captions.py` what a text encoder says.
"""
