"""An address of MLflow is one at which it can be, as far as its form tells."""

import pytest

from dtrain.addresses import complete, environment
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


def test_containers_of_one_account_are_two_places():
    train, held_out = "abfss://train@acc.dfs.core.windows.net/im", "abfss://val@acc.dfs.core.windows.net/im"
    data = load(CONFIG, ["data.manifest=m.json", f"data.shards={train}", f"data.holdout_shards={held_out}"]).data
    assert (data.shards, data.holdout_shards) == (train, held_out)
    assert (complete(f"{data.shards}/1.tar"), complete(data.holdout_shards)) == (f"{train}/1.tar", held_out)


def test_a_container_keeps_its_name_beside_a_signature(monkeypatch):
    place = "abfss://signed@acc.net/im"
    kept = load(CONFIG, ["data.manifest=m.json", f"data.shards={place}?sig=1"]).data.shards
    assert kept == f"{place}?•••"
    assert complete(f"{place}/1.tar") == f"{place}/1.tar?sig=1"
    monkeypatch.setenv("DTRAIN_CREDENTIALS", "abfss://lent@acc.net/?sig=2")
    assert complete("abfss://lent@acc.net/1.tar") == "abfss://lent@acc.net/1.tar?sig=2"


def test_two_addresses_that_differ_in_what_is_not_kept_are_refused_within_one_config():
    def given(*addresses):
        keys = ("data.shards", "data.holdout_shards")
        return load(CONFIG, ["data.manifest=m.json", *(f"{k}='{a}'" for k, a in zip(keys, addresses, strict=False))])

    with pytest.raises(
        UserError, match=r"^`data.holdout_shards` .*https://h/blob\?••• is given twice, with .* own path$"
    ):
        given("https://h/blob?set=train&sig=a", "https://h/blob?set=val&sig=a")
    azure = "https://h/blob?set=train&sv=2024-01-01&sp=r&se=2026-{}&sig={}"
    given(azure.format(1, "a"), azure.format(2, "b"))
    amazon = "https://{}:pw@h/blob?X-Amz-Date={}&X-Amz-Credential=k&X-Amz-Signature=b"
    given(amazon.format("me", 1), amazon.format("you", 2))
    # Another config, later, with a renewed signature.
    given("https://h/blob?set=train&sig=new")
    assert complete("https://h/blob/1.tar") == "https://h/blob/1.tar?set=train&sig=new"
    given("https://h/blob?set=val&sig=new")
    assert complete("https://h/blob/1.tar") == "https://h/blob/1.tar?set=val&sig=new"


def test_a_password_with_a_space_reaches_the_processes_that_are_started(monkeypatch):
    monkeypatch.setattr("dtrain.addresses._given", {})
    shards = load(CONFIG, ["data.manifest=m.json", "data.shards='https://me:pa ss@spaced/x?sig=a'"]).data.shards
    lent = environment()
    assert lent == {"DTRAIN_CREDENTIALS": "https://me:pa%20ss@spaced/x?sig=a"}
    here = complete(f"{shards.removesuffix('?•••')}/1.tar")
    monkeypatch.setattr("dtrain.addresses._given", {})  # as in another process
    monkeypatch.setenv("DTRAIN_CREDENTIALS", lent["DTRAIN_CREDENTIALS"])
    assert complete("https://spaced/x/1.tar") == here == "https://me:pa%20ss@spaced/x/1.tar?sig=a"
