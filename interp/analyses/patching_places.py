"""Which activations are patched, and in what order they are listed (part of `patching`).

A selection is written

    KIND[.LAYERS][@WHERE][#UNIT][~WINDOW]       mlp_out   z.20-29@END   neurons.17@S2#each   mlp_out~5

`WHERE`: `each` position on its own, `all` together, a role such as `S2` (its position may differ from pair to pair), or
a number. `UNIT`: `each` head on its own, `all` together, or a number; units are heads of z, q and pattern, key-value
heads of k and v (a group of query heads shares one), experts of the router, and neurons of gate_pre, gate, up, neurons.
`WINDOW`: so many neighbouring layers together, fewer at the ends of the network.
Left out, heads are patched one by one at all positions, everything else whole at each position.
A `Grid` is what a selection stands for in one model: layers x indices, every cell a `Place`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from jaxtyping import Int
from torch import Tensor

from interp.core.errors import InterpError, unknown
from interp.core.sites import Site, expand
from interp.core.vocabulary import PARTS, Part
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs

DEFAULT = ("resid_post", "attn_out", "mlp_out", "z")
HEADS = ("head", "kv_head")
STREAM = (Part.RESID_PRE, Part.RESID_MID, Part.RESID_POST)
_FORM = re.compile(r"(?P<kind>\w+)(\.(?P<layers>[^@#~]+))?(@(?P<where>[^@#~]+))?(#(?P<unit>\w+))?(~(?P<window>\d+))?")


@dataclass(frozen=True)
class Place:
    """What one patch replaces."""

    sites: tuple[Site, ...]
    """In the order of the layers; several make a window."""
    at: int | tuple[int, ...] | None
    """A position, one for each pair, or all of them."""
    unit: int | None
    """A head, key-value head, expert or neuron; all of them if not said."""

    @property
    def layer(self) -> int:
        """Where the patched run leaves the base run."""
        return self.sites[0].layer or 0

    def position(self, pair: int) -> int | None:
        return self.at[pair] if isinstance(self.at, tuple) else self.at


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Layers x indices of one selection."""

    name: str
    """The selection, as written."""
    part: Part
    layers: tuple[int, ...]
    window: int
    at: tuple[int | tuple[int, ...] | None, ...]
    """For every index."""
    units: tuple[int | None, ...]
    labels: tuple[str, ...]
    """Of the indices, short: `3`, `9 S2`."""
    heads: bool
    """Whether the indices count heads or other units, not positions."""
    noun: str
    """What an index is: `head`, `position`, ..."""
    spot: str = ""
    """Where all the indices are, if at one place: `@END`."""

    @cached_property
    def places(self) -> tuple[tuple[Place, ...], ...]:
        """By layer and index."""
        return tuple(
            tuple(Place(self._sites(layer), at, unit) for at, unit in zip(self.at, self.units, strict=True))
            for layer in self.layers
        )

    def _sites(self, layer: int) -> tuple[Site, ...]:
        first = layer - self.window // 2
        return tuple(Site(self.part, near) for near in range(first, first + self.window) if near in self.layers)

    @property
    def singles(self) -> str:
        """The same selection without its window."""
        return self.name.partition("~")[0]

    @property
    def stream(self) -> bool:
        """Whether it cuts the residual stream, whose effects are 1 at the ends by construction."""
        return self.part in STREAM

    def cell(self, layer: int, index: int) -> str:
        """A cell as a reader knows it; `layer` counts the grid's own."""
        name = f"{self.part}.{self.layers[layer]}{self.spot}" + (f"~{self.window}" if self.window > 1 else "")
        return f"{name} {self.noun} {self.labels[index]}".strip()


def sites_of(grids: Sequence[Grid]) -> list[Site]:
    """Every site the grids touch, once."""
    return list(dict.fromkeys(Site(grid.part, layer) for grid in grids for layer in grid.layers))


def make_grids(model: LoadedModel, pairs: PromptPairs, selections: Sequence[str]) -> list[Grid]:
    """What the selections stand for; beside each window the same selection layer by layer."""
    if not selections:
        raise InterpError(f"no sites to patch; give kinds such as {', '.join(DEFAULT)}")
    grids: dict[str, Grid] = {}
    for text in selections:
        grid = make_grid(model, pairs, text)
        if grid.window > 1:
            grids.setdefault(grid.singles, make_grid(model, pairs, grid.singles))
        grids[text] = grid
    return list(grids.values())


def make_grid(model: LoadedModel, pairs: PromptPairs, text: str) -> Grid:
    """One selection. Raises InterpError with the nearest kinds, roles or numbers."""
    found = _FORM.fullmatch(text)
    if found is None:
        raise InterpError(f"{text!r} is no selection; write KIND[.LAYERS][@WHERE][#UNIT][~WINDOW], e.g. z.5-9@END")
    part = _part(model, found["kind"])
    layers = _layers(model, part, found["layers"])
    axes = model.table.axes(Site(part, layers[0]))
    names = [axis for axis in axes if axis not in ("batch", "pos", "query", "key")]
    has_heads = bool(set(HEADS) & set(axes))
    size = model.dims.size(names[0]) if names else None
    unit = found["unit"] or ("each" if has_heads else "all")
    units = _units(text, unit, size, names[0] if names else "unit")
    each_unit = unit != "all"
    at, labels = _where(pairs, found["where"] or ("all" if each_unit else "each"), text)
    spot = f"@{found['where']}" if each_unit and len(at) == 1 and labels[0] else ""
    labels = [""] if spot else labels
    window = int(found["window"] or 1)
    if not 1 <= window <= len(layers):
        raise InterpError(f"{text!r}: a window has 1 to {len(layers)} layers")
    unit_labels = [f"{number}" for number in units] if each_unit else [""]
    both = [(a, u, f"{one}, {two}" if one and two else one or two)
            for a, one in zip(at, labels, strict=True) for u, two in zip(units, unit_labels, strict=True)]  # fmt: skip
    noun = "position" if any(labels) else ""
    if each_unit:
        noun = {"d_mlp": "neuron", "kv_head": "group", "d_model": "coordinate"}.get(names[0], names[0])
    return Grid(
        name=text, part=part, layers=layers, window=window, heads=each_unit, noun=noun, spot=spot,
        at=tuple(a for a, _, _ in both), units=tuple(u for _, u, _ in both), labels=tuple(label for *_, label in both),
    )  # fmt: skip


def _part(model: LoadedModel, kind: str) -> Part:
    """A kind of site that this model has in its blocks, that can be edited and that knows positions."""
    usable: list[str] = []
    for part in dict.fromkeys(site.part for site in model.sites() if site.layer is not None and site.path is None):
        axes = set(PARTS[part].axes)
        site = next(site for site in model.sites() if site.part is part)
        if "batch" in axes and axes & {"pos", "query"} and not model.table.reach(site).instead:
            usable.append(part.value)
    if kind not in usable:
        raise unknown("kind of site", kind, usable)
    return Part(kind)


def _layers(model: LoadedModel, part: Part, text: str | None) -> tuple[int, ...]:
    known = [site.layer for site in model.sites() if site.part is part and site.path is None and site.layer is not None]
    if text is None or text == "*":
        return tuple(known)
    asked = [name.rpartition(".")[2] for piece in text.split(",") for name in expand(f"{part}.{piece.strip()}")]
    for layer in asked:
        if not layer.isdigit() or int(layer) not in known:
            raise InterpError(f"{part} has no layer {layer}; its layers are {known[0]} to {known[-1]}")
    return tuple(sorted({int(layer) for layer in asked}))


def _units(text: str, unit: str, size: int | None, noun: str) -> list[int | None]:
    if unit == "all":
        return [None]
    if unit == "each" and size is not None:
        return list(range(size))
    if unit.isdigit() and (size is None or int(unit) < size):
        return [int(unit)]
    last = "its last" if size is None else size - 1
    raise InterpError(f"{text!r}: #{unit} is no {noun}; write #each, #all or a number from 0 to {last}")


def _where(pairs: PromptPairs, where: str, text: str) -> tuple[list[int | tuple[int, ...] | None], list[str]]:
    """Positions and their labels."""
    if where == "all":
        return [None], [""]
    if where == "each":
        return list(range(pairs.n_pos)), [pairs.label(pos) for pos in range(pairs.n_pos)]
    if where in pairs.roles:
        places: Int[Tensor, " pair"] = pairs.roles[where]
        return [tuple(places.tolist())], [where]
    if where.lstrip("-").isdigit() and -pairs.n_pos <= int(where) < pairs.n_pos:
        return [int(where) % pairs.n_pos], [pairs.label(int(where) % pairs.n_pos)]
    raise unknown(f"place in {text!r}", where, ["each", "all", *pairs.roles, f"0 to {pairs.n_pos - 1}"])
