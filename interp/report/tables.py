"""Values and tables as HTML: everything escaped, every cap said.

`safe` is the only way by which text enters the page. Numbers keep four significant digits; the whole value is in
`summary.json` and in the Parquet table.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import pandas as pd

from interp.core.result import Control
from interp.report.prepare import visible

MAX_ROWS = 200
"""Rows of a table that the page holds; the rest is in the run folder."""
MAX_COLUMNS = 24
MAX_TEXT = 400
"""Characters of one cell."""


def safe(text: object) -> str:
    """Text as HTML that shows it as it is written; also safe inside a quoted attribute."""
    return html.escape(visible(text), quote=True)


def shown(value: Any) -> str:
    """A headline value as plain text: four significant digits, lists joined, nothing shown as `None`."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return _number(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    if isinstance(value, Mapping):
        items = cast("Mapping[Any, Any]", value).items()
        return ", ".join(f"{key} {shown(item)}" for key, item in items)
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(item) for item in cast("Sequence[Any]", value))
    return str(value)


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "not finite" if not math.isnan(value) else "–"
    if value != 0 and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def mark(passed: bool) -> str:
    """A verdict in colour and in words."""
    return '<span class="mark held">✓ held</span>' if passed else '<span class="mark failed">✗ failed</span>'


def frame_html(table: pd.DataFrame, origin: str) -> str:
    """A tidy table, capped; the cap is said above it with where the rest is (`origin`)."""
    names = [str(name) for name in table.columns]
    cut = [f"the first {MAX_ROWS} of {len(table):,} rows"] if len(table) > MAX_ROWS else []
    cut += [f"the first {MAX_COLUMNS} of {len(names)} columns"] if len(names) > MAX_COLUMNS else []
    columns = [list(table.iloc[:MAX_ROWS, i].tolist()) for i in range(min(len(names), MAX_COLUMNS))]
    numeric = [all(v is None or _is_number(v) for v in values) for values in columns]
    rows = [
        [_cell(_clip(shown(v)), number=n) for v, n in zip(row, numeric, strict=True)]
        for row in zip(*columns, strict=True)
    ]
    heads = [_head(name, number=n) for name, n in zip(names, numeric, strict=False)]
    note = f"Shown: {' and '.join(cut)}; all of it is in {origin}." if cut else f"Saved in {origin}."
    return f'<p class="cap">{safe(note)}</p><div class="scroll">{grid_html(heads, rows)}</div>'


def grid_html(heads: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    """A table from cells that are HTML already."""
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    name = f' class="{kind}"' if kind else ""
    return f"<table{name}><thead><tr>{''.join(heads)}</tr></thead><tbody>{body}</tbody></table>"


def controls_html(controls: Sequence[Control]) -> str:
    """What could have refuted the claim, and whether it did."""
    names = {"Control": False, "Compared": False, "Observed": True, "Under control": True, "p": True, "Verdict": False}
    heads = [_head(name, number=number) for name, number in names.items()]
    rows = [
        [
            _cell(control.name, label=""),
            _cell(control.statistic, label="compared"),
            _cell(shown(control.observed), label="observed", number=True),
            _cell(shown(control.control), label="under control", number=True),
            _cell(shown(control.p_value), label="p", number=True),
            f"<td>{mark(control.passed)}</td>",
        ]
        for control in controls
    ]
    return f'<div class="card scroll">{grid_html(heads, rows, "stack")}</div>'


def _head(text: str, *, number: bool = False) -> str:
    name = ' class="num"' if number else ""
    return f"<th{name}>{safe(text)}</th>"


def _cell(text: str, *, label: str | None = None, number: bool = False) -> str:
    name = ' class="num"' if number else ""
    data = f' data-label="{safe(label)}"' if label is not None else ""
    return f"<td{name}{data}>{safe(text)}</td>"


def _clip(text: str) -> str:
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]}… ({len(text):,} characters)"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
