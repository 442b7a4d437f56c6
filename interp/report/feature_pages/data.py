"""Feature pages as the small scripts that hold their data: `interpPages.part(3, {...});`.

A page opened from disk may not fetch its neighbours, but a script tag may load them, so data travels as script. What
it holds is JSON in ASCII with `<`, `>` and `&` escaped: no token can end it, whatever it contains. Characters that
cannot be printed are made visible here; numbers keep four significant digits.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from interp.dictionaries.pages.values import Example, FeaturePage, Histogram, LogitLens, Neighbour, Overview
from interp.report.html import embedded
from interp.report.prepare import visible

DIGITS = 4


class Texts:
    """Every text of a part once; pages name it by number."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self._number.setdefault(visible(text), len(self._number))

    @property
    def all(self) -> list[str]:
        return list(self._number)


def rounded(value: float | None) -> float | int | None:
    """Four significant digits; None for what is not finite, which JSON has no word for."""
    if value is None or not math.isfinite(value):
        return None
    if value == 0:
        return 0
    short = float(f"{value:.{DIGITS}g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def part_script(number: int, pages: Sequence[FeaturePage]) -> str:
    """The script of some pages."""
    texts = Texts()
    listed = [_page(page, texts) for page in pages]
    return f"interpPages.part({number}, {embedded({'texts': texts.all, 'pages': listed})});\n"


def index_script(overview: Overview, rows: Sequence[Sequence[Any]], scores: Sequence[Any], per_part: int) -> str:
    """The script of the list."""
    value = {"overview": overview_json(overview), "rows": rows, "scores": scores, "perPart": per_part}
    return f"interpPages.index({embedded(value)});\n"


def overview_json(overview: Overview) -> dict[str, Any]:
    """The overview as plain values."""
    plain = {name: getattr(overview, name) for name in Overview.__dataclass_fields__}
    shown = {name: visible(value) if isinstance(value, str) else value for name, value in plain.items()}
    notes = [visible(note) for note in overview.notes]
    chances = {name: rounded(plain[name]) for name in ("chance_similar", "chance_neurons")}
    return shown | {"notes": notes, "density": _histogram(overview.density)} | chances


def row_of(page: FeaturePage) -> list[Any]:
    """One row of the list; the order is that of `COLUMNS` in list.js."""
    lens, scores, header = page.lens, page.scores, page.header
    return [
        page.latent,
        visible(page.common.text) if page.common else "",
        rounded(scores.token_share),
        rounded(header.density),
        rounded(header.max_activation),
        visible(lens.top[0].text) if lens and lens.top else "",
        rounded(lens.hit) if lens else None,
        rounded(scores.ablation),
        rounded(scores.ablation_null),
    ]


def _page(page: FeaturePage, texts: Texts) -> dict[str, Any]:
    header, scores, near = page.header, page.scores, page.neighbours
    return {
        "latent": page.latent,
        "standIn": page.null_latent,
        "density": rounded(header.density),
        "firings": header.n_firings,
        "max": rounded(header.max_activation),
        "dead": header.dead,
        "decoderNorm": rounded(header.decoder_norm),
        "encoderNorm": rounded(header.encoder_norm),
        "cosine": rounded(header.cosine),
        "bias": rounded(header.bias),
        "histogram": _histogram(page.histogram) if page.histogram else None,
        "lens": _lens(page.lens, texts) if page.lens else None,
        "similar": _near(near.similar),
        "correlated": _near(near.correlated),
        "neurons": _near(near.neurons),
        "common": [texts(page.common.text), rounded(page.common.value)] if page.common else None,
        "shareNull": rounded(scores.token_share_null),
        "ablation": rounded(scores.ablation),
        "ablationNull": rounded(scores.ablation_null),
        "nAblated": scores.n_ablated,
        "examples": [_example(example, texts) for example in page.examples],
    }


def _histogram(histogram: Histogram) -> dict[str, Any]:
    edges = histogram.edges
    return {"low": rounded(edges[0]), "high": rounded(edges[-1]), "counts": list(histogram.counts)}


def _lens(lens: LogitLens, texts: Texts) -> dict[str, Any]:
    return {
        "top": [[texts(token.text), rounded(token.value)] for token in lens.top],
        "bottom": [[texts(token.text), rounded(token.value)] for token in lens.bottom],
        "histogram": _histogram(lens.histogram),
        "skew": rounded(lens.skew),
        "kurtosis": rounded(lens.kurtosis),
        "hit": rounded(lens.hit),
        "hitNull": rounded(lens.hit_null),
    }


def _near(found: Sequence[Neighbour]) -> list[list[Any]]:
    return [[near.name, rounded(near.value), rounded(near.null), near.latent] for near in found]


def _example(example: Example, texts: Texts) -> dict[str, Any]:
    value: dict[str, Any] = {
        "group": example.group,
        "row": example.row,
        "pos": example.pos,
        "at": example.at,
        "tokens": [texts(text) for text in example.tokens],
        "values": [rounded(v) for v in example.values],
    }
    if example.first:
        value["first"] = True
    if example.loss is not None:
        value |= {"loss": [rounded(v) for v in example.loss], "lossNull": rounded(example.loss_null)}
    return value


def plain_json(value: Any) -> str:
    """Indented JSON for people and programs."""
    return json.dumps(value, indent=2, allow_nan=False) + "\n"
