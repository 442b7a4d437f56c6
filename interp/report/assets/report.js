/* Draws every figure of the page from the JSON beside it: the narrow or the wide layout, in the page's colours. */
(() => {
  "use strict";
  const plots = [...document.querySelectorAll(".plot")];
  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const config = (narrow) => ({
    displaylogo: false,
    displayModeBar: narrow ? false : "hover",
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    toImageButtonOptions: { format: "svg" },
    showTips: false,
  });

  function themed(layout, narrow, width) {
    const ink = color("--ink"), line = color("--line"), grid = color("--grid");
    const out = structuredClone(layout);
    out.width = width;
    out.font.color = ink;
    out.hoverlabel = Object.assign({}, out.hoverlabel, { bgcolor: color("--card"), bordercolor: line });
    out.hoverlabel.font.color = ink;
    out.modebar = { bgcolor: "rgba(0,0,0,0)", color: color("--soft"), activecolor: color("--accent") };
    out.dragmode = narrow ? false : "zoom";
    for (const key of Object.keys(out)) {
      if (/^[xy]axis\d*$/.test(key)) {
        Object.assign(out[key], { gridcolor: grid, zerolinecolor: line, linecolor: line, tickcolor: line });
      }
    }
    return out;
  }

  function draw(plot, width) {
    const spec = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    const room = width || plot.clientWidth, narrow = room < 560;
    return Plotly.react(plot, spec.data, themed(narrow ? spec.narrow : spec.wide, narrow, room), config(narrow));
  }

  async function drawAll(width) {
    let drawn = 0;
    for (const plot of plots) {
      try {
        await draw(plot, width);
        drawn += 1;
      } catch (error) {
        plot.textContent = "This figure could not be drawn: " + error.message;
      }
      if (!width) await new Promise((resolve) => setTimeout(resolve, 0));
    }
    document.documentElement.dataset.drawn = String(drawn);
  }

  let last = window.innerWidth, timer = 0;
  window.addEventListener("resize", () => {
    if (window.innerWidth === last) return;
    last = window.innerWidth;
    clearTimeout(timer);
    timer = setTimeout(() => drawAll(), 150);
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawAll());
  window.addEventListener("beforeprint", () => plots.forEach((plot) => draw(plot, 640)));
  window.addEventListener("afterprint", () => drawAll());
  drawAll();
})();
