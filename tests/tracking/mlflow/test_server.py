"""A training on two nodes, resumed, evaluated and swept, as it stands in a real `mlflow server`: read by REST."""

import base64
import hashlib
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dtrain.data.shards import manifest as manifests
from dtrain.lock import RunLock
from dtrain.position import Position
from dtrain.run import RunDirectory
from dtrain.tracking.journal import Journal, evaluations, events, read
from dtrain.tracking.mlflow import Destination, sync
from dtrain.tracking.provenance import code
from dtrain.tracking.system import parse_gpus
from dtrain.tracking.tracker import record_evaluation
from tests.command_line import command
from tests.digits import tiny
from tests.ranks import run_ranks
from tests.tracking.servers import Proxy, Rest, pairs

EXPERIMENT = "two nodes"
PASSWORD, TOKEN = "s3cret", "t0ken-of-a-team"
TWO_NODES = {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
FD = "eval/ema_0/n24/fd_pixels"


class Tracked:
    """The run, what it printed, and who it said it was."""


def one_after_another(jobs):
    return [command(*job) for job in jobs]


@pytest.fixture(scope="session")  # as the server: a second training would be a second run there
def tracked(server, digits, tmp_path_factory):
    server.start()
    proxy, folder, found = Proxy(server.port), tmp_path_factory.mktemp("runs"), Tracked()
    more = ("tracking.enabled=true", f"tracking.experiment={EXPERIMENT}", "tracking.system_every=0.3", "train.steps=8")
    more += ("train.checkpoint_every=4", "eval.every=4", "eval.num_samples=24", "train.keep_last=2")
    config = folder / "tiny.yaml"
    config.write_text(tiny(digits, folder, *more).dump())
    uri = f"tracking.uri=http://user:{PASSWORD}@{proxy.url.removeprefix('http://')}"
    run = folder / "tiny"

    commit, _ = code()
    printed = run_ranks(command, 2, "train", config, uri, environment=TWO_NODES)
    (run / "report.html").write_text("<p>what the run came to")
    token = {"MLFLOW_TRACKING_TOKEN": TOKEN}
    more = ("train.steps=12", "optim.lr=4e-4", f"tracking.uri={proxy.url}")
    printed += run_ranks(command, 2, "train", config, *more, environment=TWO_NODES | token)
    jobs = ["--step 8 --json", "--n 48 --eta 1 --step 12", "--n 48 --eta 1 --step 8", "--n 48 --step 8"]
    jobs = [["evaluate", run, *job.split()] for job in jobs] + [["sweep", run, "--steps", "2,3", "--eta", "0,1"]]
    printed += run_ranks(one_after_another, 1, jobs, environment=token)[0]
    assert {code for code, _ in printed} == {0}, printed
    found.commit = commit
    found.printed, found.run, found.authorizations = "".join(text for _, text in printed), run, proxy.authorizations
    found.rest = Rest(server.url)
    yield found
    proxy.close()


@pytest.fixture
def there(tracked):
    """The run as REST tells it."""
    return tracked.rest.run(EXPERIMENT, "tiny")


def test_every_history_is_the_journals(tracked, there):
    expected: dict = {}
    lines = read(tracked.run / "journal.jsonl")
    lines += [line for path in sorted(tracked.run.glob("*-*.jsonl")) for line in events(path)]
    for line in lines:
        context, step = line["context"], line["step"]
        prefix = line["event"]
        if prefix == "eval":
            prefix += f"/{context['ema']}/n{context['n']}" + ("/eta-1.0" if context["eta"] == 1 else "")
        if prefix == "system":
            prefix, step = f"system/{context['node']}", context["sample"]
        for name, value in line["metrics"].items():
            if prefix in ("goodput", "checkpoint") or name in ("seconds", "bad_samples"):
                continue  # no curves; no sample was bad
            section = prefix
            if prefix == "train" and name not in ("loss", "grad_norm", "lr"):
                section = "train/levels" if name.startswith("loss_level_") else "train/speed"
            points = expected.setdefault(f"{section}/{name}", [])
            if prefix.split("/")[0] != "eval" or step not in [s for s, _, _ in points]:
                points.append((step, round(1000 * line["time"]), value))
    assert tracked.rest.history(there) == {key: sorted(points) for key, points in expected.items()}
    assert there["info"]["status"] == "FINISHED"
    ends = [read(tracked.run / "journal.jsonl")[i]["time"] for i in (0, -1)]  # evaluations come after it
    assert [there["info"][k] for k in ("start_time", "end_time")] == [round(1000 * end) for end in ends]


def test_older_checkpoints_are_evaluated_in_any_order(tracked, there):
    history = tracked.rest.history(there)
    assert [step for step, _, _ in history["eval/ema_0/n48/eta-1.0/fd_pixels"]] == [8, 12]
    assert [step for step, _, _ in history["eval/ema_0/n48/fd_pixels"]] == [8]
    assert [step for step, _, _ in history[FD]] == [4, 8, 12]
    again = [line for line in evaluations(tracked.run / "journal.jsonl") if line["context"]["n"] == 24]
    assert [line["step"] for line in again] == [4, 8, 12, 8]  # the last: evaluated once more, and the same
    assert again[1]["metrics"]["fd_pixels"] == pytest.approx(again[3]["metrics"]["fd_pixels"], rel=1e-3)


def test_every_node_tells_how_busy_it_is(tracked, there):
    metrics = {m["key"] for m in there["data"]["metrics"]}
    for node in "01":
        assert {f"system/{node}/cpu_utilization_percentage", f"system/{node}/system_memory_usage_megabytes"} <= metrics
    samples = [line["context"]["sample"] for line in events(tracked.run / "system-rank-1.jsonl")]
    assert samples == list(range(1, len(samples) + 1))  # over both attempts
    assert {1, 2} <= {line["attempt"] for line in events(tracked.run / "system-rank-1.jsonl")}


def test_the_headline_comes_first_of_all_sections_and_the_loss_among_the_first_of_the_next(there):
    """MLflow makes a section of each key's part before the last "/", and sorts sections and charts by name."""
    keys = sorted(m["key"] for m in there["data"]["metrics"] if not m["key"].startswith("system/"))
    sections = sorted({key.rpartition("/")[0] for key in keys})
    assert sections[0] == "eval/ema_0/n24"
    assert [s for s in sections if not s.startswith("eval/")] == ["train", "train/levels", "train/speed", "validation"]
    assert [key for key in keys if key.startswith("eval/ema_0/n24/")] == [FD]
    assert [key for key in keys if key.rpartition("/")[0] == "train"] == ["train/grad_norm", "train/loss", "train/lr"]


def test_params_name_the_run_as_it_began_and_the_whole_config_is_an_artifact(tracked, there):
    params, tags = pairs(there["data"]["params"]), pairs(there["data"]["tags"])
    assert params == {
        "data.batch_size": "24",
        "data.image_size": "8",
        "ema": "[{decay: 0.995}]",
        "model.depth": "1",
        "model.heads": "2",
        "model.name": "dit",
        "model.patch": "2",
        "model.width": "32",
        "optim.lr": "0.0005",
        "optim.warmup_steps": "5",
        "train.steps": "8",
    }
    assert tracked.rest.artifact(there, "config.yaml") == (tracked.run / "config.yaml").read_bytes()
    assert tags["dtrain.changed.optim.lr"] == "0.0005 → 0.0004 at step 8"
    assert tags["dtrain.attempts"] == "2"
    assert tags["dtrain.attempt.1"].startswith("from step 0, ")
    assert tags["dtrain.attempt.2"].startswith("from step 8, ")
    assert "2 ranks, ZeRO 2, " in tags["dtrain.attempt.2"]
    assert tags["dtrain.data"] == manifests.load_all(RunDirectory(tracked.run).config().data).hash
    assert tags.get("mlflow.source.git.commit") == tracked.commit


def test_pictures_report_packages_and_deepspeeds_config_are_artifacts(tracked, there):
    rest, run = tracked.rest, tracked.run
    images = [f for f in rest.artifacts(there, "images") if f.endswith(".png")]
    series = [int(f.split("+")[2]) for f in images if "~samples+" in f]
    # A run that finished twice has the last picture of each time once more, in a card that opens on it.
    lasts = [f.split("~")[-1].split("+")[0] for f in images if "~newest" in f]
    assert sorted(series) == [4, 8, 12]
    assert sorted(lasts) == ["newest at step 12", "newest at step 8"]
    assert rest.artifact(there, "report.html") == b"<p>what the run came to"
    for attempt in (1, 2):
        for name in ("packages.txt", "deepspeed.json"):
            path = f"attempts/{attempt}/{name}"
            assert rest.artifact(there, path) == (run / path).read_bytes()
    packages = (run / "attempts/1/packages.txt").read_text().splitlines()
    assert f"torch=={torch.__version__.split('+')[0]}" in [line.split("+")[0] for line in packages]
    deepspeed = json.loads((run / "attempts/2/deepspeed.json").read_text())
    assert (deepspeed["zero_optimization"]["stage"], deepspeed["train_batch_size"]) == (2, 24)


def test_data_sets_are_mlflows_own_once_over_all_attempts(tracked, there, digits):
    found = {}
    for one in there["inputs"]["dataset_inputs"]:
        dataset, (tag,) = one["dataset"], one["tags"]
        found[tag["value"]] = (dataset["name"], dataset["digest"], json.loads(dataset["source"])["uri"])
    config = RunDirectory(tracked.run).config()
    train, held_out = (m.hash[:12] for m in (manifests.load_all(config.data), manifests.load_holdout(config.data)))
    assert found == {
        "training": (f"{digits.name}/train", train, f"{digits}/train"),
        "evaluation": (f"{digits.name}/holdout", held_out, f"{digits}/holdout/manifest.json"),
    }
    assert len(there["inputs"]["dataset_inputs"]) == 2


def test_the_first_page_has_the_headline_distance_and_goodput(tracked, there):
    tags = pairs(there["data"]["tags"])
    own = [line for line in read(tracked.run / "journal.jsonl") if line["event"] == "eval"]
    last, best = own[-1], min(own, key=lambda line: line["metrics"]["fd_pixels"])
    note = tags["mlflow.note.content"]
    assert note.startswith(f"**fd_pixels {last['metrics']['fd_pixels']:.4g}** at step 12 (288 images seen)")
    assert ("the best so far." if best is last else f"at step {best['step']}.") in note
    assert "Measured on 24 samples of ema_0 (ddim, 5 steps)." in note
    info = there["info"]
    assert f"#/experiments/{info['experiment_id']}/runs/{info['run_id']}/model-metrics?" in note
    assert f"/runs/{info['run_id']}/artifacts/report.html" in note
    goodput = [line for line in events(tracked.run / "journal.jsonl") if line["event"] == "goodput"]
    wall = {line["attempt"]: line["metrics"]["wall_s"] for line in goodput}  # the newest of each
    assert len(wall) == 2  # attempts
    assert tags["dtrain.goodput"].startswith(f"{sum(wall.values()) / 60:,.1f} min: steps ")
    assert tags["dtrain.goodput"].endswith("0 steps lost, 0 images refused")


def test_the_experiment_is_of_model_training_with_a_view_of_runs_by_distance(tracked, there):
    told = tracked.rest.get("experiments/get", experiment_id=there["info"]["experiment_id"])["experiment"]
    tags = pairs(told["tags"])
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert tags["mlflow.experiment.primaryMetric.name"] == FD
    view = json.loads(tags["mlflow.sharedViewState.dtrain-distances"])
    assert json.loads(view["state"])["selectedColumns"] == [f"metrics.`{FD}`", "metrics.`train/loss`"]


def test_the_printed_link_is_this_runs(tracked, there):
    info = there["info"]
    page = f"/#/experiments/{info['experiment_id']}/runs/{info['run_id']}/model-metrics?workflowType=machine_learning"
    (link,) = {line.split()[-1] for line in tracked.printed.splitlines() if "curves in MLflow" in line}
    assert link.endswith(page)
    assert "choose *Model training* at the top left" in tracked.printed


def test_each_checkpoint_is_a_model_and_the_best_is_found_by_its_distance(tracked, there):
    models = tracked.rest.models(there, order_by=f"metrics.{FD}")
    values = [next(m["value"] for m in model["data"]["metrics"] if m["key"] == FD) for model in models]
    assert values == sorted(values)
    journal = read(tracked.run / "journal.jsonl")
    distances = {line["step"]: line["metrics"]["fd_pixels"] for line in journal if line["event"] == "eval"}
    params = [pairs(model["data"]["params"]) for model in models]
    assert [int(p["step"]) for p in params] == sorted(distances, key=distances.get)
    assert values == sorted(distances.values())
    for model, told in zip(models, params, strict=True):
        tags = pairs(model["info"]["tags"])
        assert (told["images"], told["ema"]) == (str(24 * int(told["step"])), "ema_0: decay 0.995")
        path = Path(tags["dtrain.path"])
        assert path == tracked.run / f"checkpoints/step-{int(told['step']):08d}"
        assert tags["dtrain.kept"] == ("no" if told["step"] == "4" else "yes")  # two are kept
        if path.exists():
            assert tags["dtrain.hash"] == hashlib.sha256((path / "manifest.json").read_bytes()).hexdigest()
        assert model["info"]["status"] == "LOGGED_MODEL_READY"
    (eight,) = (m for m, p in zip(models, params, strict=True) if p["step"] == "8")
    assert "eval/ema_0/n48/eta-1.0/fd_pixels" in {m["key"] for m in eight["data"]["metrics"]}


def test_a_sweep_is_a_parent_with_a_child_for_each_combination(tracked, there):
    rest = tracked.rest
    parent = rest.run(EXPERIMENT, "tiny sweep")
    assert pairs(parent["data"]["tags"])["mlflow.parentRunId"] == there["info"]["run_id"]
    children = rest.runs(EXPERIMENT, f"tags.`mlflow.parentRunId` = '{parent['info']['run_id']}'")
    lines = [json.loads(text) for text in (tracked.run / "sweep.jsonl").read_text().splitlines()]
    found = {}
    for child in children:
        params = pairs(child["data"]["params"])
        assert (params["checkpoint"], params["ema"], params["n"]) == ("12", "ema_0", "24")
        assert child["info"]["status"] == "FINISHED"
        found[float(params["eta"]), int(params["steps"])] = rest.history(child)["fd_pixels"]
    assert found == {
        (line["context"]["eta"], line["context"]["steps"]): [
            (12, round(1000 * line["time"]), line["metrics"]["fd_pixels"])
        ]
        for line in lines
    }
    assert set(found) == {(eta, steps) for eta in (0.0, 1.0) for steps in (2, 3)}
    assert rest.artifacts(parent) == ["sweep.png"]


def test_nothing_is_left_to_sync(tracked, server, monkeypatch):
    before = {run["info"]["run_id"]: tracked.rest.history(run) for run in tracked.rest.runs(EXPERIMENT)}
    assert len(before) == 6
    ((code, text),) = run_ranks(command, 1, "sync", tracked.run)
    assert (code, text) == (0, "0 journal lines sent\n")
    assert {run["info"]["run_id"]: tracked.rest.history(run) for run in tracked.rest.runs(EXPERIMENT)} == before


def test_passwords_and_tokens_open_doors_and_are_kept_nowhere(tracked, there):
    basic = base64.b64encode(f"user:{PASSWORD}".encode()).decode()
    assert {f"Basic {basic}", f"Bearer {TOKEN}"} <= tracked.authorizations
    files = [path for path in tracked.run.rglob("*") if path.is_file()]
    assert len(files) > 20
    for secret in (PASSWORD, TOKEN, basic):
        assert [path for path in files if secret.encode() in path.read_bytes()] == []
        assert secret not in tracked.printed
        assert secret not in json.dumps(there)
    assert b"uri: http://127.0.0.1:" in tracked.rest.artifact(there, "config.yaml")


def test_an_evaluation_during_a_training_is_left_to_the_training(tmp_path, digits):
    """The run directory is held, so the result goes to a file of its own, which the training's shipper reads."""
    run = RunDirectory(tmp_path / "tiny")
    run.make_folders()
    run.save_config(tiny(digits, tmp_path, "tracking.enabled=true", "tracking.uri=http://127.0.0.1:9"))
    training = Journal(run.journal_file)
    start = {"run_key": "k", "data": "d", "world_size": 1, "zero_stage": 0}
    training.begin_attempt(0, 0, start)
    lock = RunLock(run.lock_file)
    lock.acquire()
    before = run.journal_file.read_bytes()
    context = {"ema": "ema_0", "n": 10}
    assert record_evaluation(run, Position(3, 24), {"fd_pixels": 2.0}, context) is None
    assert run.journal_file.read_bytes() == before
    training.append("train", 4, 32, {"loss": 1.0})
    (line,) = evaluations(run.journal_file)
    assert (line["step"], line["attempt"], line["metrics"]) == (3, 1, {"fd_pixels": 2.0})
    training.begin_attempt(2, 16, start)  # goes through step 3 again: that checkpoint is void
    assert evaluations(run.journal_file) == []
    lock.release()
    told = record_evaluation(run, Position(2, 16), {"fd_pixels": 1.0}, context)
    assert "Connection refused" in told
    assert "run sync again" in told
    assert [line["step"] for line in evaluations(run.journal_file)] == [2]


def test_two_who_ship_the_same_run_at_once_double_nothing(server, tmp_path):
    server.start()
    journal = Journal(tmp_path / "journal.jsonl")
    for step in range(1, 1001):
        journal.append("train", step, step, {"loss": 1 / step})
        if step % 100 == 0:
            journal.append("eval", step, step, {"fd_pixels": 1 / step}, {"ema": "raw", "n": 2})
    to = Destination(journal.path, server.url, "raced", "raced", "key-of-raced", {"a": 1})
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(sync, [to] * 3))
    rest = Rest(server.url)
    history = rest.history(rest.run("raced", "raced"))
    assert [step for step, _, _ in history["train/loss"]] == list(range(1, 1001))
    assert [step for step, _, _ in history["eval/raw/n2/fd_pixels"]] == list(range(100, 1001, 100))


def test_the_commit_and_what_differs_from_it_are_those_of_git_and_without_passwords(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=e"]
        done = subprocess.run(
            ["git", "-C", tmp_path, *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout

    assert code((tmp_path / "nowhere",)) == (None, "")
    git("init", "-q")
    (tmp_path / "run.yaml").write_text("uri: none\nsteps: 5\n")
    git("add", ".")
    git("commit", "-qm", "first")
    assert code((tmp_path,)) == (git("rev-parse", "HEAD").strip(), "")
    (tmp_path / "run.yaml").write_text(f"uri: https://user:{PASSWORD}@host/x\nsteps: 5\n")
    commit, difference = code((tmp_path / "nowhere", tmp_path))
    assert commit == git("rev-parse", "HEAD").strip()
    assert "-uri: none\n+uri: https://host/x\n" in difference
    assert difference == git("diff", "HEAD").replace(f"user:{PASSWORD}@", "")


def test_what_nvidia_smi_prints_is_read():
    told = "0, 97, 1024, 81559, 412.53\n1, 0, 0, 81559, [N/A]\n"
    told += "Unable to determine the device handle for GPU0000:04:00.0: Unknown Error\n"
    assert parse_gpus(told) == {
        "gpu_0_utilization_percentage": 97.0,
        "gpu_0_memory_usage_megabytes": pytest.approx(1073.741824),
        "gpu_0_memory_usage_percentage": pytest.approx(100 * 1024 / 81559),
        "gpu_0_power_usage_watts": 412.53,
        "gpu_1_utilization_percentage": 0.0,
        "gpu_1_memory_usage_megabytes": 0.0,
        "gpu_1_memory_usage_percentage": 0.0,
    }
