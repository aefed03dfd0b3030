"""What a run leaves to read. Begin with `journal.py`: the journal is the truth, MLflow its reader (design, decision 6).

`tracker.py` writes it while a run trains, `best.py` chooses among evaluations, `mlflow/` ships the lines.
"""
