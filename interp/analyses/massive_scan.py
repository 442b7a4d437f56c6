"""Where the largest residual coordinates are (a helper of `massive`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.progress import track
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel

ROWS = 8
"""Sequences per forward: bounds memory, and changes no number beyond rounding."""
TOP = 3
"""Spots kept per layer and sequence."""


@dataclass(frozen=True, kw_only=True)
class Spot:
    """One of the largest coordinates of one layer and sequence."""

    layer: int
    sequence: int
    rank: int
    """1 is the largest of its layer and sequence."""
    start: bool
    """Whether the first position took part; the scan is made with and without it."""
    pos: int
    token: str
    dim: int
    value: float
    median: float
    ratio: float
    massive: bool


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the largest activation first stands."""

    site: Site
    pos: int
    dim: int
    value: float
    """Mean over the sequences that have their largest activation here, signed."""
    ratio: float
    """Largest magnitude over the median of its layer and sequence."""
    massive: bool
    share: float
    """Share of sequences whose largest activation of that layer is at this position and dim."""


def chunks(text: TokenRecord, label: str = "") -> Iterator[tuple[int, TokenRecord]]:
    """Some rows at a time; with a label, the progress is told."""
    starts = range(0, len(text), ROWS)
    for start in track(starts, label) if label else starts:
        yield start, text.rows(slice(start, start + ROWS))


def scan(model: LoadedModel, text: TokenRecord, ratio: float, floor: float) -> list[Spot]:
    """The largest spots of every layer and sequence, with the first position and without it."""
    found: list[Spot] = []
    for begin, chunk in chunks(text, "scanning the layers"):
        with capture(model, "resid_post.*") as acts:
            model(chunk)
        for site, value in acts.items():
            for row, h in enumerate(value.detach().float().cpu()):
                real = chunk.mask[row].nonzero()[:, 0]
                for start in (True, False):
                    top, median = _top(h, real if start else real[1:])
                    for rank, (pos, dim) in enumerate(top, 1):
                        size = abs(float(h[pos, dim]))
                        times = size / median if median > 0 else 0.0
                        spot = Spot(
                            layer=site.layer or 0,
                            sequence=begin + row,
                            rank=rank,
                            start=start,
                            pos=pos,
                            token=chunk.strings[row][pos],
                            dim=dim,
                            value=float(h[pos, dim]),
                            median=median,
                            ratio=times,
                            massive=size > floor and times >= ratio,
                        )
                        found.append(spot)
    return found


def _top(h: Float[Tensor, "pos d"], real: Int[Tensor, " real"]) -> tuple[list[tuple[int, int]], float]:
    """(position, dim) of the largest coordinates at the real positions, and the median magnitude over all of these."""
    if not len(real):
        return [], 0.0
    magnitude = h[real].abs()
    order = magnitude.flatten().topk(min(TOP, magnitude.numel())).indices.tolist()
    return [(int(real[flat // h.shape[1]]), flat % h.shape[1]) for flat in order], float(magnitude.median())


def largest(spots: Sequence[Spot]) -> Place:
    """The place of the largest activation, at the first layer where it has half of its greatest size."""
    first = [spot for spot in spots if spot.rank == 1 and spot.start]
    peak = max(first, key=lambda spot: abs(spot.value))
    same = [spot for spot in first if (spot.pos, spot.dim) == (peak.pos, peak.dim)]
    sizes = {layer: np.mean([abs(s.value) for s in same if s.layer == layer]) for layer in {s.layer for s in same}}
    layer = min(layer for layer, size in sizes.items() if size >= 0.5 * max(sizes.values()))
    there = [spot for spot in same if spot.layer == layer]
    return Place(
        site=Site(Part.RESID_POST, layer),
        pos=peak.pos,
        dim=peak.dim,
        value=float(np.mean([spot.value for spot in there])),
        ratio=max(spot.ratio for spot in there),
        massive=any(spot.massive for spot in there),
        share=len(there) / sum(spot.layer == layer for spot in first),
    )
