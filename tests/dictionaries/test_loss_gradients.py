"""Gradients of the model's loss by token: directional derivatives, alignment, what is left out, training with them."""

from __future__ import annotations

import itertools

import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries.loss_gradients import (
    Gradients,
    gradient_batches,
    inner_tokens,
    loss_gradients,
    next_token_loss,
    permuted,
    train_by_gradient,
)
from interp.dictionaries.train import train_sae
from interp.dictionaries.train_config import TrainConfig
from interp.instrument.capture import capture
from interp.instrument.edits import add, edited
from interp.instrument.tokens import TokenRecord, from_ids
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model


def text(model: LoadedModel, n: int = 3, length: int = 8) -> TokenRecord:
    return from_ids(model, torch.randint(0, 256, (n, length), generator=torch.Generator().manual_seed(0)))


def loss_with(model: LoadedModel, record: TokenRecord, site: str, change: torch.Tensor) -> float:
    with edited(model, add(site, change)):
        return float(next_token_loss(model(record), record).double())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
@pytest.mark.parametrize("site", ["resid_post.1", "mlp_out.0"])
def test_the_gradient_is_the_directional_derivative(family, site):
    """RMSNorm computes in float32 in every dtype, hence a larger step and less precision for the gated families."""
    step, precision = (1e-5, 1e-6) if family == "gpt2" else (1e-2, 1e-2)
    model = tiny_model(family, dtype=torch.float64)
    record = text(model)
    every = torch.ones_like(record.mask)
    at = model.table.one(site)
    g = loss_gradients(model, record, at, at, every).g.view(3, 8, -1).double()
    generator = torch.Generator().manual_seed(1)
    for token in (0, 3, 6):
        u = torch.zeros_like(g)
        u[:, token] = torch.randn(3, 32, generator=generator, dtype=torch.float64)
        ends = [loss_with(model, record, site, sign * step * u) for sign in (1, -1)]
        assert float((g * u).sum()) == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=precision)


def test_the_last_token_has_nothing_after_it_and_is_left_out():
    model = tiny_model("llama")
    record = text(model)
    at = model.table.one("resid_post.0")
    g = loss_gradients(model, record, at, at, torch.ones_like(record.mask)).g.view(3, 8, -1)
    assert not g[:, -1].any() and bool(g[:, :-1].any(-1).all())
    assert inner_tokens(record).tolist() == [[False] + [True] * 6 + [False]] * 3


def test_a_transcoder_gets_the_gradient_of_what_it_writes():
    model = tiny_model("llama")
    record = text(model)
    read, write = model.table.one("mlp_in.1"), model.table.one("mlp_out.1")
    keep = inner_tokens(record)
    found = loss_gradients(model, record, read, write, keep)
    alone = loss_gradients(model, record, write, write, keep)
    with capture(model, [read, write]) as acts:
        model(record)
    assert torch.equal(found.x, acts[read][keep]) and torch.equal(found.y, acts[write][keep])
    torch.testing.assert_close(found.g, alone.g)
    assert torch.equal(alone.x, alone.y)


def test_nothing_is_left_behind():
    model = tiny_model("llama")
    record = text(model)
    at = model.table.one("resid_post.0")
    found = loss_gradients(model, record, at, at, inner_tokens(record))
    assert not (found.x.requires_grad or found.g.requires_grad)
    assert all(p.grad is None and p.requires_grad for p in model.module.parameters())


def test_batches_draw_every_token_once_an_epoch_with_its_own_gradient(monkeypatch):
    monkeypatch.setattr("interp.dictionaries.loss_gradients.POOL", 4)
    model = tiny_model("llama")
    record = text(model, 10)
    at = model.table.one("resid_post.1")
    keep = inner_tokens(record)
    every = loss_gradients(model, record, at, at, keep)
    stream = gradient_batches(model, record, "resid_post.1", batch_size=12, seed=0)
    for _ in range(2):
        epoch = list(itertools.islice(stream, 5))
        x, g = torch.cat([batch.x for batch in epoch]), torch.cat([batch.g for batch in epoch])
        nearest = torch.cdist(x.double(), every.x.double()).argmin(1)
        assert sorted(nearest.tolist()) == list(range(60))
        torch.testing.assert_close(g, every.g[nearest], rtol=1e-3, atol=1e-4)
    again = next(gradient_batches(model, record, "resid_post.1", batch_size=12, seed=0))
    assert torch.equal(again.x, next(gradient_batches(model, record, "resid_post.1", batch_size=12, seed=0)).x)
    assert not torch.equal(again.x, next(gradient_batches(model, record, "resid_post.1", batch_size=12, seed=1)).x)


def test_permuted_gradients_are_those_of_other_tokens():
    batch = Gradients(x=torch.arange(20.0)[:, None], y=torch.arange(20.0)[:, None], g=torch.arange(20.0)[:, None])
    moved = next(permuted(iter([batch]), seed=0))
    assert torch.equal(moved.x, batch.x) and not torch.equal(moved.g, batch.g)
    assert torch.equal(moved.g.sort(0).values, batch.g)


def planted(n_batches: int) -> list[Gradients]:
    """Three of 12 directions at each token, and a gradient of its own for each token."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.linalg.qr(torch.randn(24, 24, generator=generator)).Q[:12]
    found = []
    for _ in range(n_batches):
        on = torch.rand(256, 12, generator=generator).topk(3, dim=1).indices
        x = torch.zeros(256, 12).scatter_(1, on, torch.rand(256, 3, generator=generator) + 0.5) @ truth
        found.append(Gradients(x=x, y=x, g=torch.randn(256, 24, generator=generator)))
    return found


def test_the_gradients_reach_the_selection():
    """Other gradients at the same activations give another dictionary; with beta = 0 they are not looked at."""
    batches = planted(20)
    for beta, same in ((3.0, False), (0.0, True)):
        cfg = TrainConfig(
            kind="gradient_topk", gradient_weight=beta, d_dict=20, k=3, n_steps=20, batch_size=256, lr=1e-2
        )  # fmt: skip
        own = train_by_gradient(iter(batches), batches[0], cfg).sae
        turned = [Gradients(x=batch.x, y=batch.y, g=batch.g.roll(1, 1)) for batch in batches]
        other = train_by_gradient(iter(turned), batches[0], cfg).sae
        assert torch.equal(own.W_dec, other.W_dec) == same


def test_beta_zero_is_plain_top_k_bit_for_bit():
    batches = planted(12)
    shared = {"d_dict": 20, "k": 3, "n_steps": 12, "batch_size": 256, "lr": 1e-2}
    ours = train_by_gradient(
        iter(batches), batches[0], TrainConfig(kind="gradient_topk", gradient_weight=0.0, **shared)
    ).sae  # fmt: skip
    plain = train_sae((batch.x for batch in batches), batches[0].x, TrainConfig(**shared)).sae
    assert torch.equal(ours.W_dec, plain.W_dec) and torch.equal(ours.W_enc, plain.W_enc)


def test_bad_input_is_named():
    model = tiny_model("llama")
    record = text(model)
    at = model.table.one("resid_post.0")
    with pytest.raises(InterpError, match="keep has shape"):
        loss_gradients(model, record, at, at, torch.ones(2, 8, dtype=torch.bool))
    with pytest.raises(InterpError, match="batch_size=0"):
        next(gradient_batches(model, record, "resid_post.0", batch_size=0, seed=0))
    with pytest.raises(InterpError, match="no token is left"):
        next(gradient_batches(model, text(model, 2, 2), "resid_post.0", batch_size=1, seed=0))
    with pytest.raises(InterpError, match="kind='topk' looks at no gradient"):
        train_by_gradient(iter(planted(1)), planted(1)[0], TrainConfig(d_dict=20, k=3))


@pytest.mark.slow
@pytest.mark.needs_model("smollm2-135m")
def test_on_a_real_model_the_directional_derivative_of_the_method_card_holds():
    """Layer 15, float32, a step of a thousandth of the norm: relative error below 1e-2."""
    from interp.models.load import load
    from interp.tasks.corpora import load_corpus

    model = load("smollm2-135m")
    record = load_corpus(model, "docs", 2, 64)
    at = model.table.one("resid_post.15")
    keep = inner_tokens(record)
    found = loss_gradients(model, record, at, at, keep)
    change = torch.zeros(2, 64, model.dims.d_model)
    change[keep] = 1e-3 * torch.nn.functional.normalize(found.g, dim=1) * found.x.norm(dim=1, keepdim=True)
    expected = float((change[keep] * found.g).sum())
    ends = [loss_with(model, record, str(at), sign * change) for sign in (1, -1)]
    assert (ends[0] - ends[1]) / 2 == pytest.approx(expected, rel=1e-2)
