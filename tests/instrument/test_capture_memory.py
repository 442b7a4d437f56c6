"""Capture: what it keeps in memory, what it shares, and what it leaves behind on the model and its inputs.

Memory is counted exactly: a mode sees every tensor that is made and follows its storage until it is freed.
"""

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from interp.core.errors import InterpError
from interp.instrument.capture import CaptureBuffers, capture
from interp.instrument.edits import edited, zero
from interp.models.attention import Later
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model


def tokens(model: LoadedModel, shape: tuple[int, int] = (2, 64), seed: int = 0) -> Tensor:
    return torch.randint(model.dims.d_vocab or 0, shape, generator=torch.Generator().manual_seed(seed))


class Meter(TorchDispatchMode):
    """Bytes of the storages that were made while it was on, now and at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # pyright: ignore
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        return out

    def freed(self, key: int, n_bytes: int) -> None:
        self.known.discard(key)
        self.now -= n_bytes


@contextmanager
def metered() -> Iterator[Meter]:
    gc.collect()
    gc.disable()  # so that only reference counts free memory, at once
    try:
        with Meter() as meter:
            yield meter
    finally:
        gc.enable()


def run(model: LoadedModel, sites: str | list[str], **options: object) -> tuple[int, int, int]:
    """Bytes held after the capture, the peak, and what the receipt says."""
    ids = tokens(model)
    with metered() as meter:
        with capture(model, sites, stop=False, **options) as acts:  # pyright: ignore
            model(ids)
        held = meter.now
    assert acts.receipt is not None
    return held, meter.peak, acts.receipt.n_bytes


def plain_peak(model: LoadedModel) -> int:
    with metered() as meter, torch.no_grad():
        model.module(tokens(model), use_cache=False)
    return meter.peak


def test_the_meter_counts_what_is_alive() -> None:
    """A check of the check: known sizes, views, frees."""
    with metered() as meter:
        a = torch.ones(1000)
        b = a.view(10, 100)[2:]
        c = a + 1
        assert meter.now == 8000
        del a, c
        assert meter.now == 4000  # the view keeps the first
        del b
        assert meter.now == 0 and meter.peak == 8000


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama", n_layers=6)


def test_one_position_keeps_one_position_and_the_peak_of_a_plain_forward(model: LoadedModel) -> None:
    run(model, "neurons.*", positions=[-1])  # caches of the library itself
    held, peak, stated = run(model, ["neurons.*", "resid_post.*"], positions=[-1])
    assert stated == 6 * 2 * (48 + 32) * 4
    assert held < stated + 40_000, "the whole tensors were 64 times as large: 1.9 MB"
    assert peak < plain_peak(model) + stated + 100_000


def test_values_by_reference_cost_their_size_once(model: LoadedModel) -> None:
    held, peak, stated = run(model, ["gate_pre.*", "up.*"])
    assert stated == 6 * 2 * 2 * 64 * 48 * 4
    assert held < stated + 40_000
    assert peak < plain_peak(model) + stated + 40_000


def test_two_names_of_one_tensor_cost_it_once(model: LoadedModel) -> None:
    held, _, stated = run(model, ["resid_post.0-4", "resid_pre.1-5"])
    assert held < stated / 2 + 40_000


def test_patterns_cost_queries_and_keys_until_they_are_read(model: LoadedModel) -> None:
    """At 64 tokens and heads of 8, a pattern is 5 times as large as query and key; at 4 tokens it is smaller."""
    ids = tokens(model)
    with metered() as meter:
        with capture(model, "pattern.*", stop=False) as acts:
            model(ids)
        before = meter.now
        acts["pattern.0"]
        assert meter.now - before > 2 * 4 * 64 * 64 * 4 / 2  # the pattern has come, query and key are gone
    assert acts.receipt is not None and acts.receipt.n_bytes == 6 * 2 * 4 * 64 * 64 * 4
    assert before < acts.receipt.n_bytes / 3
    with metered() as meter:
        with capture(model, "pattern.*") as acts:
            model(tokens(model, (2, 4)))
        few = 6 * 2 * 4 * 4 * 4 * 4
        assert acts.receipt is not None and acts.receipt.n_bytes == few
        assert meter.now < few + 4000 < 6 * 2 * 6 * 4 * 8 * 4, "queries and keys would have cost this much"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("heads", [None, [2, 0]])
def test_patterns_read_later_are_those_computed_at_once(family: str, heads: list[int] | None) -> None:
    model = tiny_model(family)
    ids, mask = tokens(model, (2, 40)), torch.ones(2, 40, dtype=torch.bool)
    mask[0, :5] = False
    sites = ["pattern.*", "attn_scores.1"]
    with capture(model, sites, heads=heads) as later:
        model(ids, attention_mask=mask)
    with capture(model, sites, heads=heads, snapshot=True) as at_once:
        model(ids, attention_mask=mask)
    for (site, value), (_, wanted) in zip(later.items(), at_once.items(), strict=True):
        assert torch.equal(value, wanted), site
        assert later[site] is value and not value.requires_grad


def test_a_query_overwritten_before_the_pattern_is_read_is_an_error() -> None:
    model = tiny_model("llama")
    with capture(model, "pattern.0") as acts:
        model(tokens(model))
    kept = acts.records[model.resolve("pattern.0")[0]][0].kept
    assert isinstance(kept, Later)
    kept.call.query.mul_(2)
    with pytest.raises(InterpError, match="overwritten"):
        acts["pattern.0"]


def test_an_edited_pattern_is_captured_as_edited() -> None:
    model = tiny_model("llama")
    with edited(model, zero("pattern.1", head=1)), capture(model, "pattern.1") as acts:
        model(tokens(model))
    assert not acts["pattern.1"][:, 1].any() and acts["pattern.1"][:, 0].any()


def test_buffers_are_filled_again_and_old_captures_say_so() -> None:
    model, buffers = tiny_model("llama"), CaptureBuffers()
    sites = ["resid_post.*", "pattern.0", "neurons.1"]
    wanted = []
    for seed in (0, 1):
        with capture(model, sites) as acts:
            model(tokens(model, seed=seed))
        wanted.append(acts)
    with capture(model, sites, buffers=buffers) as first:
        model(tokens(model, seed=0))
    placed = [site for site in map(str, first.sites) if site != "pattern.0"]  # that one is computed when read
    places = [first[site].data_ptr() for site in placed]
    assert all(torch.equal(value, wanted[0][site]) for site, value in first.items())
    with capture(model, sites, buffers=buffers) as second:
        model(tokens(model, seed=1))
    assert [second[site].data_ptr() for site in placed] == places
    assert all(torch.equal(value, wanted[1][site]) for site, value in second.items())
    with pytest.raises(InterpError, match="filled again"):
        first["resid_post.0"]
    assert buffers.n_bytes < second.receipt.n_bytes  # pyright: ignore  (query and key stand for the pattern)
    with capture(model, sites, buffers=buffers, dtype=torch.bfloat16) as half:
        model(tokens(model, (1, 3)))
    assert half["neurons.1"].dtype == torch.bfloat16 and half["neurons.1"].shape[:2] == (1, 3)
    with pytest.raises(InterpError, match="buffers"), capture(model, sites, buffers=buffers, grad=True):
        pass


def test_several_firings_have_buffers_of_their_own() -> None:
    model, buffers = tiny_model("llama"), CaptureBuffers()
    with capture(model, "resid_post.0", buffers=buffers) as acts:
        model(tokens(model, seed=0))
        model(tokens(model, seed=1))
    one, two = acts.calls("resid_post.0")
    assert not torch.equal(one, two)


def test_parameters_get_no_gradient_and_are_as_they_were() -> None:
    model = tiny_model("llama")
    frozen = model.module.get_parameter("model.norm.weight").requires_grad_(False)
    assert model.module.get_parameter("lm_head.weight").requires_grad
    with capture(model, ["resid_post.0", "neurons.1"], grad=True) as acts:
        model(tokens(model)).square().sum().backward()
    assert acts.grad("resid_post.0").any() and acts.grad("neurons.1").any()
    assert all(parameter.grad is None for parameter in model.module.parameters())
    assert all(p.requires_grad == (p is not frozen) for p in model.module.parameters())


@pytest.mark.parametrize("site", ["0", "1", "0@input"])
def test_the_users_input_is_left_as_it_was(site: str) -> None:
    model = LoadedModel(nn.Sequential(nn.Identity(), nn.Linear(3, 2)))
    x = torch.randn(4, 3)
    with capture(model, site, grad=True) as acts:
        model(x).sum().backward()
    assert not x.requires_grad and x.grad is None and x.is_leaf
    weight = model.module.get_parameter("1.weight")
    wanted = torch.ones(4, 2) if site == "1" else weight.detach().sum(0).expand(4, 3)
    torch.testing.assert_close(acts.grad(site), wanted)


def test_embeddings_given_by_the_user_are_left_as_they_were() -> None:
    model = tiny_model("llama")
    given = torch.randn(2, 5, model.dims.d_model or 0)
    sites = ["resid_pre.0", "attn_in.0", "resid_post.0"]
    with torch.enable_grad(), capture(model, sites, grad=True) as acts:
        model.module(inputs_embeds=given, use_cache=False).logits.sum().backward()
    assert not given.requires_grad and given.grad is None
    assert all(acts.grad(site).any() for site in sites)


def test_an_input_that_wants_a_gradient_gets_it() -> None:
    model = LoadedModel(nn.Sequential(nn.Identity(), nn.Linear(3, 2)))
    x = torch.randn(4, 3, requires_grad=True)
    with capture(model, "0", grad=True) as acts:
        model(x).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, acts.grad("0"))


def test_stack_is_in_the_order_asked_for(model: LoadedModel) -> None:
    with capture(model, "resid_post.*") as acts:
        model(tokens(model, (1, 4)))
    assert torch.equal(acts.stack("resid_post.{2,0}"), torch.stack([acts["resid_post.2"], acts["resid_post.0"]]))
    assert torch.equal(acts.stack("resid_post.*")[3], acts["resid_post.3"])
