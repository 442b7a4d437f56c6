"""Families with gated MLPs: other models of the same layouts, any non-linearity, and values against plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from interp.instrument.capture import capture
from interp.instrument.edits import add, edited, zero
from interp.models.model import LoadedModel
from interp.models.probe import probe_tokens, verify
from interp.models.tiny import tiny_model

SHARED_LAYOUTS = {
    "SmolLM3": "llama",
    "SeedOss": "llama",
    "Helium": "llama",
    "Ministral": "llama",
    "Ministral3": "llama",
    "Cwm": "llama",
    "Ernie4_5": "llama",
    "Olmo3": "olmo2",
    "Exaone4": "exaone4",
    "Glm": "glm",
    "Arcee": "arcee",
    "Jais2": "arcee",
    "Apertus": "apertus",
}
"""Class in transformers -> the family whose table serves it."""


def small(name: str, **more: Any) -> LoadedModel:
    """A random model of a class in transformers."""
    fields = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False, "initializer_range": 0.3, **more,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**fields)
    return LoadedModel(module=getattr(transformers, f"{name}ForCausalLM")(config).eval())


@pytest.mark.parametrize(("name", "family"), SHARED_LAYOUTS.items())
def test_models_of_a_known_layout(name: str, family: str) -> None:
    model = small(name)
    assert model.table.name == family
    report = verify(model)
    assert report.passed, report.first_failure


@pytest.mark.parametrize(
    ("act", "function"),
    [
        ("gelu", torch.nn.functional.gelu),
        ("relu", torch.relu),
        ("relu2", lambda x: torch.relu(x) ** 2),
        ("sigmoid", torch.sigmoid),
        ("linear", lambda x: x),
    ],
)
def test_any_non_linearity(act: str, function: Any) -> None:
    model = tiny_model("llama", n_layers=2, overrides={"hidden_act": act})
    assert verify(model).passed
    with capture(model, ["gate_pre.1", "gate.1", "up.1", "neurons.1"]) as acts:
        model(probe_tokens(model))
    assert torch.equal(acts["gate.1"], function(acts["gate_pre.1"]))
    assert torch.equal(acts["neurons.1"], acts["gate.1"] * acts["up.1"])


def test_an_edit_of_a_bilinear_gate_scales_its_neurons() -> None:
    model = tiny_model("llama", n_layers=2, overrides={"hidden_act": "linear"})
    tokens = probe_tokens(model)
    with capture(model, "neurons.0") as plain:
        model(tokens)
    with capture(model, "neurons.0", stop=False) as acts, edited(model, zero("gate_pre.0", dims=[3, 5])):
        model(tokens)
    expected = plain["neurons.0"].clone()
    expected[..., [3, 5]] = 0
    assert torch.equal(acts["neurons.0"], expected)


def test_phi3_pieces_of_the_fused_projections() -> None:
    model = tiny_model("phi3", n_layers=1, dtype=torch.float64)  # 4 query heads, 2 key-value heads of width 8
    block: Any = model.layers[0]
    with capture(model, "*.0") as acts:
        model(probe_tokens(model))
    fused = acts["attn_in.0"] @ block.self_attn.qkv_proj.weight.detach().T
    for name, columns, heads in (("q", slice(0, 32), 4), ("k", slice(32, 48), 2), ("v", slice(48, 64), 2)):
        assert torch.allclose(acts[f"{name}.0"], fused[..., columns].unflatten(-1, (heads, 8)), atol=1e-12), name
        weight = model.weight(f"W_{name.upper()}", 0)
        assert torch.equal(weight, block.self_attn.qkv_proj.weight.T[:, columns])
    both = acts["mlp_in.0"] @ block.mlp.gate_up_proj.weight.detach().T
    assert torch.allclose(acts["gate_pre.0"], both[..., :48], atol=1e-12)
    assert torch.allclose(acts["up.0"], both[..., 48:], atol=1e-12)


def test_phi3_edits_of_one_piece_leave_the_others() -> None:
    model = tiny_model("phi3", n_layers=1)
    tokens = probe_tokens(model)
    with capture(model, ["q.0", "k.0", "v.0"], stop=False) as plain:
        model(tokens)
    with capture(model, ["q.0", "k.0", "v.0"], stop=False) as acts, edited(model, zero("k.0", head=1)):
        model(tokens)
    assert torch.equal(acts["q.0"], plain["q.0"]) and torch.equal(acts["v.0"], plain["v.0"])
    assert torch.equal(acts["k.0"][:, :, 0], plain["k.0"][:, :, 0])
    assert not acts["k.0"][:, :, 1].any()


def test_qwen3_queries_are_after_their_norm() -> None:
    model = tiny_model("qwen3", n_layers=1, dtype=torch.float64)
    block: Any = model.layers[0]
    attention = block.self_attn
    with capture(model, ["attn_in.0", "q.0"]) as acts:
        model(probe_tokens(model))
    raw = (acts["attn_in.0"] @ attention.q_proj.weight.detach().T).unflatten(-1, (4, 8))
    assert torch.allclose(acts["q.0"], _rms(raw, attention.q_norm.weight, attention.q_norm.variance_epsilon), atol=1e-9)


def test_olmo2_queries_are_normed_over_all_heads() -> None:
    model = tiny_model("olmo2", n_layers=1, dtype=torch.float64)
    block: Any = model.layers[0]
    attention = block.self_attn
    with capture(model, ["resid_pre.0", "attn_in.0", "q.0"]) as acts:
        model(probe_tokens(model))
    assert torch.equal(acts["attn_in.0"], acts["resid_pre.0"])
    raw = acts["resid_pre.0"] @ attention.q_proj.weight.detach().T
    normed = _rms(raw, attention.q_norm.weight, attention.q_norm.variance_epsilon)
    assert torch.allclose(acts["q.0"], normed.unflatten(-1, (4, 8)), atol=1e-9)


def _rms(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """In float32, as the models do it."""
    wide = x.float()
    return weight.detach() * (wide / (wide.square().mean(-1, keepdim=True) + epsilon).sqrt()).to(x)


@pytest.mark.parametrize("order", [0, 1])
def test_olmo2_what_the_mlp_reads_is_not_the_stream(order: int) -> None:
    """Both sites are the input of one module: the stream is edited first, whatever the order of the list."""
    model = tiny_model("olmo2", n_layers=2)
    tokens, names = probe_tokens(model), ["resid_mid.0", "mlp_in.0", "mlp_out.0", "resid_post.0"]
    with capture(model, names, stop=False) as plain:
        model(tokens)
    edits = [add("resid_mid.0", 1.0), add("mlp_in.0", 0.5)][:: -1 if order else 1]
    with capture(model, names, stop=False) as acts, edited(model, edits):
        model(tokens)
    assert torch.equal(acts["resid_mid.0"], plain["resid_mid.0"] + 1)
    assert torch.equal(acts["mlp_in.0"], acts["resid_mid.0"] + 0.5)
    assert torch.equal(acts["resid_post.0"], acts["resid_mid.0"] + acts["mlp_out.0"])
    with capture(model, names, stop=False) as acts, edited(model, edits[order ^ 1]):  # what the MLP reads, alone
        model(tokens)
    assert torch.equal(acts["resid_mid.0"], plain["resid_mid.0"])
    assert torch.equal(acts["resid_post.0"], acts["resid_mid.0"] + acts["mlp_out.0"])
    assert not torch.equal(acts["mlp_out.0"], plain["mlp_out.0"])


def test_olmo2_gradient_of_what_a_sublayer_reads() -> None:
    """Not that of the stream, though both are one tensor; also where parameters want gradients."""
    model = tiny_model("olmo2", n_layers=2, dtype=torch.float64)
    tokens, names, alone = (
        probe_tokens(model),
        ["resid_mid.1", "attn_in.1", "mlp_in.1", "resid_pre.1"],
        dict[str, Tensor](),
    )
    model.module.requires_grad_(requires_grad=False)
    for name in names:
        with capture(model, name, grad=True) as acts:
            model(tokens).square().sum().backward()
        alone[name] = acts.grad(name).clone()
    model.module.requires_grad_(requires_grad=True)
    with capture(model, names, grad=True) as acts:
        model(tokens).square().sum().backward()
    for name in names:
        assert torch.allclose(acts.grad(name), alone[name], rtol=1e-6), name
    assert not torch.allclose(alone["mlp_in.1"], alone["resid_mid.1"])


def test_apertus_learns_its_activation() -> None:
    """xIELU of the paper (arXiv:2411.13010), from the learnt parameters: quadratic above 0, exponential below."""
    model = small("Apertus")
    block: Any = model.layers[1]
    act = block.mlp.act_fn
    with torch.no_grad():
        act.alpha_p += 0.5
        act.alpha_n -= 0.3
    with capture(model, ["neurons_pre.1", "neurons.1"]) as acts:
        model(probe_tokens(model))
    softplus, x, beta = torch.nn.functional.softplus, acts["neurons_pre.1"], float(act.beta)
    above, below = softplus(act.alpha_p.detach()), beta + softplus(act.alpha_n.detach())
    negative = below * (torch.expm1(x.clamp_max(-1e-6)) - x) + beta * x
    expected = torch.where(x > 0, above * x * x + beta * x, negative)
    assert torch.allclose(acts["neurons.1"], expected, atol=1e-4, rtol=1e-4)


def test_gemma2_logits_are_what_the_model_returns() -> None:
    model = tiny_model("gemma2", n_layers=1)
    module: Any = model.module
    cap: float = module.config.final_logit_softcapping
    with capture(model, ["logits_pre", "logits"], stop=False) as acts:
        logits = model(probe_tokens(model))
    assert torch.equal(acts["logits"], logits)
    assert torch.allclose(acts["logits"], cap * torch.tanh(acts["logits_pre"] / cap), atol=1e-5)
    assert float(acts["logits_pre"].abs().max()) > 5, "the cap does something"
    with edited(model, add("logits", 2.0)):
        assert torch.equal(model(probe_tokens(model)), logits + 2)


def test_gemma2_scores_are_capped() -> None:
    model = tiny_model("gemma2", n_layers=1, overrides={"attn_logit_softcapping": 0.5})
    with capture(model, "attn_scores.0") as acts:
        model(probe_tokens(model))
    real = acts["attn_scores.0"][acts["attn_scores.0"] > -1e30]
    assert 0.4 < float(real.abs().max()) <= 0.5
