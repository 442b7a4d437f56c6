"""The modules, known blocks and weights of one network: what is where, before any site is named.

Weights are handed out in `x @ W` orientation, as views. A layer that holds a block of a known kind in place of its
family's own module has that block's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor, nn

from interp.core.errors import SiteError, unknown
from interp.models.family import Block, Chunk, Dims, Family, Weight, block_of
from interp.models.views import pieces


@dataclass(frozen=True)
class Layout:
    """A network, its family and its sizes."""

    module: nn.Module
    family: Family | None
    dims: Dims = field(default_factory=Dims)

    @property
    def name(self) -> str:
        return self.family.name if self.family else "generic"

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """By path; hook points of TransformerLens also by the names that it gives them."""
        hooks = getattr(self.module, "hook_dict", None)
        named = {str(name): hook for name, hook in hooks.items()} if isinstance(hooks, Mapping) else {}
        return {path: module for path, module in self.module.named_modules() if path} | named

    def at(self, path: str) -> nn.Module:
        """The module that is at a path now, as `get_submodule` finds it, in fewer steps."""
        module: nn.Module | None = self.module
        for name in path.split(".") if path else ():
            module = module._modules.get(name) if module is not None else None  # pyright: ignore[reportPrivateUsage]
        return self.module.get_submodule(path) if module is None else module

    @cached_property
    def _first_paths(self) -> dict[int, str]:
        return {id(module): path for path, module in reversed(self.modules.items())}

    def canonical(self, path: str) -> str:
        """One path for a module that has several."""
        return self._first_paths[id(self.modules[path])] if path in self.modules else path

    @cached_property
    def blocks(self) -> dict[str, Block]:
        """Modules of a known kind, by path; those that are run twice (backwards, say) also as `path@branch`."""
        found: dict[str, Block] = {}
        for path, module in {"": self.module, **self.modules}.items():
            block = block_of(module)
            if block is not None:
                found[path] = block
                found |= {f"{path}@{name}": block for name in (block.branches(module) if block.branches else ())}
        return found

    def _module(self, path: str) -> nn.Module:
        """The module of a path with or without `@branch`; the empty path is the network itself."""
        return self.module.get_submodule(path.partition("@")[0])

    def _blocks_of(self, layer: int | None) -> list[tuple[str, Block]]:
        """Modules of a known kind inside a layer."""
        if self.family is None or layer is None:
            return []
        within = f"{self.family.blocks}.{layer}."
        found = [(path, block) for path, block in self.blocks.items() if path.startswith(within)]
        return [(path, block) for path, block in found if "@" not in path and block.layers is None]

    def _chunk(self, chunk: Chunk | None) -> Chunk | None:
        """Names of sizes become numbers."""
        if chunk is None or isinstance(chunk[1], int):
            return chunk
        sizes = [self.dims.size(share) if isinstance(share, str) else share for share in chunk[1]]
        if None in sizes:
            raise SiteError(f"{self.name} is split by {chunk[1]}, of which this model has no size")
        return chunk[0], tuple(size for size in sizes if size is not None)

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """A weight in `x @ W` orientation; `W_O` as (head, d_head, d_model), those of experts as (expert, d_in, d_out).

        A view, not a copy.
        """
        spec = self._weight(name, layer)
        tensor = self.module.get_parameter(spec.path.format(layer=layer))
        tensor = self._piece(spec, tensor.mT if spec.transpose else tensor)
        if spec.heads:
            n_heads = getattr(self.dims, spec.heads)
            tensor = tensor.unflatten(0, (n_heads, tensor.shape[0] // n_heads))
        return tensor

    def has_weight(self, name: str, layer: int | None = None) -> bool:
        """Whether this layer (or the model) has the weight."""
        return self._found_weight(name, layer) is not None

    def first_weight(self, name: str) -> Tensor | None:
        """The weight of the first layer that has it."""
        layers = (layer for layer in range(self.dims.n_layers or 0) if self.has_weight(name, layer))
        return next((self.weight(name, layer) for layer in layers), None)

    def _found_weight(self, name: str, layer: int | None) -> Weight | None:
        specs = self.family.weights.get(name, ()) if self.family else ()
        for spec in (specs,) if isinstance(specs, Weight) else specs:
            if self._parameter(spec.path.format(layer=layer)) is not None:
                return spec
        blocks = self._blocks_of(layer) if specs else []
        found = [(path, block.weights[name]) for path, block in blocks if name in block.weights]
        return replace(found[0][1], path=join(found[0][0], found[0][1].path)) if len(found) == 1 else None

    def _weight(self, name: str, layer: int | None) -> Weight:
        weights = self.family.weights if self.family else {}
        if name not in weights:
            raise unknown("weight", name, weights)
        found = self._found_weight(name, layer)
        if found is None:
            have = [i for i in range(self.dims.n_layers or 0) if self.has_weight(name, i)]
            raise SiteError(f"{name} needs a layer that has it, got {layer}; these have: {spans(have)}")
        return found

    def _parameter(self, path: str) -> Tensor | None:
        try:
            return self.module.get_parameter(path)
        except AttributeError:  # torch's way to say that there is none
            return None

    def bias(self, name: str, layer: int | None = None) -> Tensor | None:
        """The bias that goes with a weight; `None` where there is none."""
        spec = self._weight(name, layer)
        path = (spec.bias or spec.path).format(layer=layer)
        if not spec.bias:
            path = f"{path.removesuffix('.weight')}.bias" if path.endswith(".weight") else path.replace("W_", "b_")
        bias = self._parameter(path) if spec.bias or path != spec.path.format(layer=layer) else None
        return None if bias is None else self._piece(spec, bias)

    def _piece(self, spec: Weight, tensor: Tensor) -> Tensor:
        """The columns of a weight that is part of a fused one."""
        chunk = self._chunk(spec.chunk)
        if chunk is None:
            return tensor
        if spec.interleaved and isinstance(chunk[1], int):
            return tensor[..., chunk[0] :: chunk[1]]
        return pieces(chunk, tensor)[chunk[0]]


def join(path: str, inner: str) -> str:
    """A path inside a module; either may be empty."""
    return ".".join(filter(None, (path, inner)))


def spans(layers: list[int]) -> str:
    """`0-3, 5` for [0, 1, 2, 3, 5]."""
    found: list[list[int]] = []
    for layer in layers:
        if found and layer == found[-1][1] + 1:
            found[-1][1] = layer
        else:
            found.append([layer, layer])
    return ", ".join(f"{a}-{b}" if a < b else f"{a}" for a, b in found) or "none"
