"""The README as a newcomer walks it: a clone, an environment of its own, each block in order, taken from the text.

Only what `HERE` lists is changed on the way: trainings are made short, placeholders filled in, MLflow's server ends.
"""

import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtrain.distributed import free_port
from tests.printed import ROOT

pytestmark = pytest.mark.campaign

PHOTOGRAPHS = 300
DEMO = "train.steps=60 train.checkpoint_every=20 eval.every=20 eval.num_samples=200 eval.steps=10"
SHORT = "data.batch_size=8 train.steps=20 train.checkpoint_every=10 eval.every=10 eval.num_samples=16 eval.steps=5"
PORT = free_port()
SERVED = f"""timeout 300 mlflow server --port {PORT} --backend-store-uri sqlite:///runs/mlflow.db & server=$!
until python -c 'from urllib.request import urlopen; urlopen("http://127.0.0.1:{PORT}/health")' 2>/dev/null
do kill -0 $server; sleep 1; done
python -c 'from urllib.request import urlopen; print("served:", urlopen("http://127.0.0.1:{PORT}/").status)'
kill $server"""
HERE = {  # as printed → as run here
    "git clone REPOSITORY": f"git clone {ROOT}",
    "make demo ": f'make demo OVERRIDES="{DEMO}" ',
    "dtrain pack photos": "mv ../photos photos; dtrain pack photos",
    "launch/train.py configs/mine.yaml ": f"launch/train.py configs/mine.yaml {SHORT} ",
    "dtrain evaluate mine ": "dtrain evaluate mine -n 16 --steps 5 ",
    "dtrain sample mine ": "dtrain sample mine --steps 5 ",
    "num_inference_steps=50": "num_inference_steps=5",
    "mlflow server --backend-store-uri sqlite:///runs/mlflow.db": SERVED,
    " CONFIG ": " configs/mine.yaml ",
    "dtrain submit ": "dtrain submit --dry-run ",
}


def script() -> str:
    """The README's blocks as one script of bash; Python's are handed to `python`."""
    pattern = re.compile(r"^```(bash|python)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
    found = pattern.findall((ROOT / "README.md").read_text())
    text = "\n".join(block if language == "bash" else f"python - <<'END'\n{block}END" for language, block in found)
    for printed, here in HERE.items():
        assert printed in text, f"the README no longer prints `{printed}`"
        text = text.replace(printed, here)
    return f"set -exo pipefail\n{text}\n"


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> tuple[Path, str]:
    """The clone after every block of the README, and all that was printed on the way."""
    folder = tmp_path_factory.mktemp("newcomer")
    photographs(folder / "photos")
    (folder / "walk.sh").write_text(script())
    # A bare user's shell: no virtual environment is active, and nothing of this project is on a path.
    kept = {k: v for k, v in os.environ.items() if k.startswith("PIP_") or k in ("LANG", "TMPDIR")}
    bare = kept | {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": str(folder)}
    log = folder / "walk.log"
    with log.open("w") as out:
        ran = subprocess.run(["bash", "walk.sh"], cwd=folder, env=bare, stdout=out, stderr=subprocess.STDOUT)
    text = log.read_text()
    assert ran.returncode == 0, f"{log}\n{text[-4000:]}"
    return folder / "dtrain", text


def photographs(folder: Path) -> None:
    """Flat JPEG files of mixed sizes, smooth and coloured; one of them grey."""
    folder.mkdir()
    draws = np.random.default_rng(0)
    for number in range(PHOTOGRAPHS):
        small = Image.fromarray(draws.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        picture = small.resize(tuple(int(side) for side in draws.integers(70, 400, 2)), Image.Resampling.BICUBIC)
        (picture.convert("L") if number == 7 else picture).save(folder / f"IMG_{number:04d}.jpg")


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_every_block_ends_well_and_the_server_answers(walk):
    _, text = walk
    assert "served: 200" in text


def test_the_demo_says_that_a_shell_needs_the_environment(walk):
    _, text = walk
    assert ". .venv/bin/activate" in text.split("+ . .venv/bin/activate")[0]


def test_the_samples_are_a_grid_of_64_pictures_of_64_by_64_pixels(walk):
    folder, _ = walk
    grid = pixels(folder / "grid.png")
    assert min(grid.shape[:2]) >= 8 * 64
    assert grid.std() > 5


def test_diffusers_own_pipeline_draws_from_the_exported_folder(walk):
    folder, _ = walk
    assert pixels(folder / "drawn.png").shape == (64, 64, 3)
    assert pixels(folder / "drawn.png").std() > 5


@pytest.mark.parametrize("name", ["digits", "mine"])
def test_the_distance_is_a_curve_in_mlflow(walk, name):
    from mlflow import MlflowClient

    folder, _ = walk
    client = MlflowClient(f"sqlite:///{folder}/runs/mlflow.db")
    experiments = [e.experiment_id for e in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"attributes.run_name = '{name}'")
    distances = [key for key in run.data.metrics if re.search(r"/f[i]?d(_\w+)?$", key)]
    assert distances
    assert max(len(client.get_metric_history(run.info.run_id, key)) for key in distances) >= 2
