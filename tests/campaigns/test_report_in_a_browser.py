"""The page in a real browser, narrow and wide, by day and by night."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dtrain.data.pack.pack import pack
from dtrain.data.shards.manifest import load
from dtrain.report import write_report
from tests.report.made import make_run, picture

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; install the package `chromium`"),
]
# A window is never narrower than 500 pixels, a frame may be.
MEASURE = """<iframe id=f width={width} height=900 style="border:0" src="{page}"></iframe><script>
const f = document.getElementById("f");
f.onload = () => {{
  const d = f.contentDocument, w = f.contentWindow, box = (e) => e.getBoundingClientRect();
  for (const each of d.querySelectorAll("details")) each.open = true;
  const inside = [...d.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, pre, script, svg, dialog"));
  const out = (e) => box(e).right > w.innerWidth + 0.5 && box(e).width > 0;
  const wide = inside.filter(out).map((e) => e.outerHTML.slice(0, 90));
  const labels = [...d.querySelectorAll(".plot span")].filter((e) => box(e).width > 0);
  const overlap = [];
  for (const plot of d.querySelectorAll(".plot")) for (const kind of ["x", "y"]) {{
    const own = [...plot.querySelectorAll("." + kind)].map(box).filter((b) => b.width > 0);
    own.sort((a, b) => kind == "x" ? a.left - b.left : a.top - b.top);
    own.slice(1).forEach((b, i) => {{
      if (kind == "x" ? own[i].right > b.left : own[i].bottom > b.top + 1) overlap.push(plot.textContent);
    }});
  }}
  const beside = (e) => {{
    const row = box(e.querySelector(".classes")), img = box(e.querySelector("img"));
    return [row.left - img.left, row.right - img.right, row.bottom - img.top].map(Math.abs);
  }};
  const cells = [...d.querySelectorAll(".large .classes span")];
  const shortened = cells.filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.title);
  const off = [...d.querySelectorAll(".large")].flatMap(beside);
  d.querySelector(".large img").click();
  const opened = d.querySelector("dialog").open;
  off.push(...beside(d.querySelector("dialog")));
  const zoomed = box(d.querySelector("dialog img"));
  d.querySelector("dialog").click();
  const key = d.querySelector("button.key"), line = d.querySelector('g[data-series="0"]');
  key.click();
  const hidden = w.getComputedStyle(line).display;
  key.click();
  const plot = d.querySelector(".plot"), at = box(plot);
  const last = {{ clientX: at.left + at.width - 2, clientY: at.top + 9, bubbles: true }};
  plot.dispatchEvent(new w.PointerEvent("pointermove", last));
  document.title = JSON.stringify({{
    inner: w.innerWidth, scroll: d.documentElement.scrollWidth, wide, overlap, labels: labels.length, hidden, opened,
    off, shortened,
    zoomed: [zoomed.left, w.innerWidth - zoomed.right, zoomed.top, w.innerHeight - zoomed.bottom],
    closed: !d.querySelector("dialog").open,
    shown: w.getComputedStyle(line).display, tip: d.querySelector(".tip").textContent,
    dark: w.getComputedStyle(d.body).backgroundColor, large: d.querySelector(".large img").naturalWidth,
    cut: labels.filter((e) => box(e).left < 0 || box(e).right > w.innerWidth).map((e) => e.textContent),
  }});
}};</script>"""


LONG = "a class with a name that no column has room for"


def _class_folders(folder: Path, names: list[str]) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        picture(8, 8, 0).save(folder / name / "0.png")
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        folder = tmp_path_factory.mktemp("runs")
        names = ["0", "1", "automobile", LONG, *"456789"]
        pack(str(_class_folders(folder / "pictures", names)), folder / "data")
        of = {"data": load(folder / "data/train/manifest.json").hash}
        runs = [
            make_run(folder, monkeypatch, name, f"optim.lr={lr}", f"data.shards={folder}/data/train", **of)
            for name, lr in (("a-run-with-quite-a-long-name-that-says-it-all", 0.001), ("b", 0.002))
        ]
        for run in runs:
            context = {"ema": "ema_0", "n": 50_000, "sampler": "ddim", "features": "pixels", "seed": 0}
            with open(run / "sweep.jsonl", "w") as f:
                for eta in (0.0, 0.5, 1.0, "sigma_hat"):
                    for steps in (5, 10, 20, 50, 100, 250):
                        at = {"context": context | {"eta": eta, "steps": steps}, "metrics": {"fd_pixels": 1 / steps}}
                        f.write(json.dumps({"key": f"{eta}{steps}", "step": 12, "images": 288} | at) + "\n")
        return write_report(runs, folder / "report.html")


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_overflows_or_overlaps(page, width, dark, tmp_path):
    outer = page.with_name(f"outer-{width}-{dark}.html")
    outer.write_text(MEASURE.format(width=width, page=page.name))
    found = _measured(outer, dark, tmp_path)
    assert found["inner"] == width
    assert found["scroll"] == width
    assert found["wide"] == []
    assert found["overlap"] == []
    assert found["cut"] == []
    assert found["labels"] > 50
    assert (found["hidden"], found["shown"]) == ("none", "inline")
    assert "3.3333" in found["tip"]  # the last point under the pointer
    assert found["large"] == 100
    assert max(found["off"]) < 0.6  # pixels between the ends of the row of classes and of the picture
    assert set(found["shortened"]) == {"automobile", LONG}
    assert min(found["zoomed"]) > 0
    assert found["opened"]
    assert found["closed"]
    assert found["dark"] == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")


def test_a_curve_is_visible(page, tmp_path):
    """On a picture of the page, columns that hold the line's colour, nothing else's, go from its first point to the
    plot's end: two thirds of its width.
    """
    alone, picture = write_report([page.parent / "b"], tmp_path / "alone.html"), tmp_path / "page.png"
    _chromium(alone, False, tmp_path, f"--screenshot={picture}", "--window-size=1280,900")
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    columns = np.flatnonzero((np.abs(pixels - (0x00, 0x72, 0xB2)).max(2) < 8).any(0))
    assert 700 < columns.max() - columns.min() < 760
    assert len(columns) > 500


def _measured(page, dark: bool, folder) -> dict:
    said = _chromium(page, dark, folder, "--dump-dom", "--window-size=1400,1000")
    return json.loads(re.search(r"<title>(.*?)</title>", said, re.S)[1].replace("&gt;", ">").replace("&lt;", "<"))


def _chromium(page, dark: bool, folder, *arguments: str) -> str:
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--allow-file-access-from-files", f"--blink-settings=preferredColorScheme={0 if dark else 1}"]
    command += ["--virtual-time-budget=4000", f"--user-data-dir={folder}/profile", *arguments, page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)})
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
