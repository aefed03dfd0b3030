"""Between what shards hold, what the network sees and what is shown.

Begin with `pixels.py`, where the network sees the pixels themselves; `build.py` chooses.
"""
