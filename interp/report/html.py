"""The report: one HTML file that opens anywhere, offline, and says what to doubt.

It holds its own copy of plotly.js, asks the network for nothing (a Content-Security-Policy forbids it and admits no
script but the two of this page, by their hash), shows static pictures where scripts are off, and escapes everything
that came from a model, a prompt or a config. The order is the order of reading: what to read first, one row per
method, then each method with its headline, figures, controls, notes, tables and manifest.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import uuid
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from interp.core.errors import ArtefactError
from interp.core.result import Panel, Result
from interp.core.run import Run, load_run
from interp.core.spec import Spec, discover
from interp.report.panels import plot_spec
from interp.report.prepare import prepare
from interp.report.static import static_svg
from interp.report.tables import controls_html, frame_html, grid_html, mark, safe, shown

SUMMARY_VALUES = 4
"""Headline numbers shown per method in the table at the top; the cards below show all."""
LONG = 9
"""Headline values with more characters get the small type."""


def write_report(folder: Path) -> Path:
    """Render the run in `folder` into `folder/report.html`; the file is replaced whole or left as it was."""
    text = render(load_run(folder), name=folder.name)
    path, draft = folder / "report.html", folder / f".report.html.{uuid.uuid4().hex[:8]}"
    try:
        draft.write_text(text, encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise ArtefactError(
            f"could not write {path}: {error.strerror or error}; free space or check the folder"
        ) from error
    finally:
        draft.unlink(missing_ok=True)
    return path


def render(run: Run, *, name: str = "") -> str:
    """The whole page as text."""
    from plotly.offline import get_plotlyjs

    scripts = [get_plotlyjs(), _asset("report.js")]
    if any("</script" in script.lower() or "<!--" in script for script in scripts):
        raise ArtefactError("a script of the page would end itself early; install a known-good plotly (interp doctor)")
    specs = discover()
    title = f"{name or 'run'} · interp"
    sections = "".join(_method(result, specs.get(result.method), i) for i, result in enumerate(run.results))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(scripts)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f"<title>{safe(title)}</title>\n<style>{_asset('report.css')}</style>\n</head>\n<body>\n"
        f"{_header(run, name)}<main>{_first(run)}{_summary(run, specs)}{sections}</main>{_footer(run, name)}\n"
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body>\n</html>\n"
    )


def _asset(name: str) -> str:
    return (resources.files("interp.report") / "assets" / name).read_text(encoding="utf-8")


def _policy(scripts: list[str]) -> str:
    """Nothing may be loaded, nothing may run but these scripts; plotly writes styles, pictures are `data:`."""
    hashes = [base64.b64encode(hashlib.sha256(s.encode("utf-8")).digest()).decode() for s in scripts]
    allowed = " ".join(f"'sha256-{h}'" for h in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def embedded(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _header(run: Run, name: str) -> str:
    models = dict.fromkeys(result.manifest.model.source for result in run.results)
    created = max((result.manifest.created for result in run.results), default="")
    controls = [control for result in run.results for control in result.controls]
    held = sum(control.passed for control in controls)
    facts = [("model", ", ".join(models)), ("made", created.replace("T", " ")[:16])]
    facts += [("controls held", f"{held} of {len(controls)}")]
    if isinstance(run.facts.get("seconds"), (int, float)):
        facts.append(("took", f"{run.facts['seconds']:,.0f} s"))
    items = "".join(f"<li>{safe(label)} <b>{safe(value)}</b></li>" for label, value in facts)
    return (
        f'<header><p class="eyebrow">interp report</p><h1>{safe(name or ", ".join(models))}</h1>'
        f'<ul class="facts">{items}</ul></header>'
    )


def _first(run: Run) -> str:
    """What to read first: exactness, what failed, what to doubt."""
    lines: list[str] = []
    verify = run.facts.get("verify")
    if isinstance(verify, Mapping) and "max_abs_diff" in verify:
        lines.append(
            "Capturing every site changed the logits by at most "
            f"<b>{safe(shown(verify['max_abs_diff']))}</b>, so the numbers below are the model's own."
        )
    failed = [(i, r, c) for i, r in enumerate(run.results) for c in r.controls if not c.passed]
    for i, result, control in failed:
        lines.append(
            f'{mark(False)} <a href="#m{i}">{safe(result.method)}</a>: {safe(control.name)} '
            f"({safe(control.statistic)} {safe(shown(control.observed))} against {safe(shown(control.control))}). "
            "Do not rely on that claim yet."
        )
    if not failed:
        lines.append("Every control held: nothing that was tried refuted a claim. The notes say what was not tried.")
    noted = [f'<a href="#m{i}">{safe(r.method)}</a> ({len(r.notes)})' for i, r in enumerate(run.results) if r.notes]
    if noted:
        lines.append(f"Notes on what to doubt: {', '.join(noted)}.")
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<section class="first card"><h2>Read this first</h2><ul>{items}</ul></section>'


def _summary(run: Run, specs: Mapping[str, Spec]) -> str:
    rows: list[list[str]] = []
    for i, result in enumerate(run.results):
        spec = specs.get(result.method)
        pairs = "".join(
            f"<dt>{safe(key)}</dt><dd>{safe(shown(value))}</dd>"
            for key, value in list(result.headline.items())[:SUMMARY_VALUES]
        )
        failed = sum(not control.passed for control in result.controls)
        words = f"{len(result.controls) - failed} of {len(result.controls)} held"
        verdict = f'<span class="mark {"failed" if failed else "held"}">{"✗" if failed else "✓"} {words}</span>'
        rows.append(
            [
                f'<td><a href="#m{i}">{safe(result.method)}</a></td>',
                f'<td class="question">{safe(spec.question if spec else "")}</td>',
                f'<td><dl class="pairs">{pairs}</dl></td>',
                f'<td data-label="controls">{verdict}</td>',
            ]
        )
    heads = ["<th>Method</th>", "<th>Question</th>", "<th>Headline</th>", "<th>Controls</th>"]
    return f'<div class="card">{grid_html(heads, rows, "stack summary")}</div>'


def _method(result: Result, spec: Spec | None, index: int) -> str:
    parts = [f'<section class="method" id="m{index}"><p class="eyebrow">method</p><h2>{safe(result.method)}</h2>']
    if spec:
        parts.append(f'<p>{safe(spec.question)}</p><p class="soft">{_linked(spec.paper)}</p>')
    parts.append(_cards(result.headline))
    figures = "".join(_figure(panel, result, f"f{index}-{i}") for i, panel in enumerate(result.panels))
    parts.append(f'<div class="figures">{figures}</div>')
    parts.append(f"<h3>What could have refuted it</h3>{controls_html(result.controls)}")
    if result.notes:
        notes = "".join(f"<li>{safe(note)}</li>" for note in result.notes)
        parts.append(f'<div class="notes"><h3>What to doubt</h3><ul>{notes}</ul></div>')
    parts.append("<h3>Tables and origin</h3>")
    for name, table in result.tables.items():
        inner = frame_html(table, f"tables/{result.method}.{name}.parquet")
        size = f"{len(table):,} rows"
        parts.append(f'<details><summary>{safe(name)} <span class="soft">{size}</span></summary>{inner}</details>')
    manifest = json.dumps(result.manifest.to_json(), indent=2, default=str)
    lines = "\n".join(safe(line) for line in manifest.splitlines())
    parts.append(f"<details><summary>Manifest</summary><pre>{lines}</pre></details></section>")
    return "".join(parts)


def _cards(headline: Mapping[str, Any]) -> str:
    cells: list[str] = []
    for key, value in headline.items():
        text = shown(value)
        wide = " wide" if len(text) > 40 else ""
        long = " long" if len(text) > LONG else ""
        cells.append(
            f'<div class="card{wide}"><span class="value{long}">{safe(text)}</span>'
            f'<span class="name">{safe(key.replace("_", " "))}</span></div>'
        )
    return f'<div class="cards">{"".join(cells)}</div>'


def _figure(panel: Panel, result: Result, key: str) -> str:
    """One panel: the interactive figure, its picture for when scripts are off, and how to read it."""
    drawing = prepare(panel, result)
    spec = plot_spec(drawing)
    picture = base64.b64encode(static_svg(panel, result).encode("utf-8")).decode()
    left_out = f'<span class="left-out">{safe(drawing.left_out)}</span>' if drawing.left_out else ""
    wide = " wide" if len(drawing.facets) > 1 or panel.kind in ("heatmap", "graph") else ""
    return (
        f'<figure class="card{wide}"><h4>{safe(panel.title)}</h4>'
        f'<div class="plot" data-figure="{key}" role="img" aria-label="{safe(panel.title)}"></div>'
        f'<noscript><img alt="{safe(panel.title)}" src="data:image/svg+xml;base64,{picture}"></noscript>'
        f"<figcaption>{safe(panel.reading)}{left_out}</figcaption>"
        f'<script type="application/json" id="{key}">{embedded(spec)}</script></figure>'
    )


def _linked(text: str) -> str:
    """Escaped text in which https addresses are links."""
    pieces = re.split(r"(https://[^\s<>\"')\],;]+)", text)
    return "".join(
        f'<a href="{safe(piece)}" rel="noopener noreferrer">{safe(piece)}</a>' if i % 2 else safe(piece)
        for i, piece in enumerate(pieces)
    )


def _footer(run: Run, name: str) -> str:
    first = run.results[0].manifest if run.results else None
    made = ", ".join(f"{k} {v}" for k, v in first.versions.items()) if first else ""
    return (
        f"<footer><p>Run it again and compare every number: <code>interp replay runs/{safe(name or 'RUN')}</code></p>"
        f"<p>{safe(made)}</p></footer>"
    )
