"""An address of MLflow is one at which it can be, as far as its form tells."""

import pytest

from dtrain.addresses import complete
from dtrain.config import load, load_kept
from dtrain.errors import UserError
from tests.digits import CONFIG, tiny

REFUSED = {
    "localhost:5000": "has no scheme; is it http://localhost:5000?",
    "mlflow.example.org:5000/x": "is it http://mlflow.example.org:5000?",
    "10.0.0.1:5000": "is it http://10.0.0.1:5000?",
    "file:/data/mlruns": "is a folder to MLflow, which keeps no runs in folders any more; take http://HOST:PORT",
    "file:///data/mlruns": "is a folder to MLflow",
    "/data/mlruns": "is a folder to MLflow",
    "mlruns": "is a folder to MLflow",
    "http://": "names no host",
    "http:localhost:5000": "names no host",
    "http://localhost:port": "names no host",
    "ftp://me:s3cret@host/x": "'ftp://host/x' has the scheme 'ftp', which neither MLflow nor a plugin",
    "htpp://host:5000": "has the scheme 'htpp'",
    "sqlite:mlflow.db": "names no file; write sqlite:////FOLDER/mlflow.db",
    "sqlite://": "names no file",
    "sqlite:///:memory:": "names no file",
    "postgresql:me@host/db": "is not written as postgresql://HOST/NAME",
}


@pytest.mark.parametrize(("uri", "message"), REFUSED.items())
def test_an_address_that_cannot_work_is_refused_in_one_line(uri, message, monkeypatch, tmp_path):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(UserError) as met:
        load(CONFIG, [f"tracking.uri='{uri}'"])
    assert str(met.value).startswith("`tracking.uri` on the command line: ")
    assert message in str(met.value)
    assert "s3cret" not in str(met.value) + str(met.value).replace("\n", "s3cret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=r"^MLFLOW_TRACKING_URI in the environment: "):
        load(CONFIG, ["tracking.enabled=true"])
    assert complete(load(CONFIG, ["tracking.enabled=false"]).tracking.uri) == uri  # nobody asks it


@pytest.mark.parametrize(
    "uri",
    [
        *("http://localhost:5000", "https://me:pw@mlflow.example.org/path", "http://[::1]:5000", "HTTP://HOST"),
        *("sqlite:////data/mlflow.db", "sqlite:///mlflow.db", "sqlite+pysqlite:///x.db", "databricks"),
        *("databricks://profile", "postgresql+psycopg2://me:pw@host:5432/db", "mysql+pymysql://h/db", "mssql://h/db"),
    ],
)
def test_an_address_that_may_work_is_taken(uri):
    assert complete(load(CONFIG, [f"tracking.uri='{uri}'"]).tracking.uri) == uri


def test_mlflow_itself_refuses_what_is_refused_here(monkeypatch):
    """Except where it would wait for a server, or make a file."""
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    for uri in ("localhost:5000", "file:/data/mlruns", "/data/mlruns", "ftp://host/x", "htpp://host:5000"):
        with pytest.raises(MlflowException):
            MlflowClient(tracking_uri=uri).get_experiment_by_name("x")


def test_a_kept_run_with_such_an_address_is_still_read(digits, tmp_path):
    config = tiny(digits, tmp_path)
    (tmp_path / "config.yaml").write_text(config.dump().replace("uri: null", "uri: file:/data/mlruns"))
    assert load_kept(tmp_path / "config.yaml").tracking.uri == "file:/data/mlruns"


def test_a_file_below_a_tilde_lies_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert load(CONFIG, ["tracking.uri=sqlite:///~/mlflow.db"]).tracking.uri == "sqlite:////home/me/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///~/mlflow.db")
    assert load(CONFIG, ["tracking.enabled=true"]).tracking.uri == "sqlite:////home/me/mlflow.db"
