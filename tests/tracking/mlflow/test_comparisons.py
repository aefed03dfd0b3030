"""A comparison in MLflow: one run, whose numbers are read back by MLflow's own client."""

import pytest

from dtrain.errors import UserError
from dtrain.report.comparison import for_mlflow
from dtrain.tracking.mlflow.address import default_uri
from dtrain.tracking.mlflow.comparisons import key_of, send_comparison
from tests.report.compared import three_runs


def test_a_comparison_is_a_run_of_its_own_and_is_brought_up_to_date(tmp_path):
    from mlflow import MlflowClient

    found, uri = three_runs(), default_uri(tmp_path / "a")
    files = [tmp_path / "comparison.html", tmp_path / "comparison.json"]
    for path in files:
        path.write_text(path.name)
    first = send_comparison(uri, "digits", ["b", "a"], *for_mlflow(found), files)
    found["runs"][1]["own"]["metrics"]["recall_pixels"] = 0.25
    files[0].write_text("anew")
    assert send_comparison(uri, "digits", ["a", "b"], *for_mlflow(found), files) == first  # found by the runs' keys
    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "comparison of slow <b>, quick, worse"
    assert run.data.params["held_out"] == "f" * 64
    assert run.data.params["slow _b_.steps"] == "50"
    assert run.data.metrics["quick/recall_pixels"] == 0.25
    assert run.data.metrics["quick/seconds_per_thousand"] == 0.2
    assert run.data.metrics["slow _b_/gpu_energy"] == 12.5
    curve = client.get_metric_history(first, "slow _b_/over_evaluations/fd_pixels")
    assert {(m.step, m.value) for m in curve} == {(5, 1.0), (50, 0.5)}
    assert {file.path for file in client.list_artifacts(first)} == {path.name for path in files}
    assert key_of(["a", "b"]) != key_of(["a", "c"])
    with pytest.raises(UserError, match=r"the comparison was not sent to MLflow at http://127.0.0.1:9: .*page and"):
        send_comparison("http://127.0.0.1:9", "digits", ["a"], *for_mlflow(found), files)
