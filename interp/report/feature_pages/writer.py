"""Feature pages to a folder: whole or not at all.

    index.html, assets/*            the page, its style and its scripts
    data/index.js, data/p00000.js   the list, and the pages in parts of 20
    pages.json                      the overview, for programs; marks the folder as one of ours

Pages come from an iterator and go to disk part by part; of each only its row of the list stays in memory. Everything
is written to a folder beside the target, which takes the target's name at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import uuid
from collections.abc import Generator, Iterable, Iterator, Sequence
from importlib import resources
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from interp.core.controls import bootstrap_interval
from interp.core.errors import ArtefactError
from interp.dictionaries.pages.values import FeaturePage, Overview
from interp.report.feature_pages.data import index_script, overview_json, part_script, plain_json, rounded, row_of
from interp.report.tables import safe

PER_PART = 20
"""Latents per data file: about half a megabyte."""
MARK = "pages.json"
SCRIPTS = ("registry.js", "dom.js", "charts.js", "examples.js", "latent.js", "list.js", "app.js")
SCORES = ("token_share", "lens_hit", "ablation")


def write_pages(folder: Path, overview: Overview, pages: Iterable[FeaturePage], *, per_part: int = PER_PART) -> Path:
    """Write the folder; returns the path of its index.html. An older folder of pages is replaced."""
    check_target(folder)
    try:
        with replacing(folder) as draft:
            _fill(draft, overview, iter(pages), per_part)
    except OSError as error:
        raise ArtefactError(f"could not write {folder}: {error.strerror or error}; free space or check it") from error
    return folder / "index.html"


def check_target(folder: Path) -> None:
    """Refuse a folder that holds something else: said before the work, not after it."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ArtefactError(f"{folder} is not a folder; choose another place for the pages")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARK).is_file():
        raise ArtefactError(f"{folder} is not empty and holds no feature pages; choose another folder")


@contextlib.contextmanager
def replacing(folder: Path) -> Generator[Path, None, None]:
    """An empty folder that becomes `folder` at the end; if anything fails, `folder` stays as it was."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft, old = (folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}" for _ in range(2))
    try:
        draft.mkdir()
        yield draft
        if folder.exists():
            os.replace(folder, old)
        try:
            os.replace(draft, folder)
        except OSError:
            if old.exists():
                os.replace(old, folder)
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _fill(draft: Path, overview: Overview, pages: Iterator[FeaturePage], per_part: int) -> None:
    (draft / "data").mkdir()
    (draft / "assets").mkdir()
    rows: list[list[Any]] = []
    pairs: dict[str, list[tuple[float, float]]] = {name: [] for name in SCORES}
    number = 0
    while part := list(islice(pages, per_part)):
        (draft / "data" / f"p{number:05d}.js").write_text(part_script(number, part), encoding="ascii")
        rows += [row_of(page) for page in part]
        for page in part:
            _note(page, pairs)
        number += 1
    scores = [_score(name, pairs[name]) for name in SCORES]
    (draft / "data" / "index.js").write_text(index_script(overview, rows, scores, per_part), encoding="ascii")
    (draft / "assets" / "pages.css").write_text(
        _asset("interp.report", "report.css") + _asset("interp.report.feature_pages", "pages.css"), encoding="utf-8"
    )
    for name in SCRIPTS:
        (draft / "assets" / name).write_text(_asset("interp.report.feature_pages", name), encoding="utf-8")
    (draft / "index.html").write_text(_html(overview), encoding="utf-8")
    facts = overview_json(overview) | {"scores": scores, "format": "interp feature pages", "version": 1}
    (draft / MARK).write_text(plain_json(facts), encoding="utf-8")


def _asset(package: str, name: str) -> str:
    return (resources.files(package) / "assets" / name).read_text(encoding="utf-8")


def _note(page: FeaturePage, pairs: dict[str, list[tuple[float, float]]]) -> None:
    """Remember each score of a page that has its null."""
    lens, scores = page.lens, page.scores
    found = {
        "token_share": (scores.token_share, scores.token_share_null),
        "lens_hit": (lens.hit, lens.hit_null) if lens else (None, None),
        "ablation": (scores.ablation, scores.ablation_null),
    }
    for name, (value, null) in found.items():
        if value is not None and null is not None:
            pairs[name].append((value, null))


def _score(name: str, pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Means over latents, and the interval of their difference over latents."""
    interval = bootstrap_interval([value - null for value, null in pairs]) if len(pairs) > 1 else None
    return {
        "name": name,
        "n": len(pairs),
        "mean": rounded(fmean(value for value, _ in pairs)) if pairs else None,
        "null": rounded(fmean(null for _, null in pairs)) if pairs else None,
        "difference": rounded(interval.estimate) if interval else None,
        "low": rounded(interval.low) if interval else None,
        "high": rounded(interval.high) if interval else None,
    }


def _html(overview: Overview) -> str:
    """The page without its data: scripts fill it. Nothing may be loaded but the files of this folder."""
    title = f"Features of {overview.dictionary} at {overview.site}, {overview.model}"
    policy = (
        "default-src 'none'; script-src 'self' file:; style-src 'self' file:; img-src data:; connect-src 'none'; "
        "base-uri 'none'; form-action 'none'"
    )
    scripts = "".join(f'<script src="assets/{name}" defer></script>\n' for name in SCRIPTS)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n<link rel="icon" href="data:,">\n'
        f'<title>{safe(title)}</title>\n<link rel="stylesheet" href="assets/pages.css">\n{scripts}'
        '<script src="data/index.js" defer></script>\n</head>\n<body>\n'
        '<a class="skip" href="#main">Skip to the content</a>\n'
        f'<header><p class="eyebrow">interp features</p><h1>{safe(overview.site)} of {safe(overview.model)}</h1>'
        '<ul class="facts" id="facts"></ul></header>\n<main id="main" tabindex="-1">'
        "<noscript><p>These pages are drawn by the scripts in this folder; please allow scripts for this file. "
        "The overview is also in <code>pages.json</code>.</p></noscript></main>\n"
        '<div id="readout" class="readout" role="status" aria-live="polite" hidden></div>\n'
        "<footer><p>Keys: <kbd>/</kbd> search, <kbd>n</kbd> and <kbd>p</kbd> next and previous latent, "
        "<kbd>Esc</kbd> back to the list; inside an example <kbd>←</kbd> and <kbd>→</kbd> move from token to token."
        "</p></footer>\n</body>\n</html>\n"
    )
