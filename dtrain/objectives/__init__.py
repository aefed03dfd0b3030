"""Ways of training: what a step descends, and what a checkpoint must hold of it beside the networks.

Begin with `denoising.py`, the one that all of today's configs ask for; `build.py` chooses. An objective knows a process
(`dtrain/diffusion`) and calls the networks it is given; it reads no file and draws no random number.
"""
