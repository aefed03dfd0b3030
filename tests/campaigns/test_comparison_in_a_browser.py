"""The page of a comparison in a real browser, narrow and wide, by day and by night."""

import pytest

from dtrain.report.comparison import write
from tests.campaigns.browser import CHROMIUM, Browser
from tests.report.compared import three_runs

pytestmark = [
    pytest.mark.campaign,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine; install the package `chromium`"),
]
LOOK = """(() => {
  const box = (e) => e.getBoundingClientRect();
  for (const each of document.querySelectorAll("details")) each.open = true;
  const all = [...document.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, script, svg"));
  const labels = [...document.querySelectorAll(".corners span")];
  const outside = (e) => box(e).width > 0 && (box(e).left < 0 || box(e).right > innerWidth + 0.5);
  const overlap = [];
  labels.forEach((a, i) => labels.slice(i + 1).forEach((b) => {
    const [p, q] = [box(a), box(b)];
    if (p.left < q.right - 1 && q.left < p.right - 1 && p.top < q.bottom - 2 && q.top < p.bottom - 2)
      overlap.push(a.textContent + " / " + b.textContent);
  }));
  const marks = [...document.querySelectorAll(".corners g")].map((g) => [...g.querySelectorAll(".mark")].map((m) => {
    const one = box(m), frame = box(document.querySelector(".corners svg"));
    const at = [(one.left + one.right) / 2 - frame.left, (one.top + one.bottom) / 2 - frame.top];
    return at.map((v) => v / frame.width);
  }));
  const plot = document.querySelector(".plot"), at = box(plot);
  const middle = (Math.log(5) - Math.log(0.8)) / (Math.log(62.5) - Math.log(0.8));
  const over = { clientX: at.left + middle * at.width, clientY: at.top + 9, bubbles: true };
  plot.dispatchEvent(new PointerEvent("pointermove", over));
  return {
    scroll: document.documentElement.scrollWidth, overlap, marks,
    outside: [...all, ...labels].filter(outside).map((e) => e.outerHTML.slice(0, 80)),
    paper: getComputedStyle(document.body).backgroundColor, tip: document.querySelector(".tip").textContent,
    figure: box(document.querySelector(".corners svg")).width,
    picture: box(document.querySelector(".pictures img")).width,
  };
})()"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_overflows_and_the_triangle_is_one(width, dark, tmp_path):
    page, _ = write(three_runs(), tmp_path)
    browser = Browser(tmp_path, width, 900)
    try:
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        browser.ask("Emulation.setEmulatedMedia", features=scheme)
        browser.open(page.as_uri())
        browser.wait("document.querySelectorAll('.chart').length == 2")
        found = browser.value(LOOK)
    finally:
        browser.close()
    assert found["scroll"] == width
    assert found["outside"] == []
    assert found["overlap"] == []
    assert found["paper"] == ("rgb(20, 23, 26)" if dark else "rgb(255, 255, 255)")
    assert "slow <b>: 1 · 5 steps, 2 s a thousand" in found["tip"]  # under the pointer, on the logarithmic axis
    assert found["picture"] == 96
    assert found["figure"] > 300
    best = [found["marks"][0][0], found["marks"][1][2]]  # the slow run's quality, the quick one's speed: at corners
    assert best[0] == pytest.approx([0.5, 0.07], abs=0.01)
    assert best[1] == pytest.approx([0.5 + 0.47 * 3**0.5 / 2, 0.54 + 0.235], abs=0.01)
