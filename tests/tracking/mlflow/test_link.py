"""The link to a run's curves, and what is said where there are none."""

import shutil
import socket
import subprocess
import sys

import pytest

from dtrain.run import RunDirectory
from dtrain.tracking.journal import Journal
from dtrain.tracking.mlflow import Shipper, curves_link, default_uri
from dtrain.tracking.tracker import destination, sync
from dtrain.training.record.summary import summary
from tests.digits import tiny


@pytest.fixture
def run(digits, tmp_path) -> RunDirectory:
    """A run directory with one step, which MLflow does not have yet."""
    return make_run(digits, tmp_path / "runs")


def make_run(digits, folder, *overrides) -> RunDirectory:
    config = tiny(digits, folder, "tracking.enabled=true", *overrides)
    run = RunDirectory(config.run.path)
    run.make_folders()
    run.save_config(config)
    journal = Journal(run.journal_file)
    journal.begin_attempt(0, 0, {"run_key": "k", "data": "d", "world_size": 1, "zero_stage": 0})
    journal.append("train", 1, 24, {"loss": 1.0})
    return run


def test_the_link_names_the_run_of_a_local_store_and_needs_neither_mlflow_nor_a_server(run):
    from mlflow import MlflowClient

    assert curves_link(run) is None
    assert sync(run) == 1
    client = MlflowClient(default_uri(run.path))
    experiment = client.get_experiment_by_name("dtrain").experiment_id
    (found,) = client.search_runs([experiment])
    page = f"#/experiments/{experiment}/runs/{found.info.run_id}/model-metrics?workflowType=machine_learning"
    assert curves_link(run) == f"http://127.0.0.1:5000/{page}"
    code = "import sys; from dtrain.run import RunDirectory; from dtrain.tracking.mlflow import curves_link\n"
    code += f"print(curves_link(RunDirectory({str(run.path)!r})), 'mlflow' in sys.modules)"
    told = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert told == f"http://127.0.0.1:5000/{page} False\n"
    said = summary(run.path)
    assert f"mlflow server --backend-store-uri {default_uri(run.path)}\n  then open {curves_link(run)}\n" in said
    assert "choose *Model training* at the top left" in said


def test_a_copy_of_the_run_has_no_link_before_its_own_store_has_it(run, tmp_path):
    sync(run)
    (tmp_path / "elsewhere").mkdir()
    copy = RunDirectory(shutil.copytree(run.path, tmp_path / "elsewhere" / "tiny"))
    copy.config_file.write_text(copy.config_file.read_text().replace(str(run.path.parent), str(copy.path.parent)))
    assert curves_link(copy) is None
    assert sync(copy) == 1
    assert curves_link(copy) is not None


def test_where_nothing_arrived_the_reason_is_said_and_no_link(digits, tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
        run = make_run(digits, tmp_path, f"tracking.uri=http://{address}")
        uri = f"http://user:s3cret@{address}"
        shipper = Shipper(destination(run, tiny(digits, tmp_path, f"tracking.uri={uri}"), []))
        shipper.start()
        assert shipper.close(timeout=3.0) > 0
    said = summary(run.path)
    assert f"nothing of this run is in MLflow at http://{address}: ConnectionRefusedError" in said
    assert f"dtrain sync {run.path}" in said
    assert "curves in MLflow" not in said
    assert "s3cret" not in said + "".join(p.read_text() for p in run.path.glob("*.json"))


def test_a_server_that_goes_away_leaves_the_link_and_the_reason(run, server, digits, tmp_path, monkeypatch):
    server.start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
    config = tiny(
        digits, run.path.parent, f"tracking.uri={server.url}", "tracking.enabled=true", "tracking.experiment=away"
    )
    run.save_config(config)
    assert sync(run) == 1
    link = curves_link(run)
    assert link.startswith(f"{server.url}/#/experiments/")
    server.stop()
    Journal(run.journal_file).append("train", 2, 48, {"loss": 0.5})
    shipper = Shipper(destination(run, config, []))
    shipper.start()
    assert shipper.close(timeout=3.0) > 0
    said = summary(run.path)
    assert f"curves in MLflow: {link}\n" in said
    assert "a part is not there yet (ConnectionRefusedError" in said
    server.start()
    sync(run)
    assert "a part is not there yet" not in summary(run.path)
