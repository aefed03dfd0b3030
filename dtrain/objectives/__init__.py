"""Ways of training: what a step descends, and what a checkpoint must hold of it beside the networks.

Begin with `denoising.py`, the one that most configs ask for; `build.py` chooses. An objective knows a process
(`dtrain/diffusion`) and calls the networks it is given; it draws no random number, and what it reads, `open`
reads before the first step.
"""
