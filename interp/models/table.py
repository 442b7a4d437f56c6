"""Family tables: an architecture is data, not code.

A `Family` says, for each part of the vocabulary, which module holds it and on which side (`Reach`), and where the
weights are (`Weight`). A `FamilyTable` binds a family to one module: it lists the sites, resolves names and patterns,
and turns a site into a place to hook. A network of no known family gets a table whose sites are its module paths.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from interp.core.errors import SiteError, unknown
from interp.core.sites import PARTS, Part, Site, expand, is_glob, matches

Side = Literal["input", "output", "attention"]


@dataclass(frozen=True, kw_only=True)
class Reach:
    """Where one part lives: a module's input or output, or the inside of its attention function."""

    path: str
    """Module path; `{layer}` stands for the block's number."""
    side: Side = "output"
    heads: Literal["n_heads", "n_kv_heads"] | None = None
    """The last axis is split into this many heads."""
    head_major: bool = False
    """The module holds (batch, head, pos, d_head); the site is (batch, pos, head, d_head)."""
    chunk: tuple[int, int] | None = None
    """The part is chunk i of n of the last axis, as (i, n)."""
    carry: str | None = None
    """Module whose output also takes the change: a skip connection saved the tensor before this module ran."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A weight in `x @ W` orientation: which parameter, and how to turn it."""

    path: str
    transpose: bool = True
    heads: Literal["n_heads", "n_kv_heads"] | None = None
    """W_O only: split its input axis into (head, d_head)."""
    chunk: tuple[int, int] | None = None
    """Chunk i of n of the output axis."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """One architecture."""

    name: str
    model_types: tuple[str, ...]
    """`config.model_type` values this table is for."""
    blocks: str
    """Path of the list of blocks."""
    parts: Mapping[Part, Reach]
    weights: Mapping[str, Weight]
    act: str | None = None
    """Path of the MLP's non-linearity."""
    down: str | None = None
    """Path of the projection that reads `neurons`."""
    out: str | None = None
    """Path of the projection that reads `z`."""
    after_attn: str | None = None
    after_mlp: str | None = None
    """Norms between a sublayer's projection and the stream (Gemma)."""


@dataclass(frozen=True, kw_only=True)
class Dims:
    """Sizes read from real tensors; `None` where the network has no such thing."""

    n_layers: int | None = None
    d_model: int | None = None
    n_heads: int | None = None
    n_kv_heads: int | None = None
    d_head: int | None = None
    d_mlp: int | None = None
    d_vocab: int | None = None
    n_ctx: int | None = None

    def size(self, axis: str) -> int | None:
        """Size of a named axis; `None` if it depends on the input."""
        names = {"head": "n_heads", "kv_head": "n_kv_heads"}
        return getattr(self, names.get(axis, axis), None)


@dataclass(frozen=True)
class FamilyTable:
    """The sites of one model, and how each is reached."""

    module: nn.Module
    family: Family | None
    dims: Dims = field(default_factory=Dims)

    @property
    def name(self) -> str:
        return self.family.name if self.family else "generic"

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        return {path: module for path, module in self.module.named_modules() if path}

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site, in the order in which the model computes them."""
        if self.family is None:
            return tuple(Site(Part.MODULE, path=path) for path in self.modules)
        first = [Site(part) for part in (Part.EMBED,) if part in self.family.parts]
        last = [Site(part) for part in (Part.FINAL_NORM, Part.LOGITS) if part in self.family.parts]
        block = [part for part in PARTS if PARTS[part].per_layer and part in self.family.parts]
        return (*first, *(Site(part, layer) for layer in range(self.dims.n_layers or 0) for part in block), *last)

    @cached_property
    def names(self) -> dict[str, Site]:
        """Every accepted name, canonical ones first."""
        known = {str(site): site for site in self.sites}
        for site in self.sites:
            for alias in site.aliases:
                known.setdefault(alias, site)
        return known

    def resolve(self, wanted: str | Site | Iterable[str | Site]) -> list[Site]:
        """Sites from names, aliases, module paths and patterns, without repeats, in the order asked for."""
        asked = [wanted] if isinstance(wanted, str | Site) else list(wanted)
        found = [site for item in asked for site in ([item] if isinstance(item, Site) else self._parse(item))]
        for site in found:
            self.reach(site)
        return list(dict.fromkeys(found))

    def one(self, wanted: str | Site) -> Site:
        """Exactly one site."""
        found = self.resolve(wanted)
        if len(found) != 1:
            raise SiteError(f"{wanted!r} stands for {len(found)} sites; name one, e.g. {found[0]}")
        return found[0]

    def _parse(self, text: str) -> list[Site]:
        return [site for name in expand(text.strip()) for site in self._lookup(name)]

    def _lookup(self, name: str) -> list[Site]:
        if name in self.names:
            return [self.names[name]]
        if is_glob(name):
            found = [site for key, site in self.names.items() if matches(key, name)]
            found += [Site(Part.MODULE, path=path) for path in self.modules if not found and matches(path, name)]
            if found:
                return list(dict.fromkeys(found))
        if name.removesuffix("@input") in self.modules:
            return [Site(Part.MODULE, path=name)]
        stem, _, layer = name.rpartition(".")
        if layer.isdigit() and f"{stem}.0" in self.names:
            raise SiteError(f"no layer {layer} in {name!r}: this model has layers 0 to {(self.dims.n_layers or 1) - 1}")
        raise unknown("site", name, [*self.names, *self.modules], error=SiteError)

    def reach(self, site: Site) -> Reach:
        """Where to hook: the module path with the layer filled in."""
        if site.path is not None:
            path = site.path.removesuffix("@input")
            if path not in self.modules:
                raise unknown("module", path, self.modules, error=SiteError)
            return Reach(path=path, side="input" if site.path.endswith("@input") else "output")
        if self.family is None or site.part not in self.family.parts:
            raise unknown("site", str(site), self.names or self.modules, error=SiteError)
        if site.layer is not None and not 0 <= site.layer < (self.dims.n_layers or 0):
            raise SiteError(
                f"no layer {site.layer} in {site}: this model has layers 0 to {(self.dims.n_layers or 1) - 1}"
            )
        template = self.family.parts[site.part]
        carry = template.carry.format(layer=site.layer) if template.carry else None
        return replace(template, path=template.path.format(layer=site.layer), carry=carry)

    def n_split(self, reach: Reach) -> int | None:
        """How many heads the last axis is split into."""
        return getattr(self.dims, reach.heads) if reach.heads else None

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """A weight in `x @ W` orientation; `W_O` as (head, d_head, d_model). A view, not a copy."""
        weights = self.family.weights if self.family else {}
        if name not in weights:
            raise unknown("weight", name, weights)
        spec = weights[name]
        if "{layer}" in spec.path and (layer is None or not 0 <= layer < (self.dims.n_layers or 0)):
            raise SiteError(f"{name} needs a layer from 0 to {(self.dims.n_layers or 1) - 1}, got {layer}")
        tensor = self.module.get_parameter(spec.path.format(layer=layer))
        tensor = tensor.T if spec.transpose else tensor
        if spec.chunk:
            tensor = tensor.chunk(spec.chunk[1], dim=-1)[spec.chunk[0]]
        if spec.heads:
            n_heads = getattr(self.dims, spec.heads)
            tensor = tensor.unflatten(0, (n_heads, tensor.shape[0] // n_heads))
        return tensor

    def bias(self, name: str, layer: int | None = None) -> Tensor | None:
        """The bias that goes with a weight; `None` where there is none."""
        spec = self.family.weights[name] if self.family else None
        path = spec.path.format(layer=layer) if spec else ""
        path = f"{path.removesuffix('.weight')}.bias" if path.endswith(".weight") else path.replace("W_", "b_")
        bias = dict(self.module.named_parameters()).get(path)
        if bias is None or spec is None or not spec.chunk:
            return bias
        return bias.chunk(spec.chunk[1], dim=-1)[spec.chunk[0]]
