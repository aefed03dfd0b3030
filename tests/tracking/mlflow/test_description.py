"""The run's description in MLflow: its headline, and a user's own words below it."""

import json

import pytest

from dtrain.tracking.best import best_step, training_evaluations
from dtrain.tracking.journal import Journal
from dtrain.tracking.mlflow import Destination, default_uri, sync
from dtrain.tracking.mlflow.description import distance, goodput
from dtrain.tracking.mlflow.experiment import VIEW

NOTE = "mlflow.note.content"


@pytest.fixture
def run(tmp_path):
    (tmp_path / "runs/one").mkdir(parents=True)
    return tmp_path / "runs/one"


@pytest.fixture
def journal(run):
    return Journal(run / "journal.jsonl")


def evaluate(journal, step: int, value: float, metric="fd_pixels", **more) -> None:
    context = {"ema": "ema_0", "n": 2000, "sampler": "ddim", "steps": 50, "guidance": 1.0}
    journal.append("eval", step, 128 * step, {metric: value, "seconds": 9.0}, context | more)


def shipped(run):
    """(client, run as MLflow has it) after a sync."""
    from mlflow import MlflowClient

    sync(Destination(run / "journal.jsonl", default_uri(run), "described", run.name, "k"))
    client = MlflowClient(default_uri(run))
    (found,) = client.search_runs([client.get_experiment_by_name("described").experiment_id])
    return client, found


def note(run) -> str:
    return shipped(run)[1].data.tags[NOTE]


def test_it_begins_with_the_newest_distance_its_n_and_step_and_names_the_best(run, journal):
    journal.append("train", 1, 128, {"loss": 1.0})
    assert note(run).startswith("No evaluation yet.")
    evaluate(journal, 300, 2.0)
    assert note(run).startswith(
        "**fd_pixels 2** at step 300 (38,400 images seen), the best so far. "
        "Measured on 2,000 samples of ema_0 (ddim, 50 steps)."
    )
    evaluate(journal, 600, 2.5)
    assert note(run).startswith("**fd_pixels 2.5** at step 600 (76,800 images seen), the best so far 2 at step 300. ")


def test_a_newest_evaluation_that_failed_is_told_until_there_is_one_that_did_not(run, journal):
    evaluate(journal, 300, 2.0)
    journal.append("eval_failed", 600, 76_800, context={"message": "x_0 is not finite in 8 of 8 samples"})
    told = note(run)
    assert told.startswith("**fd_pixels 2** at step 300")
    assert "The evaluation of step 600 failed: x_0 is not finite in 8 of 8 samples" in told
    evaluate(journal, 600, 1.5)
    assert "failed" not in note(run)


def test_the_best_is_the_highest_where_higher_is_better_and_only_of_the_same_n(run, journal):
    evaluate(journal, 100, 0.9, "precision_inception", n=50)
    evaluate(journal, 200, 0.5, "precision_inception")
    evaluate(journal, 300, 0.4, "precision_inception")
    assert "**precision_inception 0.4** at step 300 (38,400 images seen), the best so far 0.5 at step 200." in note(run)


def test_it_says_whether_the_bound_is_of_clipped_estimates_and_counts_the_best_among_alike_ones(run, journal):
    for step, value, more in ((100, 4.4, {"bpd_clip": True}), (200, 4.71, {}), (300, 4.72, {"bpd_clip": False})):
        evaluate(journal, step, value, "bpd", **more)
    lines = training_evaluations(run / "journal.jsonl")
    told = distance(lines)
    assert told.startswith("**bpd 4.72** at step 300 (38,400 images seen), the best so far 4.71 at step 200.")
    assert told.endswith("bpd is with x_0 not clipped.")
    assert distance(lines[:1]).endswith("bpd is with x_0 clipped to [−1, 1].")
    assert best_step(training_evaluations(run / "journal.jsonl"), "bpd", [100, 200, 300]) == 200


def test_an_evaluation_that_a_resume_made_void_is_not_told_of(run, journal):
    journal.begin_attempt(0, 0)
    evaluate(journal, 300, 2.0)
    evaluate(journal, 600, 1.0)
    journal.begin_attempt(300, 38_400)
    journal.append("train", 301, 38_528, {"loss": 1.0})
    assert note(run).startswith("**fd_pixels 2** at step 300")


def test_what_a_user_wrote_stays(run, journal):
    evaluate(journal, 300, 2.0)
    client, found = shipped(run)
    client.set_tag(found.info.run_id, NOTE, found.data.tags[NOTE] + "\nThe one for the paper.")
    evaluate(journal, 600, 1.5)
    told = note(run)
    assert told.startswith("**fd_pixels 1.5** at step 600")
    assert told.count("The one for the paper.") == told.count("dtrain keeps the lines above") == 1
    client.set_tag(found.info.run_id, NOTE, "Written over.")
    assert "**fd_pixels 1.5** at step 600" in note(run)
    assert note(run).endswith("Written over.\n")


def test_a_view_that_a_user_changed_keeps_its_columns_and_gets_those_of_new_distances(run, journal):
    evaluate(journal, 300, 2.0)
    client, found = shipped(run)
    experiment = found.info.experiment_id

    def view() -> dict:
        return json.loads(json.loads(client.get_experiment(experiment).tags[VIEW])["state"])

    assert view()["selectedColumns"] == ["metrics.`eval/ema_0/n2000/fd_pixels`", "metrics.`train/loss`"]
    mine = {"name": "Mine", "createdAt": 1, "updatedAt": 1}
    state = {"selectedColumns": ["params.`optim.lr`"], "orderByAsc": True}
    client.set_experiment_tag(experiment, VIEW, json.dumps(mine | {"state": json.dumps(state)}))
    client.set_experiment_tag(experiment, "mlflow.experimentKind", "regression")
    shipped(run)
    columns = ["metrics.`eval/ema_0/n2000/fd_pixels`", "params.`optim.lr`"]
    assert view() == {"selectedColumns": columns, "orderByAsc": True}
    assert client.get_experiment(experiment).tags["mlflow.experimentKind"] == "regression"
    client.set_experiment_tag(experiment, VIEW, json.dumps(mine | {"state": "deflate;eJyrVkrOzy0oSi0u"}))
    shipped(run)
    assert "deflate;" in client.get_experiment(experiment).tags[VIEW]


def test_goodput_adds_up_attempts():
    first = {"productive_s": 60.0, "restart_s": 30.0, "evaluation_s": 30.0, "wall_s": 120.0, "lost_steps": 0}
    second = {"productive_s": 90.0, "restart_s": 30.0, "wall_s": 120.0, "lost_steps": 7, "refused_images": 24}
    assert goodput([first, second]) == (
        "4.0 min: steps 62 %, evaluations 12 %, waiting for data 0 %, starts 25 %, saving 0 %, refused steps 0 %, "
        "7 steps lost, 24 images refused"
    )


def test_guidance_over_each_condition_apart_is_read_and_told_as_it_was_asked(run, journal):
    from dtrain.tracking.history import History
    from dtrain.tracking.mlflow.description import distance

    evaluate(journal, 300, 2.0, guidance="text=3,label=1.5")
    evaluate(journal, 600, 1.0, guidance=[3, 1.5])  # no line of ours
    told = distance(History.read(run / "journal.jsonl").counting("eval"))
    assert told.startswith("**fd_pixels 2** at step 300")
    assert "(ddim, 50 steps, guidance text=3,label=1.5)" in told
