"""One short file per architecture, found by scanning this folder: each ends with a constant `FAMILY`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from operator import attrgetter

from torch import nn

from interp.core.sites import Part
from interp.models.family import Dims, Family, Reach, block_of
from interp.models.table import FamilyTable

INSIDE_MLP = frozenset({Part.GATE_PRE, Part.GATE, Part.UP, Part.NEURONS_PRE, Part.NEURONS})


@cache
def families() -> dict[str, Family]:
    """Every family, by the `model_type` it serves."""
    found: dict[str, Family] = {}
    for info in pkgutil.iter_modules(__path__):
        family: Family = importlib.import_module(f"{__name__}.{info.name}").FAMILY
        found |= dict.fromkeys(family.model_types, family)
    return found


def kind(module: nn.Module) -> str:
    """What decides the family: the class if a table is for that class, else the config's `model_type`."""
    name = type(module).__name__
    cfg = getattr(module, "cfg", None)
    if getattr(cfg, "gated_mlp", False) and not getattr(cfg, "num_experts", None) and f"{name}:gated" in families():
        return f"{name}:gated"
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return name if name in families() or not isinstance(model_type, str) else model_type


def bind(module: nn.Module) -> FamilyTable:
    """The table of a network: its family's if the family is known and its modules are there, else module paths."""
    family = families().get(kind(module))
    return FamilyTable(module, None) if family is None or not fits(module, family) else with_dims(module, family)


def fits(module: nn.Module, family: Family) -> bool:
    """Whether every part of the family is somewhere in this module.

    The inside of an MLP may be that of a user's class: then its block says which parts there are.
    """
    paths = FamilyTable(module, None).modules
    if family.blocks not in paths:
        return False
    blocks = [block for inner in module.get_submodule(family.blocks).modules() if (block := block_of(inner))]
    own = INSIDE_MLP if any(INSIDE_MLP & set(block.parts) for block in blocks) else frozenset[Part]()
    layers = range(len(list(module.get_submodule(family.blocks).children())))

    def there(part: Part) -> bool:
        reaches = family.parts[part]
        listed = (reaches,) if isinstance(reaches, Reach) else reaches
        return any(not reach.path or reach.path.format(layer=layer) in paths for reach in listed for layer in layers)

    return all(there(part) for part in family.parts if part not in family.optional | own)


def with_dims(module: nn.Module, family: Family) -> FamilyTable:
    """The family bound to the module, sizes read from it."""
    return FamilyTable(module, family, read_dims(module, family))


def read_dims(module: nn.Module, family: Family) -> Dims:
    """Sizes from the weights themselves; only head counts and context length come from the config."""
    config = getattr(module, "config", getattr(module, "cfg", None))

    def known(*names: str) -> int | None:
        return next((getattr(config, name) for name in names if getattr(config, name, None)), None)

    n_layers = len(list(module.get_submodule(family.blocks).children()))
    d_vocab, d_model, d_head, d_mlp = None, None, None, None
    n_heads = known("num_attention_heads", "n_head", "n_heads")
    n_kv_heads = known("num_key_value_heads", "n_key_value_heads") or n_heads
    table = FamilyTable(module, family, Dims(n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads))
    if "W_E" in family.weights:
        d_vocab, d_model = table.weight("W_E").shape
    if n_heads and (w_o := table.first_weight("W_O")) is not None:
        d_head = w_o.shape[1]
    if (w_down := table.first_weight("W_down")) is not None:
        d_mlp, d_model = w_down.shape
    return Dims(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_mlp=d_mlp,
        d_vocab=d_vocab,
        n_ctx=known("max_position_embeddings", "n_positions", "n_ctx"),
        more={axis: size for axis, where in family.sizes.items() if (size := _measure(module, where, n_layers))},
    )


def _measure(module: nn.Module, where: str, n_layers: int) -> int | None:
    """A size: `PATH:DIM` of a parameter, or an integer attribute, in the first layer that has it."""
    path, _, dim = where.partition(":")
    for layer in range(n_layers):
        try:
            value = attrgetter(path.format(layer=layer))(module)
        except (AttributeError, IndexError):
            continue
        return int(value.shape[int(dim)]) if dim else int(value)
    return None
