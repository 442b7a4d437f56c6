"""From counts to pages: examples with their context, headers, and one `FeaturePage` per latent of a chunk."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.dictionaries.base import Dictionary
from interp.dictionaries.pages.ablation import Effects, Job
from interp.dictionaries.pages.codes_file import Block, Codes
from interp.dictionaries.pages.config import PagesConfig
from interp.dictionaries.pages.lens import Logits
from interp.dictionaries.pages.record import Totals
from interp.dictionaries.pages.tally import Tally
from interp.dictionaries.pages.values import (
    Example,
    FeaturePage,
    Header,
    Histogram,
    LogitLens,
    Neighbours,
    Scores,
    TokenScore,
)

TOP = -1
"""Group of the strongest examples."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Chunk:
    """Latents that are looked at together, with what was counted for them."""

    latents: Int[np.ndarray, " n"]
    nulls: Int[np.ndarray, " n"]
    tally: Tally
    logits: Logits | None
    cfg: PagesConfig


@dataclass(frozen=True, order=True)
class _Place:
    """Where an example stands: row (in the order of the codes), then group and rank, which fix the order shown."""

    row: int
    pos: int
    place: int
    group: int
    rank: int


def examples_of(chunk: Chunk, codes: Codes, totals: Totals) -> list[list[Example]]:
    """Per latent: the strongest examples, then those of each interval, from the strongest interval down."""
    n_intervals = chunk.cfg.n_intervals
    top, spread = chunk.tally.top.kept, chunk.tally.spread.kept
    wanted = [
        _Place(int(row), int(pos), int(place), TOP, rank)
        for rank, (place, row, pos) in enumerate(zip(top.group, top.row, top.pos, strict=True))
    ]
    wanted += [
        _Place(int(row), int(pos), int(group) // n_intervals, int(group) % n_intervals, rank)
        for rank, (group, row, pos) in enumerate(zip(spread.group, spread.row, spread.pos, strict=True))
    ]
    found: list[list[tuple[tuple[int, int], Example]]] = [[] for _ in chunk.latents]
    for row, places in groupby(sorted(wanted), key=lambda place: place.row):
        block = codes.block(row, row + 1)
        for at in places:
            order = (-1 if at.group == TOP else n_intervals - at.group, at.rank)
            found[at.place].append((order, _example(block, int(chunk.latents[at.place]), at, chunk.cfg, totals)))
    return [[example for _, example in sorted(pairs, key=lambda pair: pair[0])] for pairs in found]


def _example(block: Block, latent: int, at: _Place, cfg: PagesConfig, totals: Totals) -> Example:
    start, end = max(0, at.pos - cfg.before), min(len(block.id), at.pos + cfg.after + 1)
    values = np.zeros(len(block.id))
    mine = block.latent == latent
    values[block.token[mine]] = block.value[mine]
    ids = block.id[start:end].tolist()
    return Example(
        group=at.group,
        row=at.row,
        pos=at.pos,
        start=start,
        ids=tuple(ids),
        tokens=tuple(totals.strings.get(i, str(i)) for i in ids),
        values=tuple(values[start:end].tolist()),
        first=not bool(block.kept[: at.pos].any()),
    )


def jobs_of(chunk: Chunk, examples: Sequence[Sequence[Example]]) -> list[Job]:
    """The first of the strongest examples of each latent, those of one row together."""
    jobs: list[Job] = []
    for latent, null, found in zip(chunk.latents.tolist(), chunk.nulls.tolist(), examples, strict=True):
        strongest = [example for example in found if example.group == TOP][: chunk.cfg.n_ablated]
        for row in dict.fromkeys(example.row for example in strongest):
            windows = tuple((e.pos, e.start, e.start + len(e.ids)) for e in strongest if e.row == row)
            jobs.append(Job(latent=latent, null=null, row=row, windows=windows))
    return jobs


def headers(
    dictionary: Dictionary, features: Float[Tensor, "d_dict d_out"], latents: Int[np.ndarray, " n"], totals: Totals
) -> list[Header]:
    """What is known of each latent before any example."""
    rows = features[torch.from_numpy(latents).to(features.device)].double().cpu()
    columns, bias = _encoder(dictionary, latents)
    same_space = columns is not None and columns.shape[1] == rows.shape[1]
    cosines = (
        torch.nn.functional.cosine_similarity(rows, columns, dim=1) if columns is not None and same_space else None
    )
    return [
        Header(
            density=int(totals.firings[latent]) / totals.n_counted,
            n_firings=int(totals.firings[latent]),
            max_activation=float(totals.maximum[latent]),
            dead=not totals.firings[latent],
            decoder_norm=float(rows[i].norm()),
            encoder_norm=None if columns is None else float(columns[i].norm()),
            cosine=None if cosines is None else float(cosines[i]),
            bias=None if bias is None else float(bias[i]),
        )
        for i, latent in enumerate(latents.tolist())
    ]


def _encoder(dictionary: Dictionary, latents: Int[np.ndarray, " n"]) -> tuple[Tensor | None, Tensor | None]:
    """Encoder directions (n, d_in) in the units of the activations and biases, where the encoder is linear."""
    weight: Any = getattr(dictionary, "W_enc", None)
    if not isinstance(weight, Tensor) or weight.shape != (dictionary.d_in, dictionary.d_dict):
        return None, None
    own = torch.from_numpy(latents).to(weight.device)
    scale: Any = next((s for name in ("scale_in", "scale") if (s := getattr(dictionary, name, None)) is not None), 1.0)
    columns = weight.detach()[:, own].T.double() * (scale.double() if isinstance(scale, Tensor) else scale)
    bias: Any = next((b for name in ("b_enc", "b_gate") if (b := getattr(dictionary, name, None)) is not None), None)
    return columns.cpu(), bias.detach()[own].double().cpu() if isinstance(bias, Tensor) else None


def numbers(
    chunk: Chunk,
    tops: Sequence[Header],
    near: Sequence[Neighbours],
    examples: Sequence[Sequence[Example]],
    effects: Effects,
    strings: Mapping[int, str],
    rows: Int[np.ndarray, " row"],
) -> list[FeaturePage]:
    """Everything of the chunk put together; `rows` has the number of each row in the input."""
    tally = chunk.tally
    ids, share, share_null = tally.commonest()
    lenses = _lenses(chunk, strings)
    pages: list[FeaturePage] = []
    for i, latent in enumerate(chunk.latents.tolist()):
        known = [_with_effect(latent, example, effects) for example in examples[i]]
        losses = [e.loss[e.at] for e in known if e.loss is not None and e.loss[e.at] is not None]
        nulls = [e.loss_null for e in known if e.loss_null is not None]
        fired = not tops[i].dead
        pages.append(
            FeaturePage(
                latent=latent,
                header=tops[i],
                histogram=_histogram(chunk, i) if fired else None,
                lens=lenses[i],
                neighbours=near[i],
                examples=tuple(dataclasses.replace(e, row=int(rows[e.row])) for e in known),
                scores=Scores(
                    token_share=_known(share[i]),
                    token_share_null=_known(share_null[i]),
                    ablation=_mean(losses),
                    ablation_null=_mean(nulls),
                    n_ablated=len(losses),
                ),
                common=TokenScore(id=int(ids[i]), text=_text(strings, ids[i]), value=float(share[i]))
                if fired
                else None,
                null_latent=int(chunk.nulls[i]) if chunk.nulls[i] >= 0 else None,
            )
        )
    return pages


def _with_effect(latent: int, example: Example, effects: Effects) -> Example:
    effect = effects.get((latent, example.row, example.pos)) if example.group == TOP else None
    return example if effect is None else dataclasses.replace(example, loss=effect.loss, loss_null=effect.loss_null)


def _histogram(chunk: Chunk, i: int) -> Histogram:
    n_bins, largest = chunk.cfg.n_bins, float(chunk.tally.totals.maximum[chunk.latents[i]])
    edges = tuple(largest * b / n_bins for b in range(n_bins + 1))
    return Histogram(edges=edges, counts=tuple(chunk.tally.histogram[i].tolist()))


def _lenses(chunk: Chunk, strings: Mapping[int, str]) -> list[LogitLens | None]:
    logits = chunk.logits
    if logits is None:
        return [None] * len(chunk.latents)
    high, low = logits.ends(chunk.cfg.n_tokens_listed)
    skew, kurtosis = logits.shape()
    hit, hit_null = chunk.tally.next_hits()

    def scored(i: int, ids: Int[np.ndarray, " listed"]) -> tuple[TokenScore, ...]:
        values = logits.values[i, torch.from_numpy(ids)].tolist()
        return tuple(
            TokenScore(id=t, text=_text(strings, t), value=v) for t, v in zip(ids.tolist(), values, strict=True)
        )

    return [
        LogitLens(
            top=scored(i, high[i]),
            bottom=scored(i, low[i]),
            histogram=logits.histogram(i, chunk.cfg.n_bins),
            skew=float(skew[i]),
            kurtosis=float(kurtosis[i]),
            hit=_known(hit[i]),
            hit_null=_known(hit_null[i]),
        )
        for i in range(len(chunk.latents))
    ]


def _text(strings: Mapping[int, str], token: Any) -> str:
    return strings.get(int(token), str(int(token)))


def _known(value: Any) -> float | None:
    return float(value) if math.isfinite(value) else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
