"""Observers of whole sites: statistics, and the coordinates that dwarf the rest.

Massive activations: for each coordinate of a site the value of largest magnitude, its token, and its ratio
r = |x| / median |x| over all coordinates and real tokens of its own sequence; a value is massive if |x| > floor and
r >= ratio (Sun et al. 2024, arxiv.org/abs/2402.17762, section 2: floor 100, ratio 1,000). Sequences are whole within
a batch, so ratios are exact however the input is cut. Coordinates are those of the flattened activation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from interp.core.errors import InterpError
from interp.instrument.statistics import Statistics
from interp.instrument.stream import Batch
from interp.instrument.stream_rows import Rows


class SiteStatistics:
    """`Statistics` of every site: count, mean, variance, norms, kurtosis, largest value with its token."""

    def __init__(self) -> None:
        self._found: dict[str, Statistics] = {}

    def update(self, batch: Batch, acts: Rows) -> None:
        for site in acts:
            self._add(site, Statistics.of(acts[site].cpu(), acts.tokens))

    def result(self) -> dict[str, Statistics]:
        return dict(self._found)

    def state(self) -> dict[str, Tensor]:
        return {f"{site}/{key}": value for site, found in self._found.items() for key, value in found.tensors().items()}

    def merge(self, state: Mapping[str, Tensor]) -> None:
        for site, tensors in by_site(state).items():
            self._add(site, Statistics.from_tensors(tensors))

    def clear(self) -> None:
        self._found = {}

    def _add(self, site: str, found: Statistics) -> None:
        self._found[site] = self._found[site].merge(found) if site in self._found else found


@dataclass(frozen=True, kw_only=True, eq=False)
class _Peaks:
    """Per coordinate of one site: the value of largest magnitude and where it stands; `row` is -1 before any."""

    value: Tensor
    ratio: Tensor
    row: Tensor
    pos: Tensor
    id: Tensor
    n_massive: Tensor
    """Tokens at which the coordinate was massive."""

    def merge(self, other: _Peaks) -> _Peaks:
        mine, theirs = self.value.abs(), other.value.abs()
        earlier = (self.row < other.row) | ((self.row == other.row) & (self.pos < other.pos))
        keep = (other.row < 0) | ((self.row >= 0) & ((mine > theirs) | ((mine == theirs) & earlier)))
        chosen = {
            name: torch.where(keep, getattr(self, name), getattr(other, name))
            for name in ("value", "ratio", "row", "pos", "id")
        }
        return _Peaks(**chosen, n_massive=self.n_massive + other.n_massive)


class MassiveActivations:
    """The coordinates with the largest values at each site: `result()` is a table, largest first."""

    def __init__(self, n: int = 5, *, ratio: float = 1000.0, floor: float = 100.0) -> None:
        if n < 1 or ratio <= 0 or floor < 0:
            raise InterpError(f"n={n} must be at least 1, ratio={ratio} above 0, floor={floor} not below 0")
        self.n, self.ratio, self.floor = n, ratio, floor
        self._peaks: dict[str, _Peaks] = {}

    def update(self, batch: Batch, acts: Rows) -> None:
        if len(acts) == 0:
            return
        row, pos, ids = acts.tokens
        order = in_order(acts)
        row, pos = row[order], pos[order]
        ids = torch.full_like(row, -1) if ids is None else ids[order]
        counts = torch.unique_consecutive(row, return_counts=True)[1]
        for site in acts:
            value = flattened(site, acts)[order]
            sizes = value.abs()
            median = torch.stack([part.flatten().median() for part in sizes.split(counts.tolist())])
            ratios = _ratio(sizes, median.repeat_interleave(counts)[:, None])
            at = sizes.argmax(dim=0)  # the first of equals
            here = at[None]
            found = _Peaks(
                value=value.gather(0, here)[0],
                ratio=ratios.gather(0, here)[0],
                row=row[at],
                pos=pos[at],
                id=ids[at],
                n_massive=((sizes > self.floor) & (ratios >= self.ratio)).sum(dim=0),
            )
            self._add(site, found)

    def result(self) -> pd.DataFrame:
        """Per site the `n` coordinates of largest magnitude: site, dim, value, ratio, row, pos, id, n_massive."""
        rows: list[dict[str, Any]] = []
        for site, found in self._peaks.items():
            order = found.value.abs().sort(descending=True, stable=True).indices[: self.n].tolist()
            rows += [
                {"site": site, "dim": dim}
                | {name: getattr(found, name)[dim].item() for name in _Peaks.__dataclass_fields__}
                for dim in order
            ]
        return pd.DataFrame(rows, columns=["site", "dim", *_Peaks.__dataclass_fields__])

    def state(self) -> dict[str, Tensor]:
        return {
            f"{site}/{name}": getattr(found, name)
            for site, found in self._peaks.items()
            for name in _Peaks.__dataclass_fields__
        }

    def merge(self, state: Mapping[str, Tensor]) -> None:
        for site, tensors in by_site(state).items():
            self._add(site, _Peaks(**tensors))

    def clear(self) -> None:
        self._peaks = {}

    def _add(self, site: str, found: _Peaks) -> None:
        self._peaks[site] = self._peaks[site].merge(found) if site in self._peaks else found


def _ratio(sizes: Tensor, median: Tensor) -> Tensor:
    """0 where the median is 0: of such a sequence nothing can be said."""
    return torch.where(median > 0, sizes / torch.where(median > 0, median, 1.0), 0.0)


def in_order(acts: Rows) -> Tensor:
    """Indices that put the rows of a batch in the order of row number and position."""
    return acts.tokens[0].sort(stable=True).indices  # positions of one item are in order already


def flattened(site: str, acts: Rows) -> Tensor:
    """(n, d) float32 on the cpu. Raises InterpError where a value is not finite."""
    values = acts[site]
    flat = (values.flatten(1) if values.ndim > 1 else values[:, None]).float().cpu()
    if not bool(torch.isfinite(flat).all()):
        at = int((~torch.isfinite(flat).all(dim=1)).nonzero()[0])
        raise InterpError(f"{site} is not finite at row {int(acts.tokens[0][at])}, position {int(acts.tokens[1][at])}")
    return flat


def by_site(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """`site/name` -> tensor, grouped by site."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        site, _, name = key.rpartition("/")
        found.setdefault(site, {})[name] = tensor
    return found
