"""Results: what every method returns.

A `Result` is a frozen value: headline numbers, tidy tables, labelled tensors, the controls that could refute the
claim, figures described as data, and the manifest. It is one concrete class rather than a base class, so that a run
can be reloaded, reported and compared without the code that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pandas as pd
from torch import Tensor

from interp.core.errors import InterpError, unknown
from interp.core.manifest import Manifest

PanelKind = Literal["heatmap", "line", "bar", "scatter", "graph"]
NODE_COLUMNS = ("node", "label", "row", "row_label", "column", "detail")
"""Of the table of a graph's nodes: name, text on it (its later lines only where there is room), height, name of that
height, column it stands in, hover text."""


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One figure, as data: which table, which columns, and how to read it. Rendering lives in `interp.report`.

    A `graph` draws a table of edges: `x` and `y` are its columns with the names of both ends, `value` the weight.
    """

    title: str
    kind: PanelKind
    table: str
    """Name of a table of the same result."""
    x: str
    y: str
    value: str | None = None
    """Heatmap and graph: the column that gives the colour (diverging around 0), in a graph also the width."""
    group: str | None = None
    """Line, bar, scatter: the column that splits the rows into series. Graph: what kind of edge it is."""
    nodes: str | None = None
    """Graph only: the table of its nodes, with the columns NODE_COLUMNS."""
    low: str | None = None
    high: str | None = None
    """Columns with the ends of an interval around `y`."""
    facet: str | None = None
    """Column that splits the figure into small multiples."""
    log_y: bool = False
    x_label: str = ""
    y_label: str = ""
    value_label: str = ""
    """Axis titles with units; the column name is used where empty."""
    reading: str = ""
    """One or two sentences: what to see, and what the control says."""


@dataclass(frozen=True, kw_only=True)
class Control:
    """One thing that could have refuted the claim, and what it said."""

    name: str
    """What was done, e.g. `20 random directions of equal norm`."""
    statistic: str
    """What is compared, with its unit."""
    observed: float
    control: float
    """The same statistic under the control: its 95th percentile, mean, or value, as `statistic` says."""
    passed: bool
    p_value: float | None = None


@dataclass(frozen=True, kw_only=True)
class LabelledTensor:
    """A tensor with one name per axis and a unit."""

    values: Tensor
    axes: tuple[str, ...]
    unit: str = ""

    def __post_init__(self) -> None:
        if len(self.axes) != self.values.ndim:
            raise InterpError(f"{self.values.ndim} axes need as many names, got {self.axes}")


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a method found, with its controls and its origin."""

    headline: Mapping[str, Any]
    """The few numbers that go into `summary.json`; plain Python values."""
    tables: Mapping[str, pd.DataFrame]
    panels: tuple[Panel, ...]
    controls: tuple[Control, ...]
    manifest: Manifest
    tensors: Mapping[str, LabelledTensor] = field(default_factory=dict[str, LabelledTensor])
    notes: tuple[str, ...] = ()
    """What the reader should doubt: dropped prompts, a failed control, a caveat of the method."""

    def __post_init__(self) -> None:
        if not self.controls:
            raise InterpError(f"the result of {self.method!r} carries no control")
        for panel in self.panels:
            if panel.table not in self.tables:
                raise unknown("table", panel.table, self.tables)
            for column in (panel.x, panel.y, panel.value, panel.group, panel.low, panel.high, panel.facet):
                if column is not None and column not in self.tables[panel.table].columns:
                    raise unknown(
                        f"column of table {panel.table!r}", column, map(str, self.tables[panel.table].columns)
                    )

            if panel.kind == "graph":
                self._check_nodes(panel)

    def _check_nodes(self, panel: Panel) -> None:
        if panel.nodes is None or panel.nodes not in self.tables:
            raise unknown("table of nodes", str(panel.nodes), self.tables)
        for column in NODE_COLUMNS:
            if column not in self.tables[panel.nodes].columns:
                raise InterpError(f"table {panel.nodes!r} holds the nodes of a graph; it needs a column {column!r}")

    @property
    def method(self) -> str:
        return self.manifest.method

    def control_table(self) -> pd.DataFrame:
        """The controls as a tidy table."""
        columns = ["control", "statistic", "observed", "under control", "p", "passed"]
        rows = [(c.name, c.statistic, c.observed, c.control, c.p_value, c.passed) for c in self.controls]
        return pd.DataFrame(rows, columns=columns)

    def headline_table(self) -> pd.DataFrame:
        """The headline numbers as a tidy table."""
        return pd.DataFrame({"quantity": list(self.headline), "value": [str(v) for v in self.headline.values()]})

    def __repr__(self) -> str:
        lines = [f"{self.method} on {self.manifest.model.source}"]
        lines += [f"  {name}: {_short(value)}" for name, value in self.headline.items()]
        lines += [
            f"  control {'held' if c.passed else 'FAILED'}: {c.name}: {c.statistic} "
            f"{_short(c.observed)} against {_short(c.control)}"
            for c in self.controls
        ]
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return self.headline_table().to_html(index=False, escape=True) + self.control_table().to_html(
            index=False, escape=True
        )


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
