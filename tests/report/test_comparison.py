"""The page of a comparison: its table, the geometry of its triangle, and nothing that comes from elsewhere."""

import math
import re

import pytest

from dtrain.report import comparison, triangle
from dtrain.report.triangle import CENTRE, RADIUS, WORST, Axis
from tests.report.compared import METRICS, three_runs
from tests.report.made import Page


@pytest.fixture
def found():
    return three_runs()


def cells(html: str) -> list[list[str]]:
    """The words of each row of the first table."""
    rows = re.findall(r"<tr>(.*?)</tr>", html.partition("</table>")[0], re.S)
    strip = lambda cell: re.sub(r"<[^>]+>", " ", cell).strip()  # noqa: E731
    return [[strip(cell) for cell in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)] for row in rows]


def test_the_table_has_every_number_and_marks_the_best(found):
    html = comparison.numbers(found)
    head, *rows = cells(html)
    assert [re.sub(r"\s+", " ", name) for name in head] == [
        *("run", "fd_pixels", "precision", "recall", "density", "coverage", "evaluations an image"),
        *("seconds a thousand", "parameters", "training images", "training time", "energy"),
    ]
    assert head.index("recall") == head.index("precision") + 1
    assert rows[0][:8] == ["slow &lt;b&gt;", "0.5", "0.5", "0.8", "1.25", "0.75", "50", "20"]
    assert rows[0][8:] == ["725k", "1,000", "1 min 1 s", "12.5 Wh  estimated"]
    assert rows[1][9].split() == ["1,000", "after", "slow"]
    assert rows[1][11] == "not measured"
    best = re.findall(r'<b><span title="([^"]+)">', html)
    assert best == ["0.5", "0.5", "0.8", "0.75", "0.5", "0.75", "1", "0.2", "0.5", "0.75"]


def test_a_corner_is_the_best_and_the_worst_lies_a_quarter_out():
    axis = Axis("quality", "fd", 0, best=0.5, worst=8.0)
    assert axis.share(0.5) == 1
    assert axis.share(8.0) == pytest.approx(WORST)
    assert axis.share(2.0) == pytest.approx((1 + WORST) / 2)  # the geometric mean of the two lies half-way
    assert Axis("quality", "fd", 0, best=2.0, worst=2.0).share(2.0) == 1
    recall = Axis("diversity", "recall", -120)
    assert [recall.share(v) for v in (0.0, 0.3, 1.0)] == [0.0, 0.3, 1.0]
    places = [Axis("", "", angle).place(1) for angle in (0, 120, -120)]
    assert places[0] == pytest.approx((CENTRE[0], CENTRE[1] - RADIUS))
    sides = [math.dist(places[i], places[i - 1]) for i in range(3)]
    assert sides == pytest.approx([RADIUS * math.sqrt(3)] * 3)
    assert places[1][0] > CENTRE[0] > places[2][0]
    for tick in axis.ticks():
        assert WORST <= axis.share(tick) <= 1


def test_the_lines_of_the_triangle_go_through_the_values(found):
    html = triangle.html(found)
    lines = re.findall(r'<path class="line" d="M([\d.L ]+)Z"', html)
    spots = [[tuple(map(float, spot.split())) for spot in line.split("L")] for line in lines]
    shares = [[math.dist(spot, CENTRE) / RADIUS for spot in three] for three in spots]  # quality, diversity, speed
    speed = 1 - (1 - WORST) * math.log(0.4 / 0.2) / math.log(20 / 0.2)
    quality = 1 - (1 - WORST) * math.log(2 / 0.5) / math.log(2.5 / 0.5)
    assert shares[0] == pytest.approx([1, 0.8, WORST], abs=1e-3)
    assert shares[1] == pytest.approx([quality, 0.2, 1], abs=1e-3)
    assert shares[2] == pytest.approx([WORST, 0.1, speed], abs=1e-3)
    assert len(set(re.findall(r'<path class="mark" d="M0 0([^"]+)"', html))) == 3  # a shape a run
    assert "worse is better in none of the three than quick." in html
    text = Page(f"<main>{html}</main>").text
    for words in (
        "quality",
        "fd_pixels",
        "diversity",
        "recall",
        "speed",
        "seconds a thousand",
        "logarithmic",
        "linear",
    ):
        assert words in text
    found["runs"][2]["own"]["metrics"][METRICS["fd"]] = 0.0
    assert triangle.html(found) == ""  # no logarithm


def test_the_page_holds_all_and_needs_nothing_else(found, tmp_path):
    page, numbers = comparison.write(found, tmp_path)
    read = Page(page.read_text())
    assert [name for _, name in re.findall(r"<(h2)>(.*?)</h2>", read.source)] == [
        *("Numbers", "Triangle", "Over network evaluations", "Pictures, steps and seconds", "What was compared")
    ]
    assert "://" not in read.source
    assert all((a.get("src") or "data:").startswith("data:") for _, a in read.tags)
    assert read.points("fd_pixels") == {
        "slow <b>": [
            [5, 1.0, None, None, "5 steps, 2 s a thousand"],
            [50, 0.5, None, None, "50 steps, 20 s a thousand"],
        ],
        "quick": [[1, 2.0, None, None, "1 step, 0.2 s a thousand"]],
        "worse": [[2, 2.5, None, None, "2 steps, 0.4 s a thousand"]],
    }
    assert read.charts["fd_pixels"]["log"] is True
    assert [p[1] for p in read.points("recall_pixels")["slow <b>"]] == [0.4, 0.8]
    alts = [a["alt"] for tag, a in read.tags if tag == "img"]
    assert alts == ["slow <b>, 50 steps", "slow <b>, 5 steps", "quick, 1 step", "worse, 2 steps"]
    for words in ("a device", "h/manifest.json", "euler", "Class 3", "seed 7", "50 steps", "too many", "torch 2"):
        assert words in read.text
    assert "png" not in numbers.read_text()
    assert '"seconds": 1.5' in numbers.read_text()


def test_a_run_without_steps_stands_in_no_column_of_steps(found):
    found["runs"][1]["walks"] = False
    found["runs"][1]["pictures"][0]["steps"] = found["runs"][1]["own"]["steps"] = 5  # a default that nobody uses
    rows = cells(comparison.pictures(found))
    assert [re.sub(r"\s+", " ", cell) for cell in rows[2]] == ["quick", "no steps 0.25 s", "–"]
    assert rows[1][2].startswith("5 steps")
    assert "no steps, 0.2 s a thousand" in comparison.curves(found)
    assert "quick.steps" not in comparison.for_mlflow(found)[0]


def test_evaluations_lie_on_logarithmic_axes(found):
    html = comparison.curves(found)
    (dots,) = re.findall(r'data-series="0".*?class="dots" d="M([\d.]+) ([\d.]+)h.01M([\d.]+) ([\d.]+)h', html)[:1]
    x = [float(dots[0]), float(dots[2])]
    low, high = math.log(1 / 1.25), math.log(50 * 1.25)
    assert x == pytest.approx([1000 * (math.log(v) - low) / (high - low) for v in (5, 50)], abs=0.06)
