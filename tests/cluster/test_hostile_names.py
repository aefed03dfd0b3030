"""What people call their files and runs never becomes a command: rendered, parsed by bash, and run by it."""

import os
import shlex
import subprocess

import pytest

from dtrain.cluster import slurm
from dtrain.errors import UserError
from tests.cluster.hostile import DIGITS, HOSTILE, rendered
from tests.cluster.stubs import Stubs
from tests.digits import tiny

UNCARRIED = ["a\nb", "a\n#SBATCH --uid=0\n", "a\rb", "a\tb", "a\x1b[2J", "a\x7f", "a\udcff"]


@pytest.fixture
def request_():
    return slurm.Request(2, 1, "1:00:00")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_name_arrives_verbatim_and_runs_nothing(tmp_path, monkeypatch, request_, name):
    work = tmp_path / f"work {name}"
    work.mkdir()
    monkeypatch.chdir(work)
    stubs = Stubs(tmp_path / f"tools {name}", monkeypatch)
    script, job, overrides = rendered(work, name, request_)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    (job.run / "logs").mkdir(parents=True)
    finished = """echo '{"outcome": "finished", "step": 1}' >"$RUN/outcome.json" """
    assert stubs.run(script, job.run, job.log("7"), TRAINING=finished) == 0, job.log("7").read_text()
    assert list(tmp_path.rglob("pwned")) == []
    arguments = [str(work / f"{name}.yaml"), *overrides]
    assert stubs.calls("dtrain") == [["train", "--check", "--ranks", "2", *arguments]]
    (launched,) = stubs.calls("deepspeed")
    assert launched[-4:] == [str(slurm.ROOT / "launch/train.py"), *arguments]
    assert launched[:4] == ["--node_rank", "0", "--hostfile", str(job.run / "logs/hostfile-7")]
    assert (job.run / "logs/hostfile-7").read_text() == "n1 slots=1\nn2 slots=1\n"
    (output,) = [line for line in script.splitlines() if line.startswith("#SBATCH --output=")]
    path = shlex.split(output, comments=False)[1].removeprefix("--output=")
    assert path.replace("%j", "7").replace("%%", "%") == str(job.log("7")) or "%j" in name


@pytest.mark.parametrize("name", UNCARRIED)
def test_what_a_script_cannot_carry_is_refused(tmp_path, request_, name):
    config = tiny(DIGITS, tmp_path)
    job = slurm.training(tmp_path / "x.yaml", [f"tracking.experiment={name}"], config.run.path, config.data.workers)
    with pytest.raises(UserError, match="characters that a batch script cannot carry"):
        slurm.render(job, request_)


def test_a_backslash_in_the_place_of_the_log_is_refused_because_slurm_drops_it(tmp_path, request_):
    job = slurm.training(tmp_path / "x.yaml", [], tiny(DIGITS, tmp_path / "a\\b").run.path, workers=0)
    with pytest.raises(UserError, match="a backslash, which SLURM gives a meaning of its own"):
        slurm.render(job, request_)


@pytest.mark.parametrize("name", ["$(id)", "a b", "a;b", "a\nb", "`id`", "'", '"', "--uid=0 x", "", "a#b"])
@pytest.mark.parametrize("option", ["partition", "account", "qos", "constraint", "after", "time"])
def test_requests_are_words(name, option):
    with pytest.raises(UserError, match=f"--{option}"):
        slurm.Request(**({"nodes": 1, "gpus_per_node": 1, "time": "1:00:00"} | {option: name}))


def test_requests_of_real_clusters_pass():
    slurm.Request(1, 8, "2-00:00:00", "gpu,gpu-long", "proj_1.a", "high+", "(a100|h100)&nvlink*2", "123_4")


@pytest.mark.parametrize("name", HOSTILE)
def test_an_evaluation_and_a_sweep_carry_hostile_names_too(tmp_path, monkeypatch, request_, name):
    run = tmp_path / f"run {name}"
    monkeypatch.chdir(tmp_path)
    stubs = Stubs(tmp_path / "tools", monkeypatch)
    (run / "logs").mkdir(parents=True)
    sweep = slurm.sweep(run, [f"--weights={name}"], [["--eta=0", f"--steps={name}"], ["--eta=1", f"--steps={name}"]])
    for job in (slurm.evaluation(run, ["--weights", name]), sweep):
        script = slurm.render(job, request_)
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)
        assert stubs.run(script, run, job.log("7"), SLURM_ARRAY_TASK_ID="1") == 0
    assert list(tmp_path.rglob("pwned")) == []
    evaluated, swept = stubs.calls("deepspeed")
    assert evaluated[-4:] == [str(slurm.ROOT / "eval/evaluate.py"), str(run), "--weights", name]
    tail = [str(slurm.ROOT / "eval/sweep.py"), str(run), f"--weights={name}", "--eta=1", f"--steps={name}"]
    assert swept[-5:] == tail


def test_the_templates_are_clean_to_shellcheck():
    if not any(os.access(f"{p}/shellcheck", os.X_OK) for p in os.environ["PATH"].split(":")):
        pytest.skip("shellcheck is not installed")
    scripts = sorted((slurm.ROOT / "slurm").glob("*.s*"))
    assert len(scripts) == 4
    subprocess.run(["shellcheck", *scripts], check=True)
