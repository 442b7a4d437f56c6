"""Mixtures of experts against explicit loops over tokens and experts, and against the models' own routers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from interp.core.errors import InterpError, SiteError
from interp.instrument.capture import capture
from interp.instrument.edits import Edit, add, edited, scale, set_to, zero
from interp.instrument.tokens import tokenize
from interp.models.experts import ROUTER_WEIGHTS
from interp.models.model import LoadedModel
from interp.models.probe import probe_tokens, verify
from interp.models.tiny import tiny_model

MIXTURES = ("mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v2", "deepseek-v3", "gpt-oss", "glm4-moe")
INSIDE = ("expert_gate_pre.1", "expert_gate.1", "expert_up.1", "expert_neurons.1", "expert_out.1")
ROUTER = ("router_logits.1", "router_experts.1", "router_weights.1", "routed_out.1", "mlp_in.1", "mlp_out.1")


SHARED_LAYOUTS = {"Dots1": "glm4-moe", "SolarOpen": "glm4-moe", "FlexOlmo": "flex-olmo", "Mellum": "qwen3-moe"}
"""Class in transformers -> the family whose table serves it."""


@pytest.mark.parametrize(("name", "family"), SHARED_LAYOUTS.items())
def test_models_of_a_known_layout(name: str, family: str) -> None:
    fields = {
        "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2, "moe_intermediate_size": 16, "num_experts_per_tok": 3, "n_group": 2,
        "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1,
        "num_experts" if name in ("FlexOlmo", "Mellum") else "n_routed_experts": 8,
    }  # fmt: skip
    module: Any = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**fields)).eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    model = LoadedModel(module=module)
    assert model.table.name == family
    report = verify(model)
    assert report.passed, report.first_failure


def mlp_of(model: LoadedModel, layer: int = 1) -> Any:
    block: Any = model.layers[layer]
    return block.mlp


def capture_all(model: LoadedModel, sites: tuple[str, ...], tokens: Tensor | None = None) -> dict[str, Tensor]:
    with capture(model, list(sites), stop=False) as acts:
        model(probe_tokens(model) if tokens is None else tokens)
    return {name: acts[name] for name in sites}


def test_a_mixtral_layer_by_loops() -> None:
    """Every value of a layer from mlp_in and the raw parameters, one token and one expert after another."""
    model = tiny_model("mixtral", n_layers=2, dtype=torch.float64)
    acts, mlp = capture_all(model, (*INSIDE, *ROUTER)), mlp_of(model)
    gate_up, down = mlp.experts.gate_up_proj.detach(), mlp.experts.down_proj.detach()
    width = down.shape[2]
    for row in range(2):
        for pos in range(12):
            x = acts["mlp_in.1"][row, pos]
            logits = torch.stack([(mlp.gate.weight[e].detach() * x).sum() for e in range(6)])
            assert torch.allclose(acts["router_logits.1"][row, pos], logits, atol=1e-12)
            best = sorted(range(6), key=lambda e: -float(logits[e]))[:2]
            assert acts["router_experts.1"][row, pos].tolist() == best
            mass = [float(torch.exp(logits[e])) for e in best]
            total = torch.zeros(32, dtype=torch.float64)
            for slot, e in enumerate(best):
                before, up = gate_up[e, :width] @ x, gate_up[e, width:] @ x
                gate = before / (1 + torch.exp(-before))
                out = down[e] @ (gate * up)
                for name, value in zip(INSIDE, (before, gate, up, gate * up, out), strict=True):
                    assert torch.allclose(acts[name][row, pos, slot], value, atol=1e-10), name
                weight = mass[slot] / sum(mass)
                assert float(acts["router_weights.1"][row, pos, e]) == pytest.approx(weight, abs=1e-6)
                total += float(acts["router_weights.1"][row, pos, e]) * out
            assert torch.allclose(acts["mlp_out.1"][row, pos], total, atol=1e-10)


def test_a_gpt_oss_expert_by_loops() -> None:
    model = tiny_model("gpt-oss", n_layers=2, dtype=torch.float64)
    acts, experts = capture_all(model, (*INSIDE, *ROUTER)), mlp_of(model).experts
    clamped = 0
    for row, pos in ((0, 0), (0, 7), (1, 3), (1, 11)):
        x, total = acts["mlp_in.1"][row, pos], torch.zeros(32, dtype=torch.float64)
        for slot, e in enumerate(acts["router_experts.1"][row, pos].tolist()):
            both = x @ experts.gate_up_proj[e].detach() + experts.gate_up_proj_bias[e].detach()
            before, up = both[0::2], both[1::2]
            clamped += int((before > 2).sum() + (up.abs() > 2).sum())
            gate = torch.minimum(before, torch.tensor(2.0))
            gate = gate / (1 + torch.exp(-1.702 * gate))
            up = torch.maximum(torch.minimum(up, torch.tensor(2.0)), torch.tensor(-2.0)) + 1
            out = (gate * up) @ experts.down_proj[e].detach() + experts.down_proj_bias[e].detach()
            for name, value in zip(INSIDE, (before, gate, up, gate * up, out), strict=True):
                assert torch.allclose(acts[name][row, pos, slot], value, atol=1e-10), name
            total += acts["router_weights.1"][row, pos, e] * out
        assert torch.allclose(acts["routed_out.1"][row, pos], total, atol=1e-10)
    assert clamped, "the clamp did something"


def test_gpt_oss_patterns_leave_the_sink_its_share() -> None:
    """Against the weights that the model's own eager attention returns."""
    model = tiny_model("gpt-oss", n_layers=2, dtype=torch.float64)
    block: Any = model.layers[1]
    with torch.no_grad():
        block.self_attn.sinks.copy_(torch.tensor([-2.0, 0.0, 2.0, 4.0]))
    kept = list[Any]()
    handle = block.self_attn.register_forward_hook(lambda _m, _a, output: kept.append(output[1]))
    with capture(model, "pattern.1", stop=False) as acts, capture(model, "pattern.1", heads=[3, 1]) as some:
        model(probe_tokens(model))
    handle.remove()
    assert torch.allclose(acts["pattern.1"], kept[0], atol=1e-7)
    assert torch.allclose(some["pattern.1"], kept[0][:, [3, 1]], atol=1e-7)
    rows = acts["pattern.1"].sum(-1)
    assert float(rows.max()) < 1 and float(rows.min()) < 0.5
    with edited(model, zero("pattern.1", head=2)):
        off = capture_all(model, ("z.1",))["z.1"]
    assert not off[:, :, 2].any() and off[:, :, 1].any()


@pytest.mark.parametrize("name", MIXTURES)
def test_the_router_is_the_models_own(name: str) -> None:
    model = tiny_model(name, n_layers=2)
    mlp, kept = mlp_of(model), list[Any]()
    router = mlp.router if hasattr(mlp, "router") else mlp.gate
    handle = router.register_forward_hook(lambda _m, _a, output: kept.append(output))
    acts = capture_all(model, ROUTER)
    handle.remove()
    logits, weights, experts = kept[0]
    assert torch.equal(acts["router_logits.1"].flatten(0, 1), logits)
    assert torch.equal(acts["router_experts.1"].flatten(0, 1), experts)
    dense = acts["router_weights.1"].flatten(0, 1)
    for token in range(24):
        chosen = dict(zip(experts[token].tolist(), weights[token].tolist(), strict=True))
        assert [float(w) for w in dense[token]] == [chosen.get(e, 0.0) for e in range(dense.shape[1])]


@pytest.mark.parametrize("name", ["mixtral", "qwen2-moe", "gpt-oss"])
def test_every_way_to_run_the_experts_gives_the_same_values(name: str) -> None:
    model = tiny_model(name, n_layers=2)
    module: Any = model.module
    found = {}
    for kind in ("grouped_mm", "batched_mm", "eager"):
        module.set_experts_implementation(kind)
        report = verify(model)
        assert report.passed, (kind, report.first_failure)
        found[kind] = capture_all(model, (*INSIDE, *ROUTER))
    for kind in ("batched_mm", "eager"):
        for site, value in found["grouped_mm"].items():
            assert torch.allclose(found[kind][site], value, atol=3e-5, rtol=1e-5), (kind, site)


def test_an_edit_of_the_logits_changes_the_choice() -> None:
    model = tiny_model("mixtral", n_layers=2)
    plain = capture_all(model, ROUTER)
    wanted = torch.zeros(6)
    wanted[[2, 5]] = 100
    with edited(model, add("router_logits.1", wanted)):
        after = capture_all(model, ROUTER)
    assert torch.equal(after["router_experts.1"].sort().values, torch.tensor([2, 5]).expand(2, 12, 2))
    pair = plain["router_logits.1"][..., [2, 5]].softmax(-1)
    assert torch.allclose(after["router_weights.1"][..., [2, 5]], pair, atol=1e-4)  # 100 costs digits of the logits


def test_an_edit_of_one_experts_neurons_has_the_effect_of_its_weights() -> None:
    model = tiny_model("mixtral", n_layers=2, dtype=torch.float64)
    plain, step = capture_all(model, (*INSIDE, *ROUTER)), torch.zeros(2, 48, dtype=torch.float64)
    step[1, 7] = 0.5  # the second slot's neuron 7
    with edited(model, add("expert_neurons.1", step)):
        after = capture_all(model, ("routed_out.1", "expert_out.1"))
    second = plain["router_experts.1"][..., 1]
    weight = plain["router_weights.1"].gather(-1, second[..., None])
    columns = mlp_of(model).experts.down_proj.detach()[second][..., 7]
    assert torch.allclose(after["routed_out.1"] - plain["routed_out.1"], weight * 0.5 * columns, atol=1e-10)
    assert torch.allclose(
        after["expert_out.1"][..., 1, :], plain["expert_out.1"][..., 1, :] + 0.5 * columns, atol=1e-10
    )


def test_an_edit_inside_the_experts_keeps_the_bits_of_other_tokens() -> None:
    model = tiny_model("qwen3-moe", n_layers=2)
    plain = capture_all(model, ("routed_out.1",))["routed_out.1"]
    with edited(model, zero("expert_gate.1", at=[4])):
        after = capture_all(model, ("routed_out.1",))["routed_out.1"]
    others = [pos for pos in range(12) if pos != 4]
    assert torch.equal(after[:, others], plain[:, others])
    assert not after[:, 4].any()


def test_weights_beyond_the_slots_give_a_token_more_slots() -> None:
    model = tiny_model("mixtral", n_layers=2, dtype=torch.float64)
    plain = capture_all(model, ROUTER)
    weights = torch.tensor([0.1, 0.0, 0.2, 0.3, 0.0, 0.4])
    with edited(model, set_to("router_weights.1", weights, at=[3])):
        after = capture_all(model, ROUTER)
    assert after["router_experts.1"].shape == (2, 12, 4)
    assert torch.equal(after["router_weights.1"][:, 3], weights.expand(2, 6))
    others = [pos for pos in range(12) if pos != 3]
    assert torch.equal(after["router_weights.1"][:, others], plain["router_weights.1"][:, others])
    assert torch.allclose(after["routed_out.1"][:, others], plain["routed_out.1"][:, others], atol=1e-12)
    x, experts, total = plain["mlp_in.1"][:, 3], mlp_of(model).experts, torch.zeros(2, 32, dtype=torch.float64)
    for e in range(6):
        gate, up = (x @ experts.gate_up_proj[e].detach().T).chunk(2, dim=-1)
        total += weights[e] * ((torch.nn.functional.silu(gate) * up) @ experts.down_proj[e].detach().T)
    assert torch.allclose(after["routed_out.1"][:, 3], total, atol=1e-7)  # weights are float32


def test_writing_router_weights_by_hand() -> None:
    """One token, two slots of four experts: kept, scaled, swapped, and one more."""
    router, logits = torch.nn.Identity(), torch.zeros(1, 4)
    output = (logits, torch.tensor([[0.7, 0.3]]), torch.tensor([[2, 0]]))
    assert torch.equal(ROUTER_WEIGHTS.read(router, output), torch.tensor([[0.3, 0, 0.7, 0]]))

    def written(*row: float) -> tuple[list[float], list[int]]:
        _, weights, experts = ROUTER_WEIGHTS.write(router, output, torch.tensor([row]))
        return [round(w, 4) for w in weights[0].tolist()], experts[0].tolist()

    assert written(0.3, 0, 0.7, 0) == ([0.7, 0.3], [2, 0])
    assert written(0.0, 0, 0.7, 0) == ([0.7, 0.0], [2, 0])
    assert written(0.0, 0, 0.7, 0.5) == ([0.7, 0.5], [2, 3])
    assert written(0.3, 0, 0.0, 0.5) == ([0.3, 0.5], [0, 3])
    assert written(0.3, 0.1, 0.7, 0) == ([0.7, 0.3, 0.1], [2, 0, 1])
    assert written(0, 0.1, 0, 0.5) == ([0.1, 0.5], [1, 3])
    assert written(0, 0, 0, 0) == ([0.0, 0.0], [2, 0])


@pytest.mark.parametrize("pad", ["left", "right"])
def test_padding_is_routed_but_not_in_the_way(pad: Any) -> None:
    model = tiny_model("mixtral", n_layers=2)
    long, short = "abcdefgh", "xyz"
    both, alone = tokenize(model, [long, short], pad=pad), tokenize(model, [short])
    sites = (*INSIDE, "router_experts.1", "router_weights.1")
    with capture(model, list(sites), stop=False) as batch:
        model(both)
    with capture(model, list(sites), stop=False) as single:
        model(alone)
    real = both.mask[1].bool()
    for site in sites:
        assert torch.allclose(batch[site][1][real].float(), single[site][0].float(), atol=1e-5), site


def test_deepseek_keys_and_values_are_read_and_latents_edited() -> None:
    model = tiny_model("deepseek-v3", n_layers=2, dtype=torch.float64)
    sites = ("attn_in.1", "q.1", "k.1", "v.1", "kv_latent.1", "k_rotary.1", "attn_scores.1")
    acts = capture_all(model, sites)
    block: Any = model.layers[1]
    raw = acts["kv_latent.1"] @ block.self_attn.kv_b_proj.weight.detach().T  # heads of [6 key, 8 value] columns
    for head in range(4):
        first = head * 14
        assert torch.allclose(acts["k.1"][:, :, head], raw[..., first : first + 6], atol=1e-10)
        assert torch.allclose(acts["v.1"][:, :, head], raw[..., first + 6 : first + 14], atol=1e-10)
    assert acts["q.1"].shape == (2, 12, 4, 10) and acts["k_rotary.1"].shape == (2, 12, 4)
    key, query = acts["k.1"][:, 0], acts["q.1"][:, 0]  # at position 0 nothing is rotated
    score = ((query[..., :6] * key).sum(-1) + (query[..., 6:] * acts["k_rotary.1"][:, :1]).sum(-1)) * 10**-0.5
    assert torch.allclose(acts["attn_scores.1"][:, :, 0, 0], score, atol=1e-5)
    with pytest.raises(SiteError, match=r"v.1 can only be read; edit kv_latent.1"), edited(model, zero("v.1")):
        model(probe_tokens(model))
    with edited(model, scale("kv_latent.1", 2.0)):
        doubled = capture_all(model, ("v.1",))["v.1"]
    assert torch.allclose(doubled, 2 * acts["v.1"], atol=1e-10)


def test_layers_that_are_dense() -> None:
    model = tiny_model("deepseek-v3", n_layers=3)
    assert [str(site) for site in model.sites("gate_pre.*")] == ["gate_pre.0"]
    assert [str(site) for site in model.sites("router_weights.*")] == ["router_weights.1", "router_weights.2"]
    with pytest.raises(SiteError, match="layers with router_logits: 1-2"):
        model.resolve("router_logits.0")
    with pytest.raises(SiteError, match="W_gate needs a layer that has it, got 1; these have: 0"):
        model.weight("W_gate", 1)


@pytest.mark.parametrize("name", ["mixtral", "gpt-oss"])
def test_weights_of_experts(name: str) -> None:
    model = tiny_model(name, n_layers=2, dtype=torch.float64)
    acts = capture_all(model, (*INSIDE, *ROUTER))
    gate, down = model.weight("W_expert_gate", 1), model.weight("W_expert_down", 1)
    assert gate.shape == (6, 32, 48) and down.shape == (6, 48, 32)
    experts = acts["router_experts.1"]
    bias = model.table.bias("W_expert_gate", 1)
    assert (bias is not None) == (name == "gpt-oss")
    before = torch.einsum("bpd, bpkdm -> bpkm", acts["mlp_in.1"], gate[experts])
    assert torch.allclose(before if bias is None else before + bias[experts], acts["expert_gate_pre.1"], atol=1e-10)
    after = torch.einsum("bpkm, bpkmd -> bpkd", acts["expert_neurons.1"], down[experts])
    bias = model.table.bias("W_expert_down", 1)
    assert torch.allclose(after if bias is None else after + bias[experts], acts["expert_out.1"], atol=1e-10)
    logits = acts["mlp_in.1"] @ model.weight("W_router", 1)
    bias = model.table.bias("W_router", 1)
    assert torch.allclose(logits if bias is None else logits + bias, acts["router_logits.1"], atol=1e-10)


def test_shared_weight_of_qwen2_moe() -> None:
    model = tiny_model("qwen2-moe", n_layers=2, dtype=torch.float64)
    sites = ("shared_weight_pre.1", "shared_weight.1", "shared_out.1", "routed_out.1", "mlp_out.1")
    acts = capture_all(model, sites)
    gate = 1 / (1 + torch.exp(-acts["shared_weight_pre.1"]))
    assert torch.allclose(acts["shared_weight.1"], gate, atol=1e-12) and gate.shape == (2, 12, 1)
    assert torch.allclose(acts["mlp_out.1"], acts["routed_out.1"] + gate * acts["shared_out.1"], atol=1e-12)
    with edited(model, set_to("shared_weight.1", 0.0)):
        closed = capture_all(model, ("routed_out.1", "mlp_out.1"))
    assert torch.equal(closed["mlp_out.1"], closed["routed_out.1"])


def test_a_wrong_replay_fails_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """The identities catch it when experts compute something else than the replay."""
    model = tiny_model("mixtral", n_layers=1)
    act = mlp_of(model, 0).experts.act_fn
    monkeypatch.setattr(type(act), "forward", lambda _self, x: torch.relu(x))
    assert verify(model).passed  # both changed
    monkeypatch.setattr("interp.models.experts._concatenated", lambda _module: False)
    failed = [check.name for check in verify(model).checks if not check.passed]
    assert "sum of weight * expert_out == routed_out" in failed


def test_experts_that_cannot_be_replayed_say_so() -> None:
    model = tiny_model("mixtral", n_layers=2)
    mlp_of(model).experts._is_expert_parallel = True
    with pytest.raises(SiteError, match="cannot be computed beside it: its weights are spread"):
        capture_all(model, ("expert_up.1",))
    with capture(model, "router_weights.1") as acts:
        model(probe_tokens(model))
    assert acts["router_weights.1"].shape == (2, 12, 6)


def test_the_nearest_name_where_a_layer_has_experts() -> None:
    with pytest.raises(SiteError, match="expert_gate_pre"):
        tiny_model("mixtral", n_layers=2).resolve("gate_pre.1")


def test_gradients_reach_the_weights_of_chosen_experts_only() -> None:
    model = tiny_model("mixtral", n_layers=2)
    with capture(model, ["router_weights.1", "router_experts.1"], grad=True) as acts:
        model(probe_tokens(model)).sum().backward()
    gradient, chosen = acts.grad("router_weights.1"), acts["router_weights.1"] != 0
    assert bool((gradient[chosen] != 0).all()) and not gradient[~chosen].any()
    with pytest.raises(InterpError):
        acts.grad("router_experts.1")


def test_forced_experts_while_generating() -> None:
    model = tiny_model("olmoe", n_layers=2)
    prompt = probe_tokens(model)

    def force(x: Tensor, _context: Any) -> Tensor:
        new = x.clone()
        new[..., 5] = 0.4
        return new

    edit = Edit("router_weights.*", force)
    with edited(model, edit):
        cached = model.generate(prompt, n_new=5)
    with edited(model, edit):
        assert torch.equal(model.generate(prompt, n_new=5, use_cache=False), cached)
    assert not torch.equal(cached, model.generate(prompt, n_new=5))
