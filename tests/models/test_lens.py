"""TransformerLens models given by the user: their hook names work, their values are theirs, the difference is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.instrument.edits import add, edited, scale, zero
from interp.models.compare import compare, unwrapped
from interp.models.load import load
from interp.models.model import LoadedModel
from interp.models.probe import verify
from interp.models.tiny import tiny_model

pytestmark = pytest.mark.needs_package("transformer_lens")

IDS = torch.randint(97, (2, 6), generator=torch.Generator().manual_seed(0))
WRAPPED = ["llama", "gpt2", "gemma3", "gemma2", "qwen3", "olmo2", "phi3", "mixtral"]


def hooked(gated: bool) -> torch.nn.Module:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    sizes = {"n_layers": 2, "d_model": 32, "d_head": 8, "n_heads": 4, "d_mlp": 48, "n_ctx": 64, "d_vocab": 97}
    kind = (
        {"gated_mlp": True, "n_key_value_heads": 2, "positional_embedding_type": "rotary", "rotary_dim": 8}
        if gated
        else {}
    )
    norm = "RMS" if gated else "LN"
    config = HookedTransformerConfig(
        **sizes, **kind, act_fn="silu", normalization_type=norm, initializer_range=0.3, seed=0
    )
    with pytest.warns(DeprecationWarning, match="HookedTransformer"):
        return HookedTransformer(config)


def bridged(name: str, folder: Path) -> Any:
    """A TransformerBridge around a tiny model."""
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    tiny = tiny_model(name, n_layers=2)
    tiny.module.save_pretrained(folder)  # pyright: ignore
    tiny.tokenizer.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return TransformerBridge.boot_transformers(str(folder), hf_model=tiny.module, tokenizer=tokenizer)


@pytest.mark.parametrize("gated", [True, False])
def test_hooked_transformer_sites_are_its_hook_points(gated: bool) -> None:
    module = hooked(gated)
    model = load(module)
    assert verify(model).passed
    with torch.no_grad():
        logits, cache = module.run_with_cache(IDS)  # pyright: ignore
    sites = [site for site in model.sites() if site.info.lens is not None]
    with capture(model, sites, stop=False) as acts:
        assert torch.equal(model(IDS), logits)
    for site in sites:
        assert torch.equal(acts[site], cache[site.aliases[0]]), site


@pytest.mark.parametrize("gated", [True, False])
def test_every_name_in_a_hooked_transformers_cache_is_a_site(gated: bool) -> None:
    module = hooked(gated)
    model = load(module)
    with torch.no_grad():
        _, cache = module.run_with_cache(IDS)  # pyright: ignore
    with capture(model, list(cache.keys()), stop=False) as acts:
        model(IDS)
    assert len(cache) > 30
    for name in cache:
        last = acts.calls(name)[-1]  # a norm is called for queries, keys and values; the cache keeps the last
        assert torch.equal(last.reshape(cache[name].shape), cache[name]), name


@pytest.mark.parametrize("name", WRAPPED)
def test_a_bridge_equals_the_model_it_wraps(name: str, tmp_path: Path) -> None:
    """Every site of the bridge, checked like any other's, against the same site of the Hugging Face model."""
    bridge = bridged(name, tmp_path)
    plain = tiny_model(name, n_layers=2)
    model = load(bridge)
    report = verify(model, reference=plain.module)
    assert report.first_failure is None
    compared = {check.site for check in report.checks if "the reference's" in check.name}
    parts = {Part.RESID_PRE, Part.Q, Part.K, Part.V, Part.PATTERN, Part.Z, Part.ATTN_OUT, Part.MLP_OUT, Part.RESID_POST}
    gates = {"gpt2": {Part.NEURONS_PRE}, "mixtral": set()}.get(name, {Part.GATE_PRE, Part.UP, Part.NEURONS})
    assert {str(Site(part, layer)) for part in parts | gates for layer in (0, 1)} <= compared
    assert {"embed", "final_norm", "logits"} <= compared
    worst = max(check.value for check in report.checks if "the reference's" in check.name)
    assert worst < 1e-5


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_every_name_in_a_bridges_cache_is_a_site(name: str, tmp_path: Path) -> None:
    bridge = bridged(name, tmp_path)
    model = load(bridge)
    with torch.no_grad():
        logits, cache = bridge.run_with_cache(IDS)
    names = [key for key in cache if cache[key].is_floating_point()]
    assert len(names) > 80
    with capture(model, names, stop=False) as acts:
        assert torch.equal(model(IDS), logits)
    for key in names:
        last, wanted = acts.calls(key)[-1], cache[key]
        # A bridge's cache splits heads where its hook points hold them in one axis, and puts positions before heads.
        layouts = [last.reshape(wanted.shape)] + ([last.transpose(1, 2)] if last.ndim == 4 else [])
        assert any(torch.equal(layout, wanted) for layout in layouts if layout.shape == wanted.shape), key


def test_two_names_of_one_hook_point_are_one_place(tmp_path: Path) -> None:
    """A capture under one name sees an edit under another, whichever was opened first."""
    model = load(bridged("llama", tmp_path))
    one, other = "blocks.1._original_component.mlp._original_component.gate_proj.hook_out", "blocks.1.mlp.gate.hook_out"
    with capture(model, [one]) as plain:
        model(IDS)
    with capture(model, [one]) as acts, edited(model, [add(other, 1.0), scale("gate_pre.1", 2.0)]):
        model(IDS)
    assert torch.allclose(acts[one], (plain[one] + 1) * 2, atol=1e-5)


def test_edits_at_hook_names_move_the_bridge(tmp_path: Path) -> None:
    model = load(bridged("llama", tmp_path))
    plain = model(IDS)
    for name in ("blocks.1.hook_mlp_out", "mlp_out.1"):
        with edited(model, zero(name)) as receipts:
            changed = model(IDS)
        assert receipts[0].moved == 1.0 and not torch.allclose(changed, plain, atol=1e-2)
    reference = tiny_model("llama", n_layers=2)
    with edited(reference, zero("mlp_out.1")):
        torch.testing.assert_close(changed, reference(IDS), atol=1e-4, rtol=1e-4)


def test_the_difference_is_reported_where_it_is(tmp_path: Path) -> None:
    """A control: a reference whose second layer differs agrees up to there and not behind it."""
    bridge = bridged("gemma3", tmp_path)
    model = load(bridge)
    other = unwrapped(bridge)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.add_(0.01)  # pyright: ignore
    report = verify(model, reference=other)
    failed = {check.site for check in report.checks if not check.passed}
    assert {"up.1", "neurons.1", "resid_post.1", "logits"} <= failed
    assert not {"gate_pre.1", "mlp_in.1", "up.0", "resid_post.0"} & failed
    up = next(check for check in report.checks if check.site == "up.1" and not check.passed)
    assert up.name == "up equals the reference's" and up.value > up.tolerance
    assert all(check.passed for check in verify(model, reference=unwrapped(bridge)).checks)


def test_hooked_transformer_against_a_twin() -> None:
    one, other = hooked(True), hooked(True)
    assert verify(load(one), reference=other).passed
    with torch.no_grad():
        other.blocks[0].attn._W_V.mul_(1.1)  # pyright: ignore
    failure = verify(load(one), reference=other).first_failure
    assert failure is not None and failure.site == "v.0"


def test_what_cannot_be_compared() -> None:
    class Other(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(InterpError, match="no site in common"):
        list(compare(tiny_model("llama"), LoadedModel(Other()), IDS))
    with pytest.raises(InterpError, match="wraps no Hugging Face model"):
        unwrapped(Other())
    shapes = compare(tiny_model("llama"), tiny_model("llama", d_mlp=32), IDS)
    failed = next(check for check in shapes if check.site == "gate_pre.0")
    assert not failed.passed and failed.note == "(2, 6, 48) here, (2, 6, 32) in the reference"
