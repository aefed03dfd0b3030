"""`dtrain sample` and `dtrain evaluate` load no package that they do not use; benchmarks/evaluation.py times them."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
HEAVY = {"torchvision", "torchmetrics", "torch._dynamo", "deepspeed", "mlflow", "matplotlib", "sklearn", "sympy"}
CODE = """
import json, sys
from dtrain.cli import app
run = sys.argv[1]
found = []
for arguments in (["sample", run, "-n", "4", "--steps", "2"], ["evaluate", run, "--n", "24", "--steps", "2"]):
    app(args=arguments, standalone_mode=False)
    found.append(sorted(name for name in sys.modules if name in HEAVY | {"scipy"}))
print(json.dumps(found))
"""


def test_neither_sampling_nor_evaluating_loads_what_it_does_not_use(finished_run, tmp_path):
    """To their ends, so that what a network's forward or a metric would import late is seen too."""
    run = shutil.copytree(finished_run.run.path, tmp_path / "run")
    done = subprocess.run(
        [sys.executable, "-c", f"HEAVY = {HEAVY!r}{CODE}", run],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    sampling, evaluating = json.loads(done.stdout.splitlines()[-1])
    assert sampling == []
    assert evaluating == ["scipy"]  # of the Fréchet distance
