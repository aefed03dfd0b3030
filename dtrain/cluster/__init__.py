"""Jobs on a cluster: what they need, whether they can start, and how far they are.

Begin with `plan.py` (memory and cost), `doctor.py` (what is wrong here) and `slurm.py` (jobs).
"""
