"""MLflow of a small run in a real browser: what is seen without a click is the distance and the samples."""

import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from PIL import Image

from dtrain.distributed import free_port
from dtrain.tracking.best import training_evaluations
from tests.campaigns.browser import CHROMIUM, Browser
from tests.command_line import command
from tests.digits import tiny
from tests.ranks import run_ranks

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; install the package `chromium`"),
]
WIDTH, HEIGHT = 1400, 1000
BOX = "(({left, top, right, bottom}) => ({left, top, right, bottom}))({}.getBoundingClientRect())".replace("{}", "%s")


class Shown:
    """The run, what it printed, and the address of the server that its printed command starts."""


@pytest.fixture(scope="module")
def shown(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("browser")
    more = (
        "tracking.enabled=true",
        "train.steps=12",
        "train.checkpoint_every=4",
        "eval.every=4",
        "eval.num_samples=50",
    )
    config = folder / "tiny.yaml"
    config.write_text(tiny(digits, folder / "runs", *more).dump())
    ((code, text),) = run_ranks(command, 1, "train", config)
    assert code == 0, text
    found = Shown()
    found.run, found.link = folder / "runs/tiny", re.search(r"then open (\S+)", text)[1]
    served = shlex.split(re.search(r"curves in MLflow: (.*)", text)[1])
    port = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    environment |= {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", *served, "--port", str(port), "--workers", "1"],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    found.link = found.link.replace("127.0.0.1:5000", f"127.0.0.1:{port}")
    found.server = f"http://127.0.0.1:{port}"
    end = time.monotonic() + 120
    while not answers(found.server):
        assert time.monotonic() < end, (folder / "server.log").read_text()
        time.sleep(0.3)
    found.browser = Browser(folder, WIDTH, HEIGHT)
    yield found
    found.browser.close()
    os.killpg(server.pid, 9)
    server.wait()


def answers(server: str) -> bool:
    try:
        with urllib.request.urlopen(f"{server}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


def newest(shown) -> dict:
    return training_evaluations(shown.run / "journal.jsonl")[-1]


def test_the_printed_link_shows_the_distances_curve_and_the_loss_in_the_first_screen(shown):
    browser = shown.browser
    browser.open(shown.link)
    browser.wait("document.querySelectorAll('.js-plotly-plot .scatterlayer path.js-line').length >= 4")
    titles = browser.value("[...document.querySelectorAll('h4')].map((e) => e.innerText)")
    assert titles[0] == "fd_pixels"
    curve = browser.value(BOX % "document.querySelector('.js-plotly-plot .scatterlayer path.js-line')")
    assert 0 < curve["top"] < curve["bottom"] < HEIGHT / 2
    box = browser.value(BOX % "document.querySelector('.js-plotly-plot')")
    seen = browser.pixels()[int(box["top"]) : int(box["bottom"]), int(curve["left"]) : int(curve["right"]) + 1]
    blue = np.abs(seen.astype(int) - (0x22, 0x72, 0xB4)).max(2) < 60
    assert blue.any(0).mean() > 0.9  # in nearly every column of the curve's width
    loss = browser.value(BOX % "[...document.querySelectorAll('h4')].find((e) => e.innerText == 'loss')")
    assert loss["bottom"] < HEIGHT


def test_the_samples_card_shows_the_picture(shown):
    """The part of it that the card has room for, below the run's params, against the file in the run directory."""
    browser = shown.browser
    browser.open(shown.link)
    image = "[...document.querySelectorAll('img')].find((e) => e.src.includes('newest') && e.naturalWidth)"
    browser.wait(f"{image} !== undefined && {image}.complete")
    time.sleep(1.0)
    box = browser.value(BOX % image)
    # What hides the rest: the elements around it that cut off what overflows.
    edges = f"(() => {{ const found = []; for (let e = {image}; e; e = e.parentElement) "
    edges += "if (getComputedStyle(e).overflowY != 'visible') found.push(e.getBoundingClientRect().bottom); "
    edges += "return found; })()"
    below = min(*browser.value(edges), box["bottom"])
    left, top, right, below = (round(v) for v in (box["left"], box["top"], box["right"], below))
    assert below - top > 40
    assert below < HEIGHT / 2 + 100
    seen = browser.pixels()[top + 1 : below - 1, left + 1 : right - 1].astype(float).mean(2)
    file = Image.open(shown.run / newest(shown)["context"]["artifact"]).convert("L")
    size = (right - left, round(box["bottom"]) - top)
    whole = np.asarray(file.resize(size, Image.Resampling.BILINEAR), float)
    wanted = whole[1 : below - top - 1, 1:-1][: seen.shape[0], : seen.shape[1]]
    assert wanted.std() > 20
    assert np.corrcoef(seen.ravel(), wanted.ravel())[0, 1] > 0.9


def test_the_runs_first_page_shows_the_headline_distance(shown):
    browser, line = shown.browser, newest(shown)
    browser.open(shown.link.replace("/model-metrics", ""))
    text = f"fd_pixels {line['metrics']['fd_pixels']:.4g}"
    element = f"[...document.querySelectorAll('strong')].find((e) => e.innerText == '{text}')"
    browser.wait(f"{element} !== undefined")
    assert browser.value(BOX % element)["bottom"] < HEIGHT
    assert f"at step {line['step']}" in browser.value(f"{element}.parentElement.innerText")


def test_the_descriptions_link_shows_all_runs_with_their_distance(shown):
    browser = shown.browser
    link = "[...document.querySelectorAll('a')].find((e) => e.innerText == 'All runs by distance')"
    browser.open(shown.link.replace("/model-metrics", ""))
    browser.open(browser.wait(f"{link} !== undefined && {link}.href"))
    value = f"{newest(shown)['metrics']['fd_pixels']:.4f}"[:6]
    cell = f"[...document.querySelectorAll('[role=gridcell]')].find((e) => e.innerText.startsWith('{value}'))"
    browser.wait(f"{cell} !== undefined")
    assert browser.value(BOX % cell)["right"] < WIDTH
