"""TransformerLens models given by the user: their hook names work and their values are theirs."""

from pathlib import Path

import pytest
import torch

from interp.instrument.capture import capture
from interp.instrument.edits import edited, zero
from interp.models.load import load
from interp.models.probe import verify
from interp.models.tiny import tiny_model

pytestmark = pytest.mark.needs_package("transformer_lens")


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


@pytest.mark.parametrize("gated", [True, False])
def test_hooked_transformer_sites_are_its_hook_points(gated: bool) -> None:
    module = hooked(gated)
    model = load(module)
    assert verify(model).passed
    ids = torch.randint(97, (2, 6), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits, cache = module.run_with_cache(ids)  # pyright: ignore
    sites = [site for site in model.sites() if site.info.lens is not None]
    with capture(model, sites, stop=False) as acts:
        assert torch.equal(model(ids), logits)
    for site in sites:
        assert torch.equal(acts[site], cache[site.aliases[0]]), site


def test_bridge_sites_are_its_hook_points(tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoTokenizer

    tiny = tiny_model("llama")
    ids = torch.randint(97, (2, 6), generator=torch.Generator().manual_seed(0))
    plain = tiny(ids)
    tiny.module.save_pretrained(tmp_path)  # pyright: ignore
    tiny.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    bridge = TransformerBridge.boot_transformers(str(tmp_path), hf_model=tiny.module, tokenizer=tokenizer)
    model = load(bridge)
    report = verify(model)
    assert report.first_failure is None
    torch.testing.assert_close(model(ids), plain, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    with capture(model, ["resid_post.*", "neurons.1", "blocks.1.hook_resid_pre"]) as acts:
        model(ids)
    for name in ("resid_post.0", "neurons.1", "resid_pre.1"):
        assert torch.equal(acts[name], cache[model.table.one(name).aliases[0]])
    with edited(model, zero("mlp_out.1")) as receipts:
        assert not torch.equal(model(ids), plain)
    assert receipts[0].moved == 1.0
