"""The MLflow store of a round: what somebody deletes there, and whether all has arrived in the end."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def deletes_the_run(uri: str) -> Iterator[list[str]]:
    """Delete the first run that has come to MLflow with a loss; what is yielded holds its id once that is done."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    deleted: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not deleted and not over.wait(0.1):
            experiments = [e.experiment_id for e in client.search_experiments()]
            for run in client.search_runs(experiments):
                if "train/loss" in run.data.metrics:
                    client.delete_run(run.info.run_id)
                    deleted.append(run.info.run_id)

    client.search_experiments()  # makes the tables, before the ranks look for them
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield deleted
    finally:
        over.set()
        thread.join()


def missing_in_mlflow(wanted: dict[int, float], uri: str) -> str | None:
    """What of the losses by step MLflow has otherwise; None where it has one run with exactly these."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [e.experiment_id for e in client.search_experiments()]
    found = client.search_runs(experiments)
    if len(found) != 1:
        return f"MLflow has {len(found)} runs of it"
    history = client.get_metric_history(found[0].info.run_id, "train/loss")
    arrived = sorted((m.step, m.value) for m in history)
    if arrived != sorted(wanted.items()):
        return f"MLflow has {len(arrived)} losses, and not those of the journal"
    return None
