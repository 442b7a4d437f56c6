"""What will be drawn: one panel and its table turned into plain lists that both renderers share.

The interactive figure (`panels.py`) and the static one (`static.py`) draw the same `Drawing`, so they cannot disagree
on order, scale or on what was left out. Nothing here knows about plotly or matplotlib.

Conventions: a series whose name says that it is a control (random, shuffled, baseline, ...) is drawn in grey; a
heatmap's colours are symmetric around zero; anything that a size cap or a logarithmic axis dropped is said in
`left_out`, which is shown beside the figure.
"""

from __future__ import annotations

import html
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from interp.core.result import Panel, Result

MAX_POINTS = 5_000
"""Rows drawn in a line, bar or scatter panel."""
MAX_CELLS = 60_000
"""Cells drawn in all heatmaps of a panel."""
MAX_SERIES = 24
MAX_FACETS = 12
LABEL_CHARS = 28
"""Longer tick labels are cut; the hover text and the table keep them whole."""

_CONTROLS = "controls?|random|shuffled?|permuted|ordinary|baseline|null|untouched|pca|ablation"
CONTROL = re.compile(rf"\b({_CONTROLS})\b", re.IGNORECASE)
_VISIBLE = {"\n": "⏎", "\r": "␍", "\t": "⇥"}


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis: numbers, or categories in the order in which they are drawn."""

    kind: Literal["number", "category"]
    label: str
    order: tuple[Any, ...]
    """Distinct values: numbers sorted, categories as text."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line, one set of bars, or one cloud of points."""

    name: str
    control: bool
    x: tuple[Any, ...]
    y: tuple[float | None, ...]
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Facet:
    """One small multiple: either series, or a grid of colours indexed [y][x]."""

    title: str
    series: tuple[Series, ...] = ()
    grid: tuple[tuple[float | None, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Node:
    """One node of a graph, placed."""

    name: str
    label: str
    x: float
    y: int
    detail: str


@dataclass(frozen=True, kw_only=True)
class Edge:
    """One edge of a graph between two of its nodes, by their names."""

    start: str
    end: str
    weight: float
    kind: str


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """A panel ready to be drawn."""

    panel: Panel
    x: Axis
    y: Axis
    facets: tuple[Facet, ...]
    value_label: str = ""
    limit: float = 1.0
    """Heatmap: the colour scale runs from -limit to +limit."""
    left_out: str = ""
    nodes: tuple[Node, ...] = ()
    """Graph only."""
    edges: tuple[Edge, ...] = ()
    spans: tuple[tuple[str, float], ...] = ()
    """Graph only: columns with the place of their right end; the first begins at 0."""

    @property
    def columns(self) -> int:
        """Columns of small multiples in a wide window: up to three, and rows as full as they can be."""
        return {0: 1, 4: 2}.get(len(self.facets), min(3, len(self.facets)))

    @property
    def names(self) -> list[str]:
        """Series names in order of first appearance, over all facets."""
        return list(dict.fromkeys(series.name for facet in self.facets for series in facet.series))


def visible(text: object) -> str:
    """Text with control characters made visible, so that a token that is a newline can be read."""
    return "".join(_VISIBLE.get(c, c if c.isprintable() else f"\\x{ord(c):02x}") for c in str(text))


def safe(text: object) -> str:
    """Text that plotly shows as it is written."""
    return html.escape(visible(text), quote=False)


def shorten(text: str, n_chars: int = LABEL_CHARS) -> str:
    return text if len(text) <= n_chars else text[: n_chars - 1] + "…"


def prepare(panel: Panel, result: Result) -> Drawing:
    """Read the panel's table into lists, apply the size caps, and say what they left out."""
    if panel.kind == "graph":
        from interp.report.graphs import prepare_graph

        return prepare_graph(panel, result)
    return _heatmap(panel, result) if panel.kind == "heatmap" else _series(panel, result)


def column(table: pd.DataFrame, name: str) -> list[Any]:
    """A column as plain Python values."""
    return list(table[name].tolist())


def number(value: Any) -> float | None:
    """A finite number, or None where there is nothing to draw."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def _axis(values: Sequence[Any], label: str, *, even: bool) -> Axis:
    """Numbers stay numbers (if `even`, only when equally spaced); anything else becomes categories."""
    numeric = bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)
    distinct: list[Any] = list(dict.fromkeys(map(visible, values)))
    if numeric:
        distinct = sorted({v for v in values if math.isfinite(v)})
    if numeric and (not even or _evenly_spaced(distinct)):
        return Axis(kind="number", label=visible(label), order=tuple(distinct))
    return Axis(kind="category", label=visible(label), order=tuple(text_of(v) for v in distinct))


def _evenly_spaced(values: Sequence[int | float]) -> bool:
    steps = [b - a for a, b in itertools.pairwise(values)]
    return all(math.isclose(step, steps[0], rel_tol=1e-6) for step in steps)


def text_of(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else visible(value)


def _on(axis: Axis, value: Any) -> Any:
    return value if axis.kind == "number" else text_of(value)


def _thin(items: Sequence[Any], keep: int) -> list[Any]:
    """At most `keep` items, evenly spaced, the first included."""
    if len(items) <= keep:
        return list(items)
    return [items[int(i * len(items) / keep)] for i in range(keep)]


def _split(keys: Sequence[Any], limit: int, noun: str, lost: list[str]) -> list[Any]:
    """Distinct keys in order of appearance, at most `limit`; what is dropped is noted in `lost`."""
    distinct = list(dict.fromkeys(keys))
    if len(distinct) > limit:
        lost.append(f"{len(distinct) - limit} of {len(distinct)} {noun} not drawn")
    return distinct[:limit]


def _heatmap(panel: Panel, result: Result) -> Drawing:
    table, lost = result.tables[panel.table], list[str]()
    values = column(table, panel.value or panel.y)
    xs, ys = column(table, panel.x), column(table, panel.y)
    x, y = _axis(xs, panel.x_label or panel.x, even=True), _axis(ys, panel.y_label or panel.y, even=True)
    keys = column(table, panel.facet) if panel.facet else [""] * len(xs)
    facets = _split(keys, MAX_FACETS, "facets", lost)
    room = max(1, MAX_CELLS // max(1, len(facets)))
    if len(x.order) * len(y.order) > room:
        kept_x = _thin(x.order, max(1, room // len(y.order)))
        kept_y = _thin(y.order, max(1, room // len(kept_x)))
        lost.append(f"only {len(kept_x)} of {len(x.order)} columns and {len(kept_y)} of {len(y.order)} rows are drawn")
        x = Axis(kind="category", label=x.label, order=tuple(text_of(v) for v in kept_x))
        y = Axis(kind="category", label=y.label, order=tuple(text_of(v) for v in kept_y))
    cells = {
        (key, _on(x, a), _on(y, b)): number(v) for key, a, b, v in zip(keys, xs, ys, values, strict=True)
    }  # fmt: skip
    grids = [
        Facet(
            title=visible(key),
            grid=tuple(tuple(cells.get((key, a, b)) for a in x.order) for b in y.order),
        )
        for key in facets
    ]
    drawn = [abs(v) for facet in grids for row in facet.grid for v in row if v is not None]
    return Drawing(
        panel=panel,
        x=x,
        y=y,
        facets=tuple(grids),
        value_label=visible(panel.value_label or panel.value or panel.y),
        limit=max(drawn, default=0.0) or 1.0,
        left_out=sentence(lost),
    )


def _series(panel: Panel, result: Result) -> Drawing:
    table, lost = result.tables[panel.table], list[str]()
    if len(table) > MAX_POINTS:
        lost.append(f"{len(table) - MAX_POINTS:,} of {len(table):,} rows not drawn (evenly spaced rows are)")
        table = table.iloc[_thin(range(len(table)), MAX_POINTS)]
    xs = column(table, panel.x)
    x = _axis(xs, panel.x_label or panel.x, even=panel.kind == "bar")
    rows = list(
        zip(
            column(table, panel.facet) if panel.facet else [""] * len(xs),
            column(table, panel.group) if panel.group else [""] * len(xs),
            [_on(x, v) for v in xs],
            *([number(v) for v in column(table, name)] if name else [None] * len(xs) for name in _ys(panel)),
            strict=True,
        )
    )
    if panel.log_y:
        positive = [row for row in rows if row[3] is None or row[3] > 0]
        if len(positive) < len(rows):
            lost.append(f"{len(rows) - len(positive):,} values at or below 0 have no place on a logarithmic axis")
        rows = positive
    groups = _split([row[1] for row in rows], MAX_SERIES, "series", lost)
    facets: list[Facet] = []
    for key in _split([row[0] for row in rows], MAX_FACETS, "facets", lost):
        inside = [row for row in rows if row[0] == key]
        series = [_one_series(panel, x, g, [r for r in inside if r[1] == g]) for g in groups]
        facets.append(Facet(title=visible(key), series=tuple(s for s in series if s.x)))
    y = Axis(kind="number", label=visible(panel.y_label or panel.y), order=())
    return Drawing(panel=panel, x=x, y=y, facets=tuple(facets), left_out=sentence(lost))


def _ys(panel: Panel) -> tuple[str | None, ...]:
    return (panel.y, panel.low, panel.high)


def _one_series(panel: Panel, x: Axis, group: Any, rows: list[tuple[Any, ...]]) -> Series:
    if panel.kind == "line" and x.kind == "number":
        rows = sorted(rows, key=lambda row: row[2])
    name = text_of(group)
    return Series(
        name=name,
        control=bool(CONTROL.search(name)),
        x=tuple(row[2] for row in rows),
        y=tuple(row[3] for row in rows),
        low=tuple(row[4] for row in rows) if panel.low else (),
        high=tuple(row[5] for row in rows) if panel.high else (),
    )


def sentence(lost: list[str]) -> str:
    return f"Not everything is shown: {'; '.join(lost)}." if lost else ""
