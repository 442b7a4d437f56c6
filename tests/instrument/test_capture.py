"""Capture: values, snapshots, positions, early stop, gradients, receipts, and leaving no trace."""

import pytest
import torch
from torch import nn

from interp.core.errors import InterpError, NeverFiredError, SiteError
from interp.instrument.capture import capture
from interp.instrument.edits import add, edited, last, zero
from interp.instrument.select import check_scope
from interp.models.model import LoadedModel, Stopped
from interp.models.tiny import tiny_model

FAMILIES = ["llama", "gemma3", "gpt2"]


def tokens(model: LoadedModel, shape: tuple[int, int] = (2, 7), seed: int = 0) -> torch.Tensor:
    assert model.dims.d_vocab is not None
    return torch.randint(model.dims.d_vocab, shape, generator=torch.Generator().manual_seed(seed))


def n_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_stream_equals_transformers_hidden_states(family: str) -> None:
    model = tiny_model(family)
    ids = tokens(model)
    with capture(model, ["resid_pre.0", "resid_post.*"], stop=False) as acts:
        logits = model(ids)
    with torch.no_grad():
        oracle = model.module(ids, output_hidden_states=True)
    assert torch.equal(logits, oracle.logits)
    assert torch.equal(acts["resid_pre.0"], oracle.hidden_states[0])
    for layer in range(model.n_layers - 1):  # the last hidden state of transformers is normed
        assert torch.equal(acts[f"resid_post.{layer}"], oracle.hidden_states[layer + 1])


@pytest.mark.parametrize("family", FAMILIES)
def test_patterns_equal_the_eager_attention_weights(family: str) -> None:
    model = tiny_model(family)
    ids = tokens(model)
    with capture(model, "pattern.*") as acts:
        model(ids)
    model.module.set_attn_implementation("eager")  # pyright: ignore
    with torch.no_grad():
        oracle = model.module(ids, output_attentions=True).attentions
    for layer, expected in enumerate(oracle):
        torch.testing.assert_close(acts[f"pattern.{layer}"], expected, atol=1e-6, rtol=1e-5)


def test_pattern_of_chosen_heads_is_a_slice_of_all() -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    with capture(model, ["pattern.1", "z.1"]) as every:
        model(ids)
    with capture(model, ["pattern.1", "z.1"], heads=[2, 0]) as some:
        model(ids)
    torch.testing.assert_close(some["pattern.1"], every["pattern.1"][:, [2, 0]])
    assert torch.equal(some["z.1"], every["z.1"][:, :, [2, 0]])


def test_padding_does_not_move_the_real_rows() -> None:
    model = tiny_model("llama")
    ids = tokens(model, (1, 5))
    padded, mask = (
        torch.cat([torch.zeros(1, 2, dtype=torch.long), ids], 1),
        torch.tensor([[0, 0, 1, 1, 1, 1, 1]]).bool(),
    )
    with capture(model, ["resid_post.2", "pattern.0"]) as plain:
        model(ids)
    with capture(model, ["resid_post.2", "pattern.0"]) as left:
        model(padded, attention_mask=mask)
    torch.testing.assert_close(left["resid_post.2"][:, 2:], plain["resid_post.2"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(left["pattern.0"][..., 2:, 2:], plain["pattern.0"], atol=1e-6, rtol=1e-5)


def test_early_stop_skips_what_lies_deeper() -> None:
    model = tiny_model("llama")
    ran: list[int] = []
    handles = [layer.register_forward_hook(lambda *_, i=i: ran.append(i)) for i, layer in enumerate(model.layers)]
    with capture(model, "gate.1") as acts:
        out = model(tokens(model))
    assert isinstance(out, Stopped) and acts["gate.1"].shape[-1] == model.dims.d_mlp
    assert ran == [0]
    with pytest.raises(InterpError, match="stop=False"):
        out.argmax(-1)
    for handle in handles:
        handle.remove()


def test_a_direct_call_of_the_module_is_never_stopped() -> None:
    model = tiny_model("llama")
    with capture(model, "resid_post.0"):
        assert model.module(tokens(model)).logits.shape[-1] == model.dims.d_vocab


@pytest.mark.parametrize("at", [3, -1, [0, 4], last, torch.tensor([1, 6])])
def test_positions_are_slices_of_the_whole(at: object) -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    with capture(model, ["resid_mid.1", "k.1"]) as whole:
        model(ids)
    with capture(model, ["resid_mid.1", "k.1"], positions=at) as some:  # pyright: ignore
        model(ids)
    rows = {3: [[3], [3]], -1: [[6], [6]]}.get(at) if isinstance(at, int) else None  # pyright: ignore
    if rows is None:
        rows = at.tolist() if isinstance(at, torch.Tensor) else at if isinstance(at, list) else [6, 6]
        rows = [[r] for r in rows] if not isinstance(at, list) else [at, at]
    for site in ("resid_mid.1", "k.1"):
        expected = torch.stack([whole[site][b][rows[b]] for b in range(2)])
        assert torch.equal(some[site], expected)


def test_last_is_the_last_real_token_under_right_padding() -> None:
    model = tiny_model("llama")
    ids, mask = tokens(model), torch.ones(2, 7, dtype=torch.bool)
    mask[0, 4:] = False
    with capture(model, "resid_post.0") as whole:
        model(ids, attention_mask=mask)
    with capture(model, "resid_post.0", positions=last) as some:
        model(ids, attention_mask=mask)
    expected = torch.stack([whole["resid_post.0"][0, 3:4], whole["resid_post.0"][1, 6:7]])
    assert torch.equal(some["resid_post.0"], expected)


def test_position_slices_do_not_keep_the_whole_tensor_alive() -> None:
    model = tiny_model("llama")
    with capture(model, ["neurons.0", "q.0"], positions=last, heads=None) as acts:
        model(tokens(model))
    for _, value in acts.items():
        assert value.untyped_storage().nbytes() == value.numel() * value.element_size()


def test_fused_projections_are_copied_not_kept() -> None:
    model = tiny_model("gpt2")
    with capture(model, "v.0") as acts:
        model(tokens(model))
    assert acts["v.0"].untyped_storage().nbytes() == acts["v.0"].numel() * 4


def test_dtype_policy_and_receipt() -> None:
    model = tiny_model("llama")
    with capture(model, "resid_post.*", dtype=torch.bfloat16) as acts:
        model(tokens(model))
    assert acts["resid_post.0"].dtype == torch.bfloat16
    assert acts.receipt is not None
    assert acts.receipt.calls == {str(s): 1 for s in model.resolve("resid_post.*")}
    assert acts.receipt.n_tokens == 14
    assert acts.receipt.n_bytes == 3 * 14 * model.dims.d_model * 2  # pyright: ignore


def test_gradients_equal_those_of_a_hand_made_graph() -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    with capture(model, ["resid_post.1", "z.2", "neurons.2"], grad=True) as acts:
        logits = model(ids)
        logits[:, -1, 5].sum().backward()
    resid = acts["resid_post.1"].detach().clone().requires_grad_()
    with torch.enable_grad():
        kwargs: dict[str, object] = {}
        handle = model.layers[2].register_forward_pre_hook(lambda _m, _a, k: kwargs.update(k), with_kwargs=True)
        model.module(ids, use_cache=False)
        handle.remove()
        hidden = model.layers[2](resid, **kwargs)
        head = model.module.get_submodule("lm_head")(model.module.get_submodule("model.norm")(hidden))
        (expected,) = torch.autograd.grad(head[:, -1, 5].sum(), resid)
    torch.testing.assert_close(acts.grad("resid_post.1"), expected)
    assert acts.grad("z.2").shape == acts["z.2"].shape
    assert float(acts.grad("neurons.2").abs().sum()) > 0


def test_gradient_errors_name_the_next_step() -> None:
    model = tiny_model("llama")
    with capture(model, "resid_post.0") as acts:
        model(tokens(model))
    with pytest.raises(InterpError, match="grad=True"):
        acts.grad("resid_post.0")
    with capture(model, "resid_post.0", grad=True) as acts:
        model(tokens(model))
    with pytest.raises(InterpError, match="backward"):
        acts.grad("resid_post.0")


def test_gradient_of_the_pattern_is_that_of_eager_attention() -> None:
    model = tiny_model("llama")
    with capture(model, ["pattern.1", "attn_scores.1", "resid_post.0"], grad=True) as acts:
        logits = model(tokens(model))
        logits.square().sum().backward()
    model.module.set_attn_implementation("eager")
    seen = model.module(tokens(model), output_attentions=True, output_hidden_states=True)
    pattern, stream = seen.attentions[1], seen.hidden_states[1]
    wanted, upstream = torch.autograd.grad(seen.logits.square().sum(), [pattern, stream])
    assert torch.allclose(acts.grad("pattern.1"), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert torch.allclose(acts.grad("resid_post.0"), upstream, rtol=1e-3, atol=1e-4 * float(upstream.abs().max()))
    allowed = pattern > 0
    inner = (wanted - (wanted * pattern).sum(-1, keepdim=True)) * pattern
    assert torch.allclose(
        acts.grad("attn_scores.1")[allowed], inner[allowed], rtol=1e-3, atol=1e-4 * float(inner.abs().max().detach())
    )


def test_no_gradients_are_tracked_otherwise() -> None:
    model = tiny_model("llama")
    with capture(model, "resid_post.0", stop=False) as acts:
        logits = model(tokens(model))
    assert not logits.requires_grad and not acts["resid_post.0"].requires_grad and torch.is_grad_enabled()


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.relu, self.shared = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared(self.relu(self.linear(self.shared(x))))


def test_in_place_networks_are_seen_as_they_were() -> None:
    model = LoadedModel(InPlace())
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    with capture(model, ["linear", "relu"]) as acts:
        model(x)
    expected = model.module.linear(x)  # pyright: ignore
    assert torch.equal(acts["linear"], expected) and (acts["linear"] < 0).any()
    assert torch.equal(acts["relu"], expected.clamp_min(0))


def test_a_reused_module_is_numbered() -> None:
    model = LoadedModel(InPlace())
    x = torch.randn(3, 4)
    with capture(model, "shared") as acts:
        model(x)
    assert len(acts.calls("shared")) == 2 and torch.equal(acts.calls("shared")[0], x)
    with pytest.raises(InterpError, match="2 times"):
        acts["shared"]


class Overwriting(nn.Module):
    """A Llama-like block list whose second block writes into its input."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, **kwargs: object) -> torch.Tensor:
        x.mul_(2)
        return self.inner(x, **kwargs)


def test_overwriting_a_known_family_is_caught_and_snapshot_helps() -> None:
    model = tiny_model("llama")
    layers = model.module.get_submodule("model.layers")
    layers[1] = Overwriting(layers[1])  # pyright: ignore
    ids = tokens(model)
    with pytest.raises(InterpError, match="snapshot=True"), capture(model, "resid_post.0", stop=False):
        model(ids)
    with capture(model, "resid_post.0", stop=False, snapshot=True) as acts:
        model(ids)
    with capture(model, "resid_post.0") as clean:
        model(ids)
    assert torch.equal(acts["resid_post.0"], clean["resid_post.0"])


def test_outputs_that_are_tuples_or_dicts() -> None:
    class Pair(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[None, torch.Tensor, int]:
            return None, x + 1, 3

    class Table(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"out": x * 2}

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.table = Pair(), Table()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.table(self.pair(x)[1])["out"]

    model, x = LoadedModel(Net()), torch.ones(2, 3)
    with edited(model, [add("pair", 10.0), zero("table", dims=0)]), capture(model, ["pair", "table"]) as acts:
        out = model(x)
    assert torch.equal(acts["pair"], x + 11)
    assert torch.equal(out, torch.tensor([[0.0, 24.0, 24.0]] * 2))


def test_never_fired_and_empty_requests_are_errors() -> None:
    model = tiny_model("llama")
    with pytest.raises(NeverFiredError, match="resid_post.0"), capture(model, "resid_post.0"):
        pass
    with pytest.raises(InterpError, match="no sites"), capture(model, []):
        pass
    with pytest.raises(SiteError, match="nearest"), capture(model, "resid_pots.0"):
        pass
    with pytest.raises(InterpError, match="prompt, new or all"):
        check_scope("some")
    with pytest.raises(InterpError, match="outside"), capture(model, "resid_post.0", positions=99):
        model(tokens(model))
    assert n_hooks(model.module) == 0


def test_asking_for_something_not_captured_names_the_nearest() -> None:
    model = tiny_model("llama")
    with capture(model, "resid_post.0") as acts:
        with pytest.raises(NeverFiredError, match="not fired yet"):
            acts["resid_post.0"]
        model(tokens(model))
    with pytest.raises(InterpError, match="resid_post.0"):
        acts["resid_post.1"]


def test_no_trace_is_left_also_after_an_exception_and_foreign_hooks_survive() -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = tiny_model("llama")
    ids, seen = tokens(model), []
    foreign = model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    before = n_hooks(model.module), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)

    def fail_inside() -> None:
        with capture(model, ["*"]), edited(model, [zero("z.1", head=0)]):
            model(ids)
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fail_inside()
    assert (n_hooks(model.module), dict(ALL_ATTENTION_FUNCTIONS._local_mapping)) == before
    model(ids)
    assert len(seen) == 2
    foreign.remove()
    assert model.hub.pending == [] and model.wants_grad == 0 and model.hub.stoppers == 0


def test_an_exception_inside_the_model_is_passed_on_and_cleaned_up() -> None:
    model = tiny_model("llama")

    def explode(*_: object) -> None:
        raise ZeroDivisionError("inside the model")

    handle = model.layers[1].register_forward_hook(explode)
    with pytest.raises(ZeroDivisionError), capture(model, "resid_post.2"):
        model(tokens(model))
    handle.remove()
    assert n_hooks(model.module) == 0
    with capture(model, "resid_post.2") as acts:
        model(tokens(model))
    assert "resid_post.2" in acts


def test_nested_captures_and_captures_around_edits_see_the_edited_values() -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    with capture(model, "resid_post.0") as plain:
        model(ids)
    with capture(model, "resid_post.0") as outer:
        with edited(model, [add("resid_post.0", 1.0)]), capture(model, "resid_post.0") as inner:
            model(ids)
    assert torch.equal(outer["resid_post.0"], plain["resid_post.0"] + 1)
    assert torch.equal(inner["resid_post.0"], outer["resid_post.0"])


def test_batch_split_does_not_matter() -> None:
    model = tiny_model("llama")
    ids = tokens(model, (4, 6))
    with capture(model, "resid_post.*") as whole:
        model(ids)
    halves = []
    for part in ids.split(2):
        with capture(model, "resid_post.*") as acts:
            model(part)
        halves.append(acts.stack("resid_post.*"))
    torch.testing.assert_close(torch.cat(halves, dim=1), whole.stack("resid_post.*"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["prompt", "new", "all"])
def test_generation_captures_each_position_once_whatever_the_cache(family: str, scope: str) -> None:
    model = tiny_model(family)
    ids, n_new = tokens(model), 5
    found: dict[bool, list[torch.Tensor]] = {}
    for use_cache in (True, False):
        with capture(model, ["resid_post.1", "pattern.1", "z.2"], scope=scope) as acts:  # pyright: ignore
            out = model.generate(ids, n_new=n_new, use_cache=use_cache)
        found[use_cache] = [out, *(value for _, value in acts.items())]
    n = {"prompt": 7, "new": n_new - 1, "all": 7 + n_new - 1}[scope]
    assert found[True][1].shape[1] == n
    assert torch.equal(found[True][0], found[False][0])
    for cached, full in zip(found[True][1:], found[False][1:], strict=True):
        torch.testing.assert_close(cached, full, atol=1e-4, rtol=1e-4)
    with capture(model, "resid_post.1") as oracle:
        model(found[True][0][:, :-1])
    expected = {"prompt": slice(0, 7), "new": slice(7, None), "all": slice(None)}[scope]
    torch.testing.assert_close(found[True][1], oracle["resid_post.1"][:, expected], atol=1e-4, rtol=1e-4)


def test_several_forwards_are_listed_in_order() -> None:
    model = tiny_model("llama")
    with capture(model, "resid_post.0") as acts:
        model(tokens(model, seed=0))
        model(tokens(model, seed=1))
    assert len(acts.calls("resid_post.0")) == 2


@pytest.mark.parametrize("use_cache", [True, False])
def test_two_generations_in_one_capture_are_two_calls(use_cache: bool) -> None:
    model = tiny_model("llama")
    first, second = tokens(model, seed=0), tokens(model, seed=1)
    with capture(model, "resid_post.1") as acts:
        model.generate(first, n_new=3, use_cache=use_cache)
        model.generate(second, n_new=4, use_cache=use_cache)
    lengths = [value.shape[1] for value in acts.calls("resid_post.1")]
    assert lengths == [7 + 2, 7 + 3]
    with capture(model, "resid_post.1") as alone:
        model.generate(second, n_new=4)
    torch.testing.assert_close(acts.calls("resid_post.1")[1], alone["resid_post.1"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("use_cache", [True, False])
def test_one_position_per_row_while_generating(use_cache: bool) -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    with capture(model, "resid_post.1", positions=torch.tensor([1, 4])) as acts:
        model.generate(ids, n_new=3, use_cache=use_cache)
    with capture(model, "resid_post.1") as whole:
        model(ids)
    expected = torch.stack([whole["resid_post.1"][0, 1:2], whole["resid_post.1"][1, 4:5]])
    torch.testing.assert_close(acts["resid_post.1"], expected, atol=1e-5, rtol=1e-5)


def test_two_owners_of_one_module_both_see_its_patterns() -> None:
    one = tiny_model("llama")
    two = LoadedModel(one.module)
    ids = tokens(one)
    with capture(one, "pattern.1", stop=False) as a, capture(two, "pattern.1", stop=False) as b:
        one(ids)
    with capture(one, "pattern.1") as again:
        one(ids)
    assert torch.equal(a["pattern.1"], b["pattern.1"])
    assert torch.equal(a["pattern.1"], again["pattern.1"])


def test_nothing_captured_shares_memory_with_another_site_or_the_output() -> None:
    model = tiny_model("llama")
    with capture(model, ["resid_post.0", "resid_pre.1", "attn_in.1", "logits"], stop=False) as acts:
        logits = model(tokens(model))
    held = [value.data_ptr() for _, value in acts.items()]
    assert len(set(held)) == len(held)
    assert acts["logits"].data_ptr() != logits.data_ptr()
    assert torch.equal(acts["resid_post.0"], acts["resid_pre.1"])


def test_every_forward_of_a_capture_is_seen_to_its_last_site() -> None:
    model = tiny_model("llama")
    with capture(model, "resid_post.*") as acts:
        for seed in range(3):
            model(tokens(model, seed=seed))
    assert acts.receipt is not None
    assert set(acts.receipt.calls.values()) == {3}
    with edited(model, zero("mlp_out.2")) as receipts, capture(model, "resid_post.0"):
        model(tokens(model))
        model(tokens(model))
    assert receipts[0].n_calls == 2


def test_logits_of_a_generation_are_those_of_the_positions_they_belong_to() -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    for use_cache in (True, False):
        with capture(model, "logits") as acts:
            out = model.generate(ids, n_new=4, use_cache=use_cache)
        expected = model(out[:, :-1])[:, 6:]
        torch.testing.assert_close(acts["logits"], expected, atol=1e-4, rtol=1e-4)


def test_what_has_no_positions_comes_call_by_call_while_generating() -> None:
    """RWKV's decay is a parameter: there is nothing to join along positions."""
    model = tiny_model("rwkv")
    with capture(model, ["time_decay.0", "resid_post.0"]) as acts:
        model.generate(tokens(model)[:1], n_new=3)
    every = acts.calls("time_decay.0")
    assert len(every) == 3 and all(torch.equal(value, every[0]) for value in every)
