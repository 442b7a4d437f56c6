"""The peers that `interp bench capture` times: plain hooks, TransformerBridge, HookedTransformer and nnsight.

Each is given its own copy of the model, since some of them change the module they wrap, and each reads the same sites:
the residual stream after every block, and gate_pre, up and neurons of every MLP. Every system returns its logits.
"""

from __future__ import annotations

import copy
import importlib
import tempfile
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, cast

Run = Callable[[Any], Any]
"""From token ids to logits."""


def peers(model: Any) -> tuple[dict[str, Run], dict[str, str]]:
    """What can be timed beside us, and why the others are left out."""
    found: dict[str, Run] = {}
    left_out: dict[str, str] = {}
    for name, package, make in (
        ("torch hooks, by reference", "torch", _hooks),
        ("TransformerBridge", "transformer_lens", _bridge),
        ("HookedTransformer", "transformer_lens", _hooked),
        ("nnsight", "nnsight", _nnsight),
    ):
        if find_spec(package) is None:
            left_out[name] = f"{package} is not installed"
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found |= {f"{name}{which}": run for which, run in make(model).items()}
        except (ImportError, AttributeError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            left_out[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return found, left_out


def _hooks(model: Any) -> dict[str, Run]:
    import torch

    def run(ids: Any) -> Any:
        kept: list[Any] = []
        handles: list[Any] = []
        for layer in model.layers:
            for module in (layer, layer.mlp.gate_proj, layer.mlp.up_proj):
                handles.append(module.register_forward_hook(lambda _m, _a, out: kept.append(out)))
            handles.append(layer.mlp.down_proj.register_forward_pre_hook(lambda _m, args: kept.append(args[0])))
        try:
            with torch.no_grad():
                return model.module(ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()

    _ = [layer.mlp.gate_proj for layer in model.layers]  # an AttributeError where there is none
    return {"": run}


def _bridge(model: Any) -> dict[str, Run]:
    import torch

    load: Any = importlib.import_module("transformer_lens.model_bridge").TransformerBridge
    with tempfile.TemporaryDirectory() as folder:
        model.module.save_pretrained(folder)
        model.tokenizer.save_pretrained(folder)
        bridge: Any = load.boot_transformers(folder, device="cpu")
    ends = (".hook_out", ".mlp.gate.hook_out", ".mlp.in.hook_out", ".mlp.out.hook_in")
    names = {f"blocks.{layer}{end}" for layer in range(model.n_layers) for end in ends}
    known = set(bridge.hook_dict)
    if not names <= known:
        raise KeyError(f"the bridge has no hook {min(names - known)}")

    def plain(ids: Any) -> Any:
        with torch.no_grad():
            return bridge(ids)

    def cached(ids: Any) -> Any:
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(ids, names_filter=lambda name: name in names)
        return _all_there(logits, len(cache), len(names))

    return {" forward": plain, ", same sites": cached}


def _hooked(model: Any) -> dict[str, Run]:
    import torch

    lens: Any = importlib.import_module("transformer_lens")
    convert: Any = importlib.import_module("transformer_lens.pretrained.weight_conversions").convert_llama_weights
    config: Any = model.module.config
    if model.table.name != "llama":
        raise ValueError(f"its weights are converted for Llama's layout only, this model is {model.table.name}")
    rope = getattr(config, "rope_theta", None) or cast(dict[str, Any], config.rope_parameters)["rope_theta"]
    cfg = lens.HookedTransformerConfig(
        n_layers=model.n_layers, d_model=config.hidden_size, n_ctx=512, d_head=model.dims.d_head,
        n_heads=config.num_attention_heads, n_key_value_heads=config.num_key_value_heads,
        d_mlp=config.intermediate_size, d_vocab=config.vocab_size, act_fn="silu", normalization_type="RMS",
        eps=config.rms_norm_eps, positional_embedding_type="rotary", rotary_adjacent_pairs=False,
        rotary_dim=model.dims.d_head, rotary_base=rope, gated_mlp=True, final_rms=True, original_architecture="Llama",
        device="cpu", default_prepend_bos=False,
    )  # fmt: skip
    hooked: Any = lens.HookedTransformer(cfg)
    hooked.load_state_dict(convert(copy.deepcopy(model.module), cfg), strict=False)
    ends = (".hook_resid_post", ".mlp.hook_pre", ".mlp.hook_pre_linear", ".mlp.hook_post")
    names = {f"blocks.{layer}{end}" for layer in range(model.n_layers) for end in ends}

    def plain(ids: Any) -> Any:
        with torch.no_grad():
            return hooked(ids)

    def cached(ids: Any) -> Any:
        with torch.no_grad():
            logits, cache = hooked.run_with_cache(ids, names_filter=lambda name: name in names)
        return _all_there(logits, len(cache), len(names))

    return {" forward": plain, ", same sites": cached}


def _nnsight(model: Any) -> dict[str, Run]:
    import torch

    wrapped: Any = importlib.import_module("nnsight").NNsight(copy.deepcopy(model.module))

    def run(ids: Any) -> Any:
        kept: Any = []
        with torch.no_grad(), wrapped.trace(input_ids=ids, use_cache=False):
            kept = [].save()  # pyright: ignore
            for layer in wrapped.model.layers:
                kept.append(layer.mlp.gate_proj.output)
                kept.append(layer.mlp.up_proj.output)
                kept.append(layer.mlp.down_proj.input)
                kept.append(layer.output)
            logits = wrapped.output.logits.save()
        return _all_there(logits, len(kept), 4 * model.n_layers)

    return {", same sites": run}


def _all_there(logits: Any, n: int, expected: int) -> Any:
    if n != expected:
        raise RuntimeError(f"{n} of {expected} sites were captured")
    return logits
