"""What keys become in MLflow: always taken, in order, the same for ever; and what is refused holds up nothing else."""

import logging

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from dtrain.tracking.journal import Journal, read
from dtrain.tracking.mlflow import Destination, default_uri, sync
from dtrain.tracking.mlflow.keys import allowed, image_key, metric_key

PATH = "/data/../references//imagenet-64.npz"
TIMESTEPS = list(range(0, 1000, 7))
SETTING = {"reference": PATH, "timesteps": TIMESTEPS, "guidance_interval": [0.0, 0.5]}


def line(event: str, metrics: dict, **context) -> dict:
    return {"event": event, "step": 1, "metrics": metrics, "context": context}


def evaluation(differs: dict) -> dict:
    return line("eval", {"fd_pixels": 1.0}, ema="ema_0", n=8, differs=differs)


changes = st.dictionaries(st.text(min_size=1), st.one_of(st.text(), st.floats(), st.lists(st.integers())))


@settings(deadline=None)  # the first example imports MLflow
@given(changes, st.text(min_size=1))
@example({}, ".")
def test_mlflows_own_checks_pass_every_key(differs, name):
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name, _validate_param_name

    for key in (metric_key(evaluation(differs), name), metric_key(line("fault", {name: 1.0}), name), allowed(name)):
        if key is not None:
            _validate_metric_name(key)
            _validate_param_name(key)
            assert len(key) <= MAX_ENTITY_KEY_LENGTH


def test_a_key_holds_no_paths_and_no_long_lists_yet_tells_settings_apart():
    key = metric_key(evaluation(SETTING), "fd_pixels")
    assert key.startswith("eval/ema_0/n8/reference-imagenet-64.npz-")
    assert f"/timesteps-{len(TIMESTEPS)} values-" in key
    assert "/guidance_interval-_0.0_ 0.5_/" in key  # short ones as they are
    others = [{"reference": f"/elsewhere{PATH}"}, {"timesteps": TIMESTEPS[1:]}, {"guidance_interval": [0.0, 0.6]}]
    assert len({key, *(metric_key(evaluation(SETTING | other), "fd_pixels") for other in others)}) == 4


def test_a_key_that_is_too_long_is_cut_and_keeps_a_hash_of_the_whole():
    first, second = (allowed(f"{'a/' * 200}{end}") for end in "xy")
    assert len(first) == len(second) == 250
    assert first != second
    assert first[:240] == second[:240]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "runs/one/samples").mkdir(parents=True)
    return tmp_path / "runs/one"


def destination(run, **more) -> Destination:
    return Destination(run / "journal.jsonl", default_uri(run), "keys", run.name, "k", **more)


def in_mlflow(run):
    from mlflow import MlflowClient

    client = MlflowClient(default_uri(run))
    (found,) = client.search_runs([client.get_experiment_by_name("keys").experiment_id])
    return client, found


def histories(run) -> dict[str, list[tuple[int, float]]]:
    client, found = in_mlflow(run)
    return {
        key: sorted((m.step, m.value) for m in client.get_metric_history(found.info.run_id, key))
        for key in found.data.metrics
    }


def test_an_evaluation_against_a_path_at_many_timesteps_arrives_with_all_that_follows(run):
    journal = Journal(run / "journal.jsonl")
    Image.new("L", (8, 8), 200).save(run / "samples/1.png")
    context = {"ema": "ema_0", "n": 8, "differs": SETTING, "artifact": "samples/1.png"}
    journal.append("eval", 1, 8, {"fd_pixels": 3.0}, context)
    journal.append("train", 2, 16, {"loss": 1.0})
    assert sync(destination(run)) == 2
    key = metric_key(evaluation(SETTING), "fd_pixels")
    assert histories(run) == {key: [(1, 3.0)], "train/loss": [(2, 1.0)]}
    client, found = in_mlflow(run)
    (image,) = [f.path for f in client.list_artifacts(found.info.run_id, "images") if f.path.endswith(".png")]
    assert image.startswith(f"images/{image_key(evaluation(SETTING)).replace('/', '~')}+step+1+")


def test_a_value_refused_for_good_is_set_aside_and_named_once_while_the_rest_ships(run, caplog, monkeypatch):
    """MLflow takes no time before 1970: a machine whose clock is wrong."""
    journal = Journal(run / "journal.jsonl")
    journal.append("train", 1, 8, {"loss": 1.0, "lr": 0.1})
    with monkeypatch.context() as patch:
        patch.setattr("dtrain.tracking.journal.time.time", lambda: -1000.0)
        journal.append("fault", 2, 16, {"grad_norm": 9.0})
        journal.append("fault", 3, 24, {"grad_norm": 8.0})
    journal.append("train", 4, 32, {"loss": 0.5, "lr": 0.2})
    with caplog.at_level(logging.WARNING):
        assert sync(destination(run)) == 2
    assert caplog.text.count("MLflow refuses 'fault/grad_norm' for good") == 1
    assert histories(run) == {"train/loss": [(1, 1.0), (4, 0.5)], "train/lr": [(1, 0.1), (4, 0.2)]}
    assert in_mlflow(run)[1].data.tags["dtrain.refused"] == "fault/grad_norm"
    journal.append("train", 5, 40, {"loss": 0.25})
    assert sync(destination(run)) == 1
    assert sync(destination(run)) == 0


def test_a_run_that_takes_nothing_sets_nothing_aside(run):
    journal = Journal(run / "journal.jsonl")
    journal.append("train", 1, 8, {"loss": 1.0})
    sync(destination(run))
    client, found = in_mlflow(run)
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    from dtrain.tracking.mlflow.curves import Curves

    refused: dict = {}
    curves = Curves(client, found, refused)
    client.delete_run(found.info.run_id)
    with pytest.raises(MlflowException, match="active"):
        curves.log([Metric("train/loss", 0.5, 1, 2)])
    assert refused == {}


def test_a_run_that_began_under_former_keys_goes_on_under_them(run):
    """What an earlier version wrote: other keys, curves of goodput, 97 params, pictures in one series."""
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    journal = Journal(run / "journal.jsonl")
    metrics = {"loss": 1.0, "images_per_second": 9.0, "loss_level_0": 0.5, "bad_samples": 0}

    def lines(step):
        journal.append("train", step, 8 * step, metrics)
        journal.append("checkpoint", step, 8 * step, {"seconds": 0.1}, {"path": f"step-{step}", "hash": "h"})
        journal.append("goodput", step, 8 * step, {"share": 0.5, "wall_s": 9.0})
        Image.new("L", (8, 8), step).save(run / f"samples/{step}.png")
        context = {"ema": "ema_0", "n": 8, "artifact": f"samples/{step}.png"}
        journal.append("eval", step, 8 * step, {"fd_pixels": 3.0, "seconds": 2.0}, context)

    lines(1)
    former = {"train/loss": 1.0, "train/images_per_second": 9.0, "train/loss_level_0": 0.5, "train/bad_samples": 0.0}
    former |= {"checkpoint/seconds": 0.1, "goodput/share": 0.5, "goodput/wall_s": 9.0}
    former |= {"eval/ema_0/n8/fd_pixels": 3.0, "eval/ema_0/n8/seconds": 2.0}
    params = {f"section.key_{i}": str(i) for i in range(97)}
    client = MlflowClient(default_uri(run))
    experiment = client.create_experiment("keys", artifact_location=(run.parent / "mlartifacts").as_uri())
    run_id = client.create_run(experiment, tags={"dtrain.run_key": "k"}, run_name="one").info.run_id
    at = round(1000 * read(run / "journal.jsonl")[-1]["time"])
    client.log_batch(run_id, [Metric(k, v, at, 1) for k, v in former.items()], [Param(*p) for p in params.items()])
    client.log_image(run_id, Image.new("L", (8, 8)), key="samples", step=1, synchronous=True)
    lines(2)
    sync(destination(run, params={"section.key_1": "another", "optim.lr": 0.1}))
    assert histories(run) == {key: [(1, value), (2, value)] for key, value in former.items()}
    assert in_mlflow(run)[1].data.params == params | {"optim.lr": "0.1"}
    images = [f.path for f in client.list_artifacts(run_id, "images") if f.path.endswith(".png")]
    assert sorted(path.split("+")[:3] for path in images) == [["images/samples", "step", s] for s in "12"]
