"""docs/python.md: every block runs, in its order, on a run called digits."""

import re
import shlex
from pathlib import Path

import numpy as np

from tests.command_line import command
from tests.ranks import run_ranks
from tests.training.runs import copied

PAGE = Path(__file__).parent.parent / "docs" / "python.md"


def test_every_block_of_the_page_runs(digits, finished_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    copied(finished_run, digits, Path("runs"), "run.name=digits", "eval.num_samples=24")
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert {language for language, _ in blocks} == {"python", "bash"}
    names: dict = {}
    for language, block in blocks:
        if language == "python":
            exec(compile(block, str(PAGE), "exec"), names)
            continue
        for line in block.splitlines():
            program, *arguments = shlex.split(line)
            assert program == "dtrain"
            code, said = run_ranks(command, 1, *arguments)[0]
            assert code == 0, said
    assert names["images"].shape == (20, 8, 8, 1)
    assert names["threes"].dtype == np.uint8
    assert len(names["loss"]) == 40
    assert [step for step, _ in names["distance"]] == [10, 20, 30, 40]
    assert [picture.size for picture in names["pictures"]] == [(8, 8)] * 2
    assert len(list(Path("pictures").glob("*.png"))) == 20
