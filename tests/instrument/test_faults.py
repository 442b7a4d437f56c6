"""Faults that must not pass silently: each works, or says why it does not.

Tested elsewhere, with the name of the test:
misspelt site: test_capture.test_never_fired_and_empty_requests_are_errors
module used several times in one forward: test_capture.test_a_reused_module_is_numbered
in-place ReLU after the hooked module: test_capture.test_in_place_networks_are_seen_as_they_were
tuple and dict outputs: test_capture.test_outputs_that_are_tuples_or_dicts (dataclasses: below)
exception inside the model: test_capture.test_an_exception_inside_the_model_is_passed_on_and_cleaned_up
left padding: test_capture.test_padding_does_not_move_the_real_rows,
    test_edits.test_left_padded_generation_does_not_depend_on_the_padding
right padding: test_capture.test_last_is_the_last_real_token_under_right_padding (values: below)
BOS twice: test_tokens (the note says "twice")
KV cache on and off: test_capture.test_generation_captures_each_position_once_whatever_the_cache,
    test_edits.test_generation_is_edited_alike_with_and_without_the_cache
edit with a wrong shape or dtype: test_edits.REFUSED (device: below)
nested captures, capture around edit: test_capture.test_nested_captures_and_captures_around_edits_see_the_edited_values
Compiled, replicated, checkpointed and threaded models: test_faults_wrapped.
"""

import dataclasses
import warnings

import pytest
import torch
from torch import Tensor, nn

from interp.core.errors import InterpError, SiteError
from interp.instrument.capture import NonFiniteWarning, capture
from interp.instrument.edits import Edit, add, edited, patch_from, scale, set_to
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model


def tokens(model: LoadedModel, shape: tuple[int, int] = (2, 7), seed: int = 0) -> Tensor:
    return torch.randint(model.dims.d_vocab or 0, shape, generator=torch.Generator().manual_seed(seed))


def n_hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


@dataclasses.dataclass
class Answer:
    note: str
    value: Tensor


class Answering(nn.Module):
    def forward(self, x: Tensor) -> Answer:
        return Answer("twice", 2 * x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.answer, self.last = Answering(), nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.answer(x).value)


def test_a_dataclass_output_is_read_and_replaced() -> None:
    model, x = LoadedModel(Net()), torch.tensor([[1.0, 2.0]])
    with edited(model, add("answer", 3.0)), capture(model, ["answer", "last"]) as acts:
        out = model(x)
    assert acts["answer"].tolist() == [[5.0, 7.0]] == out.tolist() == acts["last"].tolist()


def test_user_hooks_before_and_after_ours_run_and_are_seen() -> None:
    """A hook the user added first moves the value before an edit; one added later sees the edited value."""
    net = nn.Sequential(nn.Identity(), nn.Identity())
    model, x, seen = LoadedModel(net), torch.ones(1, 2), []
    first = net[0].register_forward_hook(lambda _m, _a, out: out + 10)
    with edited(model, scale("0", 2.0)), capture(model, ["0", "1"]) as acts:
        later = net[0].register_forward_hook(lambda _m, _a, out: seen.append(out.clone()))
        out = model(x)
    assert acts["0"].tolist() == [[22.0, 22.0]] == out.tolist() and seen[0].tolist() == [[22.0, 22.0]]
    assert n_hooks(net) == 2
    first.remove()
    later.remove()


def test_a_hook_that_changes_the_value_after_us_is_seen_downstream_only() -> None:
    net = nn.Sequential(nn.Identity(), nn.Identity())
    model = LoadedModel(net)
    with capture(model, ["0", "1"]) as acts:
        handle = net[0].register_forward_hook(lambda _m, _a, out: out + 1)
        model(torch.zeros(1, 2))
        handle.remove()
    assert acts["0"].tolist() == [[0.0, 0.0]] and acts["1"].tolist() == [[1.0, 1.0]]


def test_in_place_relu_after_a_gradient_site_is_refused_or_right() -> None:
    """torch itself refuses to write into a leaf; nothing is handed out that was overwritten."""
    net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True))
    model = LoadedModel(net)
    with pytest.raises(RuntimeError, match="in-place"), capture(model, "0", grad=True):
        model(torch.randn(2, 3))
    assert n_hooks(net) == 0 and all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_reports_the_first_site_that_is_not_finite(dtype: torch.dtype) -> None:
    """The weights of layer 1's up projection overflow: gate comes before, neurons and all after it are lost."""
    model = tiny_model("llama", dtype=dtype)
    weight = model.module.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        weight.fill_(torch.finfo(dtype).max)
    with pytest.warns(NonFiniteWarning, match=r"^up\.1 is the first"), capture(model, "*") as acts:
        model(tokens(model))
    assert acts.receipt is not None and acts.receipt.nonfinite is not None
    assert next(iter(acts.receipt.nonfinite)) == "up.1"
    assert "gate.1" not in acts.receipt.nonfinite and "resid_post.1" in acts.receipt.nonfinite
    with pytest.raises(InterpError, match=r"up\.1 is the first"), capture(model, "*", finite="raise"):
        model(tokens(model))


def test_a_sound_half_precision_model_is_quiet_and_float32_is_not_looked_at() -> None:
    half, full = tiny_model("llama", dtype=torch.bfloat16), tiny_model("llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with capture(half, "*") as acts:
            half(tokens(half))
        with capture(full, "resid_post.0") as unlooked:
            full(tokens(full))
    assert acts.receipt is not None and acts.receipt.nonfinite == {}
    assert unlooked.receipt is not None and unlooked.receipt.nonfinite is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_value_is_found_on_request(bad: float) -> None:
    model = tiny_model("llama")
    with (
        pytest.raises(InterpError, match=r"resid_mid\.1 is the first"),
        edited(model, set_to("resid_mid.1", bad, at=3, dims=5)),
        capture(model, ["resid_post.0", "resid_mid.1", "resid_post.1"], finite="raise"),
    ):
        model(tokens(model))


def test_an_edit_behind_tied_weights_moves_one_of_the_two_uses() -> None:
    """GPT-2's embedding is its unembedding: editing the embedding's output must leave the weights and W_U alone."""
    model = tiny_model("gpt2")
    assert model.module.get_input_embeddings().weight is model.module.get_output_embeddings().weight  # pyright: ignore
    before = model.module.get_input_embeddings().weight.clone()  # pyright: ignore
    with edited(model, scale("embed", 3.0)), capture(model, ["final_norm", "embed"], stop=False) as acts:
        logits = model(tokens(model))
    assert torch.equal(model.module.get_input_embeddings().weight, before)  # pyright: ignore
    torch.testing.assert_close(logits, acts["final_norm"] @ before.T)
    torch.testing.assert_close(acts["embed"], 3 * before[tokens(model)])


def test_an_edit_that_changes_the_device_is_refused() -> None:
    model = tiny_model("llama")
    with pytest.raises(InterpError, match="keep shape, dtype and device"):
        with edited(model, Edit("resid_post.0", lambda x, _: x.to("meta"))):
            model(tokens(model))
    assert n_hooks(model.module) == 0


@pytest.mark.parametrize("result", [None, 3.0, [1.0]])
def test_an_edit_that_returns_no_tensor_is_refused(result: object) -> None:
    model = tiny_model("llama")
    with pytest.raises(InterpError, match="resid_post.0"):
        with edited(model, Edit("resid_post.0", lambda _x, _c: result)):  # pyright: ignore
            model(tokens(model))


def test_a_capture_inside_an_edit_function_of_another_model() -> None:
    """An edit may run and capture another model, e.g. to take its activation; both see their own values."""
    model, other = tiny_model("llama"), tiny_model("llama", seed=5)
    ids = tokens(model)
    with capture(other, "resid_post.1") as wanted:
        other(ids)

    def from_other(_x: Tensor, _c: object) -> Tensor:
        with capture(other, "resid_post.1") as acts:
            other(ids)
        return acts["resid_post.1"]

    with edited(model, Edit("resid_post.1", from_other)), capture(model, "resid_post.1") as seen:
        model(ids)
    assert torch.equal(seen["resid_post.1"], wanted["resid_post.1"])


def test_running_the_model_inside_its_own_edit_is_refused() -> None:
    """The inner forward would run the edit again, which would run the model again, and so on."""
    model = tiny_model("llama")
    ids = tokens(model)

    def again(x: Tensor, _c: object) -> Tensor:
        model(ids)
        return x

    with pytest.raises((InterpError, RecursionError)), edited(model, Edit("resid_post.1", again)):
        model(ids)
    assert n_hooks(model.module) == 0 and model.hub.pending == []


def test_an_edit_inside_a_capture_takes_what_the_capture_has_seen() -> None:
    model = tiny_model("llama")
    ids, others = tokens(model), tokens(model, seed=1)
    with capture(model, "resid_post.0") as plain:
        model(ids)
    with capture(model, "resid_post.0") as acts:
        model(ids)
        with edited(model, patch_from("resid_post.0", acts["resid_post.0"])):
            model(others)
    first, second = acts.calls("resid_post.0")
    assert torch.equal(first, plain["resid_post.0"]) and torch.equal(second, first)


def test_right_padding_leaves_the_real_positions_alone() -> None:
    model = tiny_model("llama")
    ids = tokens(model, (1, 5))
    padded = torch.cat([ids, torch.zeros(1, 2, dtype=torch.long)], 1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]).bool()
    with capture(model, ["resid_post.2", "pattern.1"]) as plain:
        model(ids)
    with capture(model, ["resid_post.2", "pattern.1"]) as right:
        model(padded, attention_mask=mask)
    torch.testing.assert_close(right["resid_post.2"][:, :5], plain["resid_post.2"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(right["pattern.1"][..., :5, :5], plain["pattern.1"], atol=1e-6, rtol=1e-5)


def test_a_module_without_a_tensor_is_refused_by_name() -> None:
    class Silent(nn.Module):
        def forward(self, x: Tensor) -> str:
            return "nothing"

    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.silent = Silent()

        def forward(self, x: Tensor) -> Tensor:
            self.silent(x)
            return x

    model = LoadedModel(Around())
    with pytest.raises(SiteError, match="silent returns str"), capture(model, "silent"):
        model(torch.ones(1, 2))
