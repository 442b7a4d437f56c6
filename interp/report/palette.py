"""Colours, shared by the interactive and the static figures."""

from __future__ import annotations

from interp.report.prepare import CONTROL, Drawing, Series

COLORS = ("#3451b2", "#c2410c", "#0f766e", "#a21caf", "#b45309", "#0369a1", "#4d7c0f", "#be123c")
"""Series colours: distinct in hue and legible on white and on near-black."""
CONTROL_COLORS = ("#8b929c", "#b3b8bf", "#6b7280")
DIVERGING = (
    (0.0, "#1d4f91"), (0.2, "#5b8fc7"), (0.4, "#c3d7ea"), (0.5, "#f5f5f4"),
    (0.6, "#f3cdb9"), (0.8, "#d9764f"), (1.0, "#9f2f14"),
)  # fmt: skip
"""Blue is negative, red is positive, near-white is zero."""


def series_colors(drawing: Drawing) -> dict[str, str]:
    """Colour by series name: controls in greys, the rest in the palette, in order."""
    controls = {series.name for facet in drawing.facets for series in facet.series if series.control}
    colors: dict[str, str] = {}
    for name in drawing.names:
        palette = CONTROL_COLORS if name in controls else COLORS
        n_before = sum((other in controls) == (name in controls) for other in colors)
        colors[name] = palette[n_before % len(palette)]
    return colors


def bar_colors(drawing: Drawing, series: Series, color: str) -> list[str]:
    """One colour per bar: where nothing is grouped, bars whose category is a control are grey."""
    if drawing.panel.group or drawing.x.kind == "number":
        return [color] * len(series.x)
    return [CONTROL_COLORS[0] if CONTROL.search(str(x)) else color for x in series.x]
