"""One short file per architecture, found by scanning this folder: each ends with a constant `FAMILY`."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from torch import nn

from interp.models.table import Dims, Family, FamilyTable


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
    if getattr(getattr(module, "cfg", None), "gated_mlp", False) and f"{name}:gated" in families():
        return f"{name}:gated"
    model_type = getattr(getattr(module, "config", None), "model_type", None)
    return name if name in families() or not isinstance(model_type, str) else model_type


def bind(module: nn.Module) -> FamilyTable:
    """The table of a network: its family's if the family is known and its modules are there, else module paths."""
    family = families().get(kind(module))
    paths = {path for path, _ in module.named_modules()}
    if family is None or any(reach.path.format(layer=0) not in paths for reach in family.parts.values()):
        return FamilyTable(module, None)
    return FamilyTable(module, family, read_dims(module, family))


def read_dims(module: nn.Module, family: Family) -> Dims:
    """Sizes from the weights themselves; only head counts and context length come from the config."""
    config = getattr(module, "config", getattr(module, "cfg", None))

    def known(*names: str) -> int | None:
        return next((getattr(config, name) for name in names if getattr(config, name, None)), None)

    n_layers = len(list(module.get_submodule(family.blocks).children()))
    n_heads = known("num_attention_heads", "n_head", "n_heads")
    n_kv_heads = known("num_key_value_heads", "n_key_value_heads") or n_heads
    table = FamilyTable(module, family, Dims(n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads))
    d_vocab, d_model = table.weight("W_E").shape
    d_head = table.weight("W_O", 0).shape[1] if "W_O" in family.weights and n_heads else None
    d_mlp = table.weight("W_down", 0).shape[0] if "W_down" in family.weights else None
    return Dims(
        n_layers=n_layers,
        d_model=d_model,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        d_mlp=d_mlp,
        d_vocab=d_vocab,
        n_ctx=known("max_position_embeddings", "n_positions", "n_ctx"),
    )
