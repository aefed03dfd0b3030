"use strict";
const number = (v) => Math.abs(v) >= 1e4 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(5));
const make = (tag, text, parent) => { const e = document.createElement(tag); e.textContent = text; parent.append(e); return e; };

for (const chart of document.querySelectorAll(".chart")) {
  const data = JSON.parse(chart.querySelector("script").textContent);
  const plot = chart.querySelector(".plot"), tip = chart.querySelector(".tip"), cursor = chart.querySelector(".cursor");
  const off = new Set(), on = data.log ? Math.log : (x) => x;
  const left0 = on(data.x[0]), span = on(data.x[1]) - left0;
  for (const key of chart.querySelectorAll("button.key")) key.addEventListener("click", () => {
    const i = key.dataset.series, hidden = !off.has(i);
    hidden ? off.add(i) : off.delete(i);
    key.setAttribute("aria-pressed", String(!hidden));
    chart.querySelector(`g[data-series="${i}"]`).classList.toggle("off", hidden);
  });
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = left0 + (event.clientX - box.left) / box.width * span;
    let nearest = null;
    const found = [];
    data.series.forEach((s, i) => {
      if (off.has(String(i))) return;
      const point = s.points.reduce((a, b) => Math.abs(on(b[0]) - x) < Math.abs(on(a[0]) - x) ? b : a);
      found.push([s, point]);
      if (nearest === null || Math.abs(on(point[0]) - x) < Math.abs(nearest - x)) nearest = on(point[0]);
    });
    if (nearest === null) return;
    const left = (nearest - left0) / span * box.width;
    cursor.style.cssText = `display:block;left:${left}px`;
    tip.replaceChildren();
    for (const [s, [px, y, low, high, label]] of found) {
      if (Math.abs(on(px) - nearest) > 0.02 * span) continue;
      const line = make("div", "", tip);
      make("i", "", line).style.setProperty("--c", `var(--${s.colour})`);
      const spread = low === null ? "" : ` (${number(low)} – ${number(high)})`;
      line.append(`${s.name ? s.name + ": " : ""}${number(y)}${spread}${label ? " · " + label : ""}`);
    }
    tip.style.display = "block";
    const over = left > box.width / 2;
    tip.style.left = over ? "auto" : `${left + 10}px`;
    tip.style.right = over ? `${box.width - left + 10}px` : "auto";
  });
  plot.addEventListener("pointerleave", () => { tip.style.display = cursor.style.display = "none"; });
}

const dialog = make("dialog", "", document.body);
dialog.addEventListener("click", () => dialog.close());
for (const box of document.querySelectorAll(".grids")) {
  const thumbs = [...box.querySelectorAll(".thumb")], slider = box.querySelector("input");
  const large = box.querySelector(".large"), picture = large.querySelector("img");
  const show = (i) => {
    const chosen = thumbs[i].querySelector("img");
    [picture.src, picture.alt] = [chosen.src, chosen.alt];
    large.querySelector("figcaption").textContent = chosen.alt;
    thumbs.forEach((thumb, j) => thumb.setAttribute("aria-current", String(i === j)));
    slider.value = i;
  };
  thumbs.forEach((thumb, i) => thumb.addEventListener("click", () => show(i)));
  slider.addEventListener("input", () => show(Number(slider.value)));
  picture.addEventListener("click", () => {
    const whole = large.querySelector(".labelled").cloneNode(true);
    whole.style.setProperty("--ratio", picture.naturalWidth / picture.naturalHeight);
    whole.style.setProperty("--own", `${picture.naturalWidth}px`);
    dialog.replaceChildren(whole);
    dialog.showModal();
  });
  large.hidden = false;
  slider.hidden = thumbs.length < 2;
  show(thumbs.length - 1);
}
