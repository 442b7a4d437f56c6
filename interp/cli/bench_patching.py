"""What `interp bench patching` times: every site of the residual stream of one prompt pair, patched exactly.

The slow ways run one forward per site, on every eleventh site; their times are multiplied by all over these, which the
name of the system says. All return the logits of the same sites, so that the table shows how far they differ.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

from interp.cli.bench_capture import Group, Notes

BRIDGE = "TransformerBridge"


def patching_groups(model: Any, notes: Notes, *, with_peers: bool = True) -> Iterator[Group]:
    """One group: TransformerBridge first, then one forward per site here, then all sites at once."""
    import torch

    from interp.analyses.patching_bench import STRIDE, all_sites, bench_pair, in_a_wave, one_by_one

    pairs = bench_pair(model)
    sites = all_sites(model, pairs)
    some = sites[::STRIDE]
    scale = len(sites) / len(some)
    slow = f", one forward per site ({len(some)} of {len(sites)}, scaled up)"
    systems: dict[str, Callable[[], Any]] = {}
    if with_peers:
        bridge = _bridge(model, notes)
        if bridge is not None:
            systems[BRIDGE + slow] = lambda: patched_by_bridge(bridge, pairs, some)
    systems["interp" + slow] = lambda: one_by_one(model, pairs, some)

    def wave() -> Any:
        found = in_a_wave(model, pairs)
        return torch.stack([found[site] for site in some])

    yield Group(
        case=f"resid_post, {len(sites)} sites of one pair of {pairs.n_pos} tokens",
        systems=systems | {f"interp, all {len(sites)} sites at once": wave},
        scale=dict.fromkeys(systems, scale),
    )


def _bridge(model: Any, notes: Notes) -> Any:
    """The model in TransformerBridge, or None and the reason."""
    if find_spec("transformer_lens") is None:
        notes.left_out[BRIDGE] = "transformer_lens is not installed"
        return None
    try:
        load: Any = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
        with tempfile.TemporaryDirectory() as folder:
            model.module.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
            return load.boot_transformers(folder, device="cpu")
    except (ImportError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
        notes.left_out[BRIDGE] = f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"
        return None


def patched_by_bridge(bridge: Any, pairs: Any, sites: list[tuple[int, int]]) -> Any:
    """Denoised logits at the last token: the clean run is cached once, then one hooked forward for each site."""
    import torch

    found: list[Any] = []
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            pairs.clean.ids[:1], names_filter=lambda name: name.startswith("blocks.") and name.endswith(".hook_out")
        )
        for layer, position in sites:
            name = f"blocks.{layer}.hook_out"

            def put(value: Any, hook: Any, name: str = name, position: int = position) -> Any:
                value = value.clone()
                value[:, position] = cache[name][:, position]
                return value

            found.append(bridge.run_with_hooks(pairs.corrupt.ids[:1], fwd_hooks=[(name, put)])[0, -1])
    return torch.stack(found)
