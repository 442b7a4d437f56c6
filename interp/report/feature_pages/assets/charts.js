/* Histograms as small pictures that take the page's colours. */
"use strict";
function histogram({ low, high, counts }, { label, ends, unit, zero }) {
  const width = 480, height = 120, floor = height - 18;
  const most = Math.max(1, ...counts), step = width / counts.length, span = (high - low) / counts.length;
  const bars = counts.map((count, i) => {
    if (!count) return null;
    const tall = Math.max(1.5, (count / most) * (floor - 4));
    const bar = el("svg:rect", {
      x: (i * step + 0.5).toFixed(2), y: (floor - tall).toFixed(2),
      width: Math.max(1, step - 1).toFixed(2), height: tall.toFixed(2), class: "bar",
    });
    bar.append(el("svg:title", {}, `${number(low + i * span)} to ${number(low + (i + 1) * span)}: ${whole(count)} ${unit}`));
    return bar;
  });
  const [left, right] = ends || [number(low), number(high)];
  const at = zero && low < 0 && high > 0 ? (-low / (high - low)) * width : null;
  return el("svg:svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label, class: "chart" },
    el("svg:line", { x1: 0, x2: width, y1: floor + 0.5, y2: floor + 0.5, class: "axis" }),
    at === null ? null : el("svg:line", { x1: at, x2: at, y1: 0, y2: floor, class: "zero" }),
    bars,
    el("svg:text", { x: 0, y: height - 3 }, left),
    at === null || at < 70 || at > width - 70 ? null
      : el("svg:text", { x: at, y: height - 3, "text-anchor": "middle" }, "0"),
    el("svg:text", { x: width, y: height - 3, "text-anchor": "end" }, right));
}
