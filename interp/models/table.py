"""Family tables: a `Family` bound to one module.

The table lists the sites, resolves names and patterns, and turns a site into a place to hook. A network of no known
family gets a table whose sites are its module paths, and those of the blocks it contains. Modules, blocks and weights
come from `layout`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import cast

from torch import nn

from interp.core.errors import SiteError, unknown
from interp.core.sites import PARTS, Part, Site, expand, is_glob, matches
from interp.models.family import Reach, Side
from interp.models.layout import Layout, join, spans


@dataclass(frozen=True)
class FamilyTable(Layout):
    """The sites of one model, and how each is reached."""

    @cached_property
    def sites(self) -> tuple[Site, ...]:
        """Every site, in the order in which the model computes them; module paths where no family is known."""
        if self.family is None:
            return (*self.block_sites, *(Site(Part.MODULE, path=path) for path in self.modules))
        parts = [part for part in PARTS if part in self.family.parts]
        alone = [Site(part) for part in parts if not PARTS[part].per_layer and self._found(part, None)]
        layers = [
            Site(part, layer)
            for layer in range(self.dims.n_layers or 0)
            for part in parts
            if PARTS[part].per_layer and self._found(part, layer)
        ]
        first = [site for site in alone if site.part is Part.EMBED]
        return (*first, *layers, *self.block_sites, *(site for site in alone if site.part is not Part.EMBED))

    @cached_property
    def block_sites(self) -> tuple[Site, ...]:
        """`path:part`, or `path:part.layer` for stacked recurrent layers."""
        return tuple(
            Site(part, layer, path=path)
            for path, block in self.blocks.items()
            for layer in (range(block.layers(self._module(path))) if block.layers else (None,))
            for part in PARTS
            if part in block.parts
        )

    def _found(self, part: Part, layer: int | None) -> Reach | None:
        """The reach of a part at a layer, paths filled in; `None` if this layer has no such thing."""
        reaches = self.family.parts.get(part, ()) if self.family else ()
        for reach in (reaches,) if isinstance(reaches, Reach) else reaches:
            path = reach.path.format(layer=layer)
            needed = [path, *([reach.needs.format(layer=layer)] if reach.needs else [])]
            if all(other in self.modules or not other for other in needed):
                carry = reach.carry.format(layer=layer) if reach.carry else None
                folded = self.dims.size(reach.folded) if isinstance(reach.folded, str) else reach.folded
                return replace(reach, path=path, carry=carry, chunk=self._chunk(reach.chunk), folded=folded)
        return self._of_block(part, layer) if reaches else None

    def _of_block(self, part: Part, layer: int | None) -> Reach | None:
        """A part that the layer has in a module of a known kind instead: a user's own MLP in a known architecture."""
        offered = [(path, block.parts[part]) for path, block in self._blocks_of(layer) if part in block.parts]
        if len(offered) != 1:
            return None
        path, reach = offered[0]
        return replace(reach, path=join(path, reach.path))

    @cached_property
    def names(self) -> dict[str, Site]:
        """Every accepted name, canonical ones first."""
        known = {str(site): site for site in self.sites}
        for site in self.sites:
            for alias in site.aliases:
                # A model's own hook point of this name wins where it holds something else, e.g. queries before a norm.
                if alias not in self.modules or self.canonical(alias) == self.canonical(self.reach(site).path):
                    known.setdefault(alias, site)
        return known

    def resolve(self, wanted: str | Site | Iterable[str | Site]) -> list[Site]:
        """Sites from names, aliases, module paths and patterns, without repeats, in the order asked for."""
        asked = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]
        for item in asked:
            if not isinstance(cast(object, item), str | Site):
                raise SiteError(f"{item!r} is no site; name one, e.g. {next(iter(self.names), 'a module path')}")
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
        if text not in self._parsed:
            self._parsed[text] = [site for name in expand(text.strip()) for site in self._lookup(name)]
        return self._parsed[text]

    @cached_property
    def _parsed(self) -> dict[str, list[Site]]:
        return {}

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
        known = [site for key, site in self.names.items() if key.rpartition(".")[0] == stem]
        if layer.isdigit() and any(site.layer is not None for site in known):
            have = spans([site.layer for site in known if site.layer is not None])
            raise SiteError(f"no layer {layer} in {name!r}: layers with {stem}: {have}")
        raise unknown("site", name, [*self.names, *self.modules], error=SiteError)

    def reach(self, site: Site) -> Reach:
        """Where to hook: the module path with the layer filled in."""
        found = self._reached.get(site)
        if found is None:
            found = self._reached[site] = self._reach(site)
        return found

    @cached_property
    def _reached(self) -> dict[Site, Reach]:
        return {}

    def _reach(self, site: Site) -> Reach:
        if site.path is not None:
            return self._reach_path(site, site.path)
        if site.layer is not None and not 0 <= site.layer < (self.dims.n_layers or 0):
            if self.family and site.part in self.family.parts:
                raise SiteError(
                    f"no layer {site.layer} in {site}: this model has layers 0 to {(self.dims.n_layers or 1) - 1}"
                )
            raise unknown("site", str(site), self.names or self.modules, error=SiteError)
        found = self._found(site.part, site.layer)
        if found is None:
            have = [layer for layer in range(self.dims.n_layers or 0) if self._found(site.part, layer)]
            if have:
                raise SiteError(f"no {site}: layers with {site.part}: {spans(have)}")
            raise unknown("site", str(site), self.names or self.modules, error=SiteError)
        return found

    def _reach_path(self, site: Site, path: str) -> Reach:
        if site.part is not Part.MODULE:
            if site not in self.block_sites:
                raise unknown("site", str(site), self.names, error=SiteError)
            reach, path = self.blocks[path].parts[site.part], path.partition("@")[0]
            nth = reach.nth + reach.stride * (site.layer or 0)
            return replace(reach, path=join(path, reach.path), nth=nth)
        side: Side = "input" if path.endswith("@input") else "output"
        path = path.removesuffix("@input")
        if path not in self.modules:
            raise unknown("module", path, self.modules, error=SiteError)
        return Reach(path=path, side=side)

    def n_split(self, reach: Reach) -> int | None:
        """How many heads the last axis is split into."""
        return getattr(self.dims, reach.heads) if reach.heads else None

    def axes(self, site: Site) -> tuple[str, ...]:
        """Axis names of a site in this model."""
        return self.reach(site).axes or site.info.axes

    def part_module(self, site: Site) -> nn.Module:
        """The module a rule of this site's family or block gets: the layer, or the block itself."""
        if site.path is not None:
            return self._module(site.path)
        if self.family is None or site.layer is None:
            return self.module
        return self.modules[f"{self.family.blocks}.{site.layer}"]
