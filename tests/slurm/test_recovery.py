"""One training on two nodes through everything that ends an attempt; at the end it is as if nothing had happened."""

import json
import subprocess
import time

import pytest

from dtrain.run import RunDirectory
from dtrain.tracking.journal import events, read
from tests.digits import losses, tiny
from tests.ranks import run_ranks
from tests.slurm.cluster import submit
from tests.training.runs import train

pytestmark = pytest.mark.slurm  # a quarter of an hour
# Evaluations make a step slow and change nothing of the losses, so that the run to compare with takes no time.
SLOW = ("eval.every=1", "eval.num_samples=300", "eval.batch_size=150", "eval.steps=20")


@pytest.fixture(scope="module")
def recovered(slurm, digits, tmp_path_factory):
    """The jobs' journey: (config as it ended, its jobs). What is claimed of it is claimed test by test."""
    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("recovery")
    patch.chdir(folder)
    options = ("train.checkpoint_every=5", "train.keep_last=100", "tracking.enabled=true")

    def configure(steps: int):
        config = tiny(digits, folder / "runs", *options, *SLOW, f"train.steps={steps}")
        (folder / "tiny.yaml").write_text(config.dump())
        return config

    config = configure(100_000)
    run = RunDirectory(config.run.path)

    def attempts() -> int:
        return sum(e["event"] == "attempt" for e in events(run.journal_file))

    def wait_for_progress(job, requeues: int) -> None:
        """Until the attempt after so many requeues of this job has a checkpoint of its own."""
        began = before + requeues + 1
        job.wait_until(
            lambda: (
                job.ended or any(e["event"] == "checkpoint" and e["attempt"] == began for e in events(run.journal_file))
            ),
            f"a checkpoint of attempt {began}",
        )
        assert not job.ended, "\n".join(job.said()[-40:])

    try:
        before = 0
        faults = submit("tiny.yaml", "--nodes", "2", "--time", "00:20:00")
        ways = [
            lambda: faults.kill("launch/train.py", rank="1"),
            lambda: faults.kill("deepspeed.launcher.launch"),
            lambda: subprocess.run(["scancel", "--signal=USR2", "--batch", faults.number], check=True),
            lambda: faults.control("requeue", faults.number),
        ]
        starts = []  # seconds from a submission or requeue to a checkpoint
        for requeues, end_attempt in enumerate(ways):
            began = time.monotonic()
            wait_for_progress(faults, requeues)
            starts.append(time.monotonic() - began)
            end_attempt()
            faults.wait_for_requeue(requeues + 1)
        wait_for_progress(faults, len(ways))
        run.stop_file.touch()
        assert faults.exit_code() == 75

        before = attempts()
        # Three quarters of a job's time are before the signal: enough to start twice, however slow this machine is.
        minutes = max(3, round(2 * max(starts) / 0.75 / 60 + 0.5))
        limited = submit("tiny.yaml", "--nodes", "2", "--time", f"00:{minutes:02}:00")
        for requeues in range(2):
            limited.wait_for_requeue(requeues + 1, 60 * minutes)
        config = configure(json.loads(run.outcome_file.read_text())["step"] + 5)
        assert limited.exit_code() == 0
        yield config, run, faults, limited
    finally:
        subprocess.run(["scancel", "--full", "--name=tiny"], check=False)
        patch.undo()


def test_every_fault_is_recovered_from_and_a_person_who_stops_the_run_is_obeyed(recovered):
    _, _, job, _ = recovered
    ends = [line for line in job.said() if line.startswith("dtrain:") and "begins on n1 n2" not in line]
    assert "broke off (exit code" in ends[0]
    assert "job 1 is requeued" in ends[0].replace(job.number, "1")
    assert "was stopped by a person; submit it again to go on" in job.said()[-1]
    assert job.requeues == 4


def test_a_time_limit_shorter_than_the_work_stops_the_run_in_time_and_it_is_requeued_until_it_is_finished(recovered):
    config, run, _, job = recovered
    assert sum("stopped in time; job" in line for line in job.said()) == 2
    assert job.said()[-1].endswith("is finished")
    assert run.outcome() == {"outcome": "finished", "step": config.train.steps, "attempt": 8}


def test_the_losses_are_those_of_a_run_that_was_never_interrupted(recovered, tmp_path):
    config, *_ = recovered
    whole = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(tmp_path)}),
            "eval": config.eval.model_copy(update={"every": 0}),
            "tracking": config.tracking.model_copy(update={"enabled": False}),
            "train": config.train.model_copy(update={"checkpoint_every": 10_000}),
        }
    )
    run_ranks(train, 2, whole, timeout=1800)
    assert losses(config) == losses(whole)  # bit for bit


def test_all_attempts_are_one_mlflow_run_with_each_step_once(recovered):
    from mlflow import MlflowClient

    from dtrain.tracking.tracker import sync

    config, run, *_ = recovered
    sync(run)
    client = MlflowClient(f"sqlite:///{run.path.parent}/mlflow.db")
    (tracked,) = client.search_runs([client.get_experiment_by_name("dtrain").experiment_id])
    assert tracked.info.status == "FINISHED"
    curves = {}
    for key, event, name in (("train/loss", "train", "loss"), ("eval/ema_0/n300/fd_pixels", "eval", "fd_pixels")):
        history = client.get_metric_history(tracked.info.run_id, key)
        assert len({m.step for m in history}) == len(history)
        curves[event] = {e["step"]: e["metrics"][name] for e in read(run.journal_file) if e["event"] == event}
        assert {m.step: m.value for m in history} == curves[event]
    every = set(range(1, config.train.steps + 1))
    assert set(curves["train"]) == every
    # An attempt that is asked to stop, or killed, does not evaluate its last checkpoint.
    assert set(curves["eval"]) >= every - {e["step"] for e in events(run.journal_file) if e["event"] == "attempt"}


def test_on_one_node_instead_of_two_it_goes_on_with_the_same_batches(recovered, tmp_path):
    from dtrain.training.audit import audit

    config, run, *_ = recovered
    steps = config.train.steps + 20
    job = submit("tiny.yaml", "--nodes", "1", "--time", "00:20:00", f"train.steps={steps}", "eval.every=0")
    assert job.exit_code() == 0, "\n".join(job.said()[-40:])
    assert [e["context"]["world_size"] for e in events(run.journal_file) if e["event"] == "attempt"][-2:] == [2, 1]
    assert audit(run).problems == []
    whole = config.model_copy(
        update={
            "run": config.run.model_copy(update={"dir": str(tmp_path)}),
            "eval": config.eval.model_copy(update={"every": 0}),
            "tracking": config.tracking.model_copy(update={"enabled": False}),
            "train": config.train.model_copy(update={"steps": steps, "checkpoint_every": 10_000}),
        }
    )
    run_ranks(train, 2, whole, timeout=1800)
    assert losses(config)[-20:] == pytest.approx(losses(whole)[-20:], rel=1e-4)


def test_an_evaluation_and_a_sweep_are_jobs_too(recovered):
    _, run, *_ = recovered
    limit = ("--nodes", "1", "--time", "00:20:00")
    evaluated = submit("--evaluate", "tiny", *limit, "--", "--n", "48", "--json")
    swept = submit("--sweep", "tiny", *limit, "--", "--n", "48", "--eta", "0,1")
    assert evaluated.exit_code() == 0, "\n".join(evaluated.said()[-40:])
    (result,) = [json.loads(line) for line in evaluated.said() if line.startswith('{"step"')]
    assert result["context"]["n"] == 48
    swept.wait_until(lambda: not swept.queued(), "the end of the sweep")
    lines = [json.loads(line) for line in (run.path / "sweep.jsonl").read_text().splitlines()]
    assert sorted(line["context"]["eta"] for line in lines) == [0, 1]
    assert all(line["step"] == result["step"] for line in lines)
