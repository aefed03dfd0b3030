"""Ctrl-C ten times each at a random moment of `dtrain train`, `deepspeed launch/train.py` and `dtrain evaluate`.

SIGINT goes to the whole process group, as a terminal's does. DTRAIN_SEED chooses the moments, by default 0.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dtrain.checkpoint.directory import complete, step_of
from dtrain.run import RunDirectory
from dtrain.tracking.journal import events
from tests.digits import losses, tiny
from tests.end_to_end.launched import DEEPSPEED, ROOT, port
from tests.processes import processes_of
from tests.ranks import run_ranks
from tests.training.runs import train

pytestmark = pytest.mark.campaign

TIMES = 10
STEPS = 100
DTRAIN = DEEPSPEED.with_name("dtrain")
OVERRIDES = (
    f"train.steps={STEPS}",
    "train.checkpoint_every=30",
    "eval.every=50",
    "eval.num_samples=240",
    "eval.steps=10",
    "data.workers=1",
)


def seeded(name: str) -> random.Random:
    return random.Random(f"{os.environ.get('DTRAIN_SEED', '0')} {name}")


def started(command: list, folder: Path, log: Path) -> subprocess.Popen:
    environment = os.environ | {"PATH": f"{DEEPSPEED.parent}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    with open(log, "w") as out:
        return subprocess.Popen(
            list(map(str, command)),
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a background job inherits SIG_IGN
        )


def wait_for_all(process: subprocess.Popen, folder: Path, seconds: float = 600) -> int:
    """The exit code, once every process of the command has gone."""
    end = time.monotonic() + seconds
    code = process.wait(seconds)
    while processes_of(folder):
        assert time.monotonic() < end, processes_of(folder)
        time.sleep(0.05)
    return code


def tracebacks_of_ours(text: str) -> list[str]:
    """Those with a frame of this package; DeepSpeed's runner and launcher show one of their own at Ctrl-C."""
    found = re.findall(r"Traceback \(most recent call last\):\n(?:[ \t].*\n|\n)*.*", text)
    return [trace for trace in found if "/dtrain/" in trace or f"{ROOT}/launch" in trace]


def interrupted_ten_times(folder: Path, digits: Path, command, name: str) -> list[tuple]:
    """Train to the end with a Ctrl-C at random moments, beginning anew as often as it takes; what happened."""
    rng, happened, number = seeded(name), [], 0
    whole, began = tiny(digits, folder / "whole", *OVERRIDES), time.monotonic()
    (folder / "tiny.yaml").write_text(whole.dump())
    assert wait_for_all(started(command(), folder, folder / "whole.log"), folder) == 0
    longest = time.monotonic() - began
    while len(happened) < TIMES:
        number += 1
        config = tiny(digits, folder / f"runs{number}", *OVERRIDES)
        (folder / "tiny.yaml").write_text(config.dump())
        run = RunDirectory(config.run.path)
        while len(happened) < TIMES and (run.outcome() or {}).get("outcome") != "finished":
            before = [step_of(path) for path in complete(run.checkpoints)]
            log = folder / f"{name}-{len(happened)}.log"
            process, moment = started(command(), folder, log), rng.uniform(0.2, longest)
            try:
                process.wait(moment)
                continue  # it had finished by then
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGINT)
            code = wait_for_all(process, folder)
            text, saved = log.read_text(), [step_of(path) for path in complete(run.checkpoints)]
            steps = [e["step"] for e in events(run.journal_file) if e["event"] == "train"]
            outcome = (run.outcome() or {}).get("outcome")
            happened.append((round(moment, 2), code, outcome, max(steps, default=0), saved[-1:]))
            print(name, *happened[-1], flush=True)
            assert tracebacks_of_ours(text) == []
            if outcome is None:  # before its first step
                assert saved == before
                assert code in (130, -signal.SIGINT) or name == "deepspeed"
            else:
                assert saved[-1] == steps[-1] == run.outcome()["step"]
                assert code in (75, 0, 130, -signal.SIGINT) or name == "deepspeed"
                assert "stopped after step" in text or outcome == "finished"
        assert wait_for_all(started(command(), folder, folder / f"{name}-end.log"), folder) == 0
        assert losses(config) == losses(whole)  # bit for bit
        assert evaluations(config) == evaluations(whole)
    return happened


def evaluations(config) -> dict[int, float]:
    lines = events(config.run.path / "journal.jsonl")
    return {e["step"]: e["metrics"]["fd_pixels"] for e in lines if e["event"] == "eval"}


def test_ctrl_c_at_a_random_moment_of_dtrain_train(digits, tmp_path):
    happened = interrupted_ten_times(tmp_path.resolve(), digits, lambda: [DTRAIN, "train", "tiny.yaml"], "train")
    assert {outcome for _, _, outcome, *_ in happened} >= {"stopped"}


def test_ctrl_c_at_a_random_moment_under_the_launcher(digits, tmp_path):
    def command():
        options = ["--num_accelerators", 2, "--master_port", port()]
        return [DEEPSPEED, *options, ROOT / "launch/train.py", "tiny.yaml"]

    happened = interrupted_ten_times(tmp_path.resolve(), digits, command, "deepspeed")
    assert {outcome for _, _, outcome, *_ in happened} >= {"stopped"}


def test_ctrl_c_at_a_random_moment_of_an_evaluation(digits, tmp_path):
    folder, rng = tmp_path.resolve(), seeded("evaluate")
    config = tiny(digits, folder / "runs", "train.steps=3")
    run_ranks(train, 1, config)
    shutil.copytree(folder / "runs", folder / "whole")
    options = ["--n", 1800, "--steps", 10, "--json"]

    def result(log: Path) -> dict:
        return json.loads(log.read_text().splitlines()[-1])

    began = time.monotonic()
    whole = folder / "whole.log"
    assert started([DTRAIN, "evaluate", "whole/tiny", *options], folder, whole).wait(900) == 0
    longest, scratch = time.monotonic() - began, config.run.path / "evaluations"
    for number in range(TIMES):
        log, moment = folder / f"evaluate-{number}.log", rng.uniform(0.2, longest)
        before = len(list(scratch.glob("*/block-*")))
        process = started([DTRAIN, "evaluate", "runs/tiny", *options], folder, log)
        try:
            process.wait(moment)
            assert result(log)["metrics"] == result(whole)["metrics"]  # it had finished by then
            continue
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGINT)
        code, text, kept = process.wait(60), log.read_text(), len(list(scratch.glob("*/block-*")))
        print("evaluate", round(moment, 2), code, kept, text.strip().splitlines()[-1:], flush=True)
        assert code in (130, -signal.SIGINT)
        assert "Traceback" not in text
        assert kept >= before
        if kept > before:
            assert f"{12 * kept:,} of 1,800 samples are kept; go on with: dtrain evaluate runs/tiny --n 1800" in text
    log = folder / "end.log"
    assert started([DTRAIN, "evaluate", "runs/tiny", *options], folder, log).wait(900) == 0
    assert result(log)["metrics"] == result(whole)["metrics"]  # to the last digit
