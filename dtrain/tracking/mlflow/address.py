"""Where MLflow is, how its client is made to behave, and what of it may be said."""

import fcntl
import os
from contextlib import contextmanager, suppress
from pathlib import Path

from dtrain.addresses import complete
from dtrain.config import Tracking
from dtrain.credentials import redacted, without_credentials
from dtrain.errors import UserError
from dtrain.files import as_file_name
from dtrain.run import RunDirectory

# Set where the user has not: our own back-off replaces retries inside one call (MLflow's default blocks for minutes),
# and MLflow, alembic and GitPython keep off the terminal. MLflow reads them when it is imported or at each call.
ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}


def default_uri(run_dir: str | Path) -> str:
    """The tracking store where none is configured: SQLite beside the runs, so that all runs of a folder compare."""
    return f"sqlite:///{Path(run_dir).absolute().parent}/mlflow.db"


def tracking_uri(run: RunDirectory, tracking: Tracking) -> str:
    """Where the run is tracked. The section has no password: one in MLFLOW_TRACKING_URI is taken for it, or as
    `dtrain.addresses` says.
    """
    given = os.environ.get("MLFLOW_TRACKING_URI")
    if given and without_credentials(given) == tracking.uri:
        return given
    return complete(tracking.uri) if tracking.uri else default_uri(run.path)


def open_client(uri: str, experiment: str):
    """(client, experiment id); the experiment is created where there is none. Raises UserError for a deleted one."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient  # 2 s
    from mlflow.exceptions import MlflowException

    with _alone_in_database(uri) as database:
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        if found is not None:
            _check_not_deleted(found)
            return client, found.experiment_id
        # Left to itself, MLflow puts the artifacts of a SQLite store below the current directory.
        place = (database.parent / "mlartifacts" / as_file_name(experiment)).as_uri() if database else None
        try:
            return client, client.create_experiment(experiment, artifact_location=place)
        except MlflowException:
            found = client.get_experiment_by_name(experiment)  # another run of it began in the same moment
            if found is None:
                raise
            return client, found.experiment_id


def _check_not_deleted(experiment) -> None:
    if experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"the experiment {experiment.name!r} is deleted in MLflow; restore the experiment or name another: "
            f"mlflow experiments restore --experiment-id {experiment.experiment_id}, or tracking.experiment"
        )


@contextmanager
def _alone_in_database(uri: str):
    """For a SQLite store, hold its lock file and give its path.

    MLflow takes no lock when it creates its tables, and two runs that start together would both create them.
    """
    if not uri.startswith("sqlite:///"):
        yield None
        return
    database = Path(uri.removeprefix("sqlite:///")).absolute()
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield database


@contextmanager
def alone_with(directory: Path):
    """Hold a run directory against others who ship the same run, where its file system has such locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def milliseconds(seconds: float) -> int:
    return round(seconds * 1000)


def reason(error: Exception) -> str:
    """What went wrong, in one line: the system's own error ("Connection refused") where one lies underneath.

    MLflow's messages repeat the address with its password; this one does not.
    """
    if isinstance(error, UserError):
        return str(error)
    chain = [error]
    while below := chain[-1].__cause__ or chain[-1].__context__:
        chain.append(below)
    shown = next((e for e in reversed(chain) if isinstance(e, OSError)), error)
    return redacted(f"{type(shown).__name__}: {' '.join(str(shown).split())}")[:300]
