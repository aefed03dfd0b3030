"""`dtrain submit`: refuses in a moment what could not start, shows the script, hands it over."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.lock import RunLock
from tests.cluster.stubs import RECORD, Stubs
from tests.digits import tiny
from tests.folders import contents
from tests.ranks import run_ranks
from tests.training.runs import train

DTRAIN = [sys.executable, "-c", "from dtrain.cli import main; main()"]


@pytest.fixture
def work(digits, tmp_path, monkeypatch):
    """A folder with a config, and SLURM's commands in place of which stand-ins answer."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent.parent))
    stubs = Stubs(tmp_path / "tools", monkeypatch)
    monkeypatch.setenv("PATH", f"{stubs.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("RECORD", str(stubs.record))
    sbatch = stubs.bin / "sbatch"
    sbatch.write_text(RECORD + "cat >script; echo '12;cluster'\n")
    sbatch.chmod(0o755)
    Path("tiny.yaml").write_text(tiny(digits, Path("runs"), "train.steps=3").dump())
    return stubs


def submit(*arguments, expect: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run([*DTRAIN, "submit", *arguments], capture_output=True, text=True)
    assert done.returncode == expect, done.stderr
    return done


def test_a_submitted_training_is_shown_handed_to_sbatch_and_kept_beside_its_log(work):
    uri = "tracking.uri=http://me:hunter2@host/"
    done = submit("tiny.yaml", "train.steps=5", uri, "--nodes", "2", "--gpus-per-node", "3", "--time", "00:10:00")
    folder = Path.cwd() / "runs/tiny"
    assert done.stdout.splitlines() == [
        "runs/tiny starts: 5 steps of 24 images from 1,437; each rank has 4 of them in micro-batches of 4, "
        "at ZeRO stage 2 in fp32",
        "10 classes, called by their numbers",
        "job 12: 2 nodes with 3 ranks on each, 00:10:00 at a time",
        f"script: {folder}/logs/train-12.sbatch",
        f"log: {folder}/logs/train-12.log",
        f"run: {folder}",
    ]
    script = Path("script").read_text()
    assert uri in script
    assert (folder / "logs/train-12.sbatch").read_text() == script.replace("me:hunter2@", "")
    requested = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    assert requested == [
        "job-name=tiny",
        "nodes=2",
        "ntasks-per-node=1",
        "cpus-per-task=3",
        "gpus-per-node=3",
        "time=00:10:00",
        "signal=B:USR2@150",
        "kill-on-invalid-dep=yes",
        "requeue",
        "open-mode=append",
        f'output="{folder}/logs/train-%j.log"',
    ]


def test_what_is_asked_for_is_requested_and_no_gpu_where_the_cluster_knows_none(work):
    (work.bin / "sinfo").write_text("#!/bin/bash\n[[ $* == *--partition=cpu* ]] && echo '(null)' || echo gpu:8\n")
    options = ["--time", "2-00:00:00", "--partition", "cpu", "--account", "a", "--qos", "q", "--constraint", "x&y"]
    script = submit("tiny.yaml", *options, "--gpus-per-node", "4", "--after", "11", "--dry-run").stdout
    requested = {line for line in script.splitlines() if line.startswith("#SBATCH")}
    assert not any("gpus" in line for line in requested)
    assert requested >= {
        "#SBATCH --partition=cpu",
        "#SBATCH --account=a",
        "#SBATCH --qos=q",
        '#SBATCH --constraint="x&y"',
        "#SBATCH --dependency=afterok:11",
        "#SBATCH --signal=B:USR2@300",
    }
    assert "ranks_per_node=4" in script
    assert not Path("runs").exists()  # a dry run leaves nothing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny.yaml", "model.dept=3"], "unknown key `model.dept` on the command line; did you mean"),
        (["tiny.yaml", "data.batch_size=25"], "data.batch_size 25 does not divide by 8 ranks; the nearest"),
        (["tiny.yaml", "--nodes", "5"], "does not divide by 40 ranks"),
        (["tiny.yaml", "data.shards=nowhere"], "there is no manifest nowhere/manifest.json"),
        (["tiny.yaml", "data.streams=5000"], "data.streams 5000 exceeds the 1437 samples"),
        (["tiny.yaml", "run.init_from=nowhere"], "no run at nowhere or runs/nowhere"),
        (["tiny.yaml", "run.init_from=no.pt"], "run.init_from=no.pt: there is no such file"),
        (["tiny.yaml", "train.deadline=soon"], "train.deadline 'soon' is neither a duration"),
        (["tiny.yaml", "model.num_classes=9"], "train/manifest.json has 10 classes; set it to 10, or to 0"),
        (["tiny.yaml", "eval.every=2", "data.holdout=no.json"], "there is no manifest no.json"),
        (["tiny.yaml", "eval.every=2", "eval.features=no.pt"], "there is no TorchScript file no.pt"),
        (
            ["tiny.yaml", "eval.every=2", "eval.weights=no.pt", "eval.features=auto"],
            "eval.weights names no.pt, which is",
        ),
        (["tiny.yaml", "eval.every=2", "eval.reference=no.npz"], "no statistics at no.npz"),
        (["tiny.yaml", "eval.every=2", "eval.metrics=[is]"], "needs features with classes, which pixels are not"),
        (["absent.yaml"], "cannot read the config absent.yaml: No such file or directory"),
        (["tiny.yaml", "--template", "absent"], "cannot read the template absent: No such file"),
        (["tiny.yaml", "--frobnicate"], "No such option: --frobnicate"),
        (["tiny.yaml", "--partition", "a b"], "--partition 'a b' has characters that no partition has"),
        ([], "say what to submit: a CONFIG, --evaluate RUN or --sweep RUN"),
        (["--evaluate", "nowhere"], "no run at nowhere or runs/nowhere"),
        (["--evaluate", "r", "--sweep", "r"], "--evaluate and --sweep are two jobs"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_submitted(work, arguments, message):
    before = contents(Path.cwd())
    done = submit("--time", "1:00:00", "--gpus-per-node", "8", *arguments, expect=2)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert done.stdout == ""
    assert contents(Path.cwd()) == before


def test_a_missing_shard_other_data_and_another_identity_are_refused(work, digits):
    run_ranks(train, 1, tiny(digits, Path("runs"), "train.steps=3"))
    (Path("runs/tiny/journal.jsonl")).write_text(
        Path("runs/tiny/journal.jsonl").read_text().replace('"data": "', '"data": "0')
    )
    limit = ("--time", "1:00:00", "--gpus-per-node", "2")
    assert "was trained on another data set" in submit("tiny.yaml", *limit, expect=2).stderr
    assert "run.seed was 0, is 4" in submit("tiny.yaml", "run.seed=4", *limit, expect=2).stderr
    subprocess.run(["cp", "-r", digits, "copy"], check=True)
    shard = sorted(Path("copy/train").glob("*.tar"))[3]
    shard.unlink()
    told = submit("tiny.yaml", "data.shards=copy/train", "run.name=new", *limit, expect=2).stderr
    assert f"cannot find the shard {shard}" in told


def test_a_run_has_one_job_at_a_time_unless_they_follow_each_other(work):
    limit = ("--time", "1:00:00", "--gpus-per-node", "1")
    submit("tiny.yaml", *limit)
    (work.bin / "squeue").write_text("#!/bin/bash\nprintf '%-20s%-20s%-20s%-20s\\n' 12 PENDING 0 1:00:00\n")
    told = submit("tiny.yaml", *limit, expect=2).stderr
    assert told == "dtrain: runs/tiny has job 12, pending; let another one follow with --after 12\n"
    assert submit("tiny.yaml", *limit, "--after", "12").stdout
    (work.bin / "squeue").write_text("#!/bin/bash\necho slurm_load_jobs error: Invalid job id specified >&2; exit 1\n")
    lock = RunLock(Path("runs/tiny/lock"))
    lock.acquire()
    assert f"in use by process {os.getpid()}" in submit("tiny.yaml", *limit, expect=2).stderr
    lock.release()
    assert submit("tiny.yaml", *limit).stdout


def test_what_sbatch_says_is_told_and_no_empty_run_is_left(work):
    (work.bin / "sbatch").write_text("#!/bin/bash\necho 'sbatch: error: Invalid account' >&2; exit 1\n")
    done = submit("tiny.yaml", "--time", "1:00:00", "--gpus-per-node", "1", expect=2)
    assert done.stderr == "dtrain: sbatch failed: error: Invalid account\n"
    assert not Path("runs/tiny").exists()


def test_an_evaluation_and_a_sweep_of_a_run(work, digits):
    limit = ("--time", "1:00:00", "--gpus-per-node", "1", "--dry-run")
    run_ranks(train, 1, tiny(digits, Path("runs"), "train.steps=4", "train.checkpoint_every=2"))
    script = submit("--evaluate", "tiny", *limit, "--", "--n", "100", "--metrics", "fd,kid").stdout
    assert f"eval/evaluate.py {Path.cwd()}/runs/tiny -n 100 --metrics fd,kid)" in script
    Path("parts.py").touch()
    script = submit("--evaluate", "tiny", *limit, "--plugin", "parts.py").stdout
    assert f"eval/evaluate.py --plugin={Path.cwd()}/parts.py {Path.cwd()}/runs/tiny" in script
    assert "No such option: --m" in submit("--evaluate", "tiny", *limit, "--", "--m", "1", expect=2).stderr

    words = ["--checkpoints", "all", "--eta", "0,0.5", "--steps", "5,10", "--n", "100"]
    done = submit("--sweep", "tiny", *limit, "--", *words)
    assert "#SBATCH --array=0-7" in done.stdout
    assert "8 combinations; the table then: dtrain sweep tiny --checkpoints all --eta 0,0.5" in done.stderr
    parts = [f"--checkpoints={c} --eta={e} --steps={s}" for c in (2, 4) for e in ("0", "0.5") for s in (5, 10)]
    assert f"parts=({' '.join(parts)})" in done.stdout
    assert f"eval/sweep.py {Path.cwd()}/runs/tiny -n100)" in done.stdout
    assert "give the sweep something to vary" in submit("--sweep", "tiny", *limit, expect=2).stderr

    script = submit("--sweep", "tiny", *limit, "--after", "12", "--", *words[:4]).stdout  # it will have more of them
    assert "parts=(--checkpoints=all --eta=0 --checkpoints=all --eta=0.5)" in script
    for kind, wrong, message in (
        ("--evaluate", ["--metrics", "fid"], "`eval.metrics.0` on the command line is 'fid'"),
        ("--sweep", ["--steps", "5,1001"], "eval.steps 1001 exceeds diffusion.timesteps 1000"),
        ("--sweep", ["--eta", "0,[1"], "is not a list of values"),
        ("--sweep", ["--checkpoints", "2,3"], "has 2, 4; or say `all`"),
    ):
        assert message in submit(kind, "tiny", *limit, "--", *wrong, expect=2).stderr


def test_an_evaluation_may_wait_for_a_run_that_has_not_begun(work):
    limit = ("--time", "1:00:00", "--gpus-per-node", "1", "--dry-run")
    script = submit("--evaluate", "later", "--after", "12", *limit).stdout
    assert f"eval/evaluate.py {Path.cwd()}/runs/later)" in script
    assert "#SBATCH --dependency=afterok:12" in script


def test_a_job_is_told_of_the_plug_ins_that_its_config_was_read_with(work):
    """Though its environment may be another one: a cluster need not hand the submitter's on."""
    Path("leap.py").write_text(
        "from dtrain import plugins\n"
        "from dtrain.diffusion.samplers import OwnSampler\n"
        'plugins.register("sampler", "leap", OwnSampler(None))\n'
    )
    arguments = ("tiny.yaml", "eval.sampler=leap", "--nodes", "1", "--gpus-per-node", "1", "--time", "00:10:00")
    assert "--plugin" in submit(*arguments, "--dry-run", expect=2).stderr
    script = submit(*arguments, "--dry-run", "--plugin", "leap.py").stdout
    assert f"launch/train.py --plugin={Path.cwd()}/leap.py" in script
