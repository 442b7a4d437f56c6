/* Histograms as small pictures that take the page's colours. */
"use strict";
function histogram({ low, high, counts }, { label, ends, unit, zero }) {
  const width = 480, height = 100;
  const most = Math.max(1, ...counts), step = width / counts.length, span = (high - low) / counts.length;
  const bars = counts.map((count, i) => {
    if (!count) return null;
    const tall = Math.max(1.5, (count / most) * (height - 4));
    const bar = el("svg:rect", {
      x: (i * step + 0.5).toFixed(2), y: (height - tall).toFixed(2),
      width: Math.max(1, step - 1).toFixed(2), height: tall.toFixed(2), class: "bar",
    });
    bar.append(el("svg:title", {}, `${number(low + i * span)} to ${number(low + (i + 1) * span)}: ${whole(count)} ${unit}`));
    return bar;
  });
  const [left, right] = ends || [number(low), number(high)];
  const at = zero && low < 0 && high > 0 ? (-low / (high - low)) * width : null;
  const place = at === null ? null : `${((100 * at) / width).toFixed(1)}%`;
  const middle = at !== null && at > 0.15 * width && at < 0.85 * width ? el("span", { class: "at-zero" }, "0") : null;
  if (middle) middle.style.left = place;
  return el("div", { class: "chart" },
    el("svg:svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
      at === null ? null : el("svg:line", { x1: at, x2: at, y1: 0, y2: height, class: "zero" }), bars),
    el("div", { class: "ends" }, el("span", {}, left), middle, el("span", {}, right)));
}
