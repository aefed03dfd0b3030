"""Jobs on a cluster. Begin with `plan.py` (memory and cost), `doctor.py` (what is wrong here), `slurm.py` (jobs)."""
