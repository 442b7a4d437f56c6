"""Token predictor and logit lens where the answer is planted; AUC against scikit-learn."""

from __future__ import annotations

import pytest
import torch

from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.heldout import HeldOut
from interp.dictionaries.judge.lens import lens_logits, promoted_tokens
from interp.dictionaries.judge.lexical import Firings, auc, firings, lexical, token_rates
from interp.instrument.capture import capture
from interp.instrument.tokens import from_ids
from interp.models.tiny import tiny_model


def test_auc_is_scikit_learns():
    from sklearn.metrics import roc_auc_score

    generator = torch.Generator().manual_seed(0)
    score = (torch.rand(60, 3, generator=generator) * 8).round()  # ties
    positive = torch.rand(60, 3, generator=generator) < 0.3
    expected = [roc_auc_score(positive[:, i].numpy(), score[:, i].numpy()) for i in range(3)]
    assert auc(score, positive).tolist() == pytest.approx(expected)
    assert bool(auc(score, torch.zeros_like(positive)).isnan().all())


def test_rates_back_off_from_pair_to_token_to_mean():
    fires = torch.tensor([[1], [1], [0], [0]]).bool()
    seen = Firings(fires=fires, token=torch.tensor([7, 7, 7, 8]), before=torch.tensor([1, 1, 2, 2]),
                   after=torch.full((4,), -1))  # fmt: skip
    asked = Firings(fires=torch.zeros(4, 1).bool(), token=torch.tensor([7, 7, 7, 9]),
                    before=torch.tensor([1, 2, 3, 1]), after=torch.full((4,), -1))  # fmt: skip
    mean = 0.5
    token = (2 + mean) / 4  # token 7: two of three fire
    expected = [(2 + token) / 3, (0 + token) / 2, token, mean]
    assert token_rates(seen, asked)[:, 0].tolist() == pytest.approx(expected)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def held(model, seed: int, n: int = 30, length: int = 24) -> HeldOut:
    """Random tokens; coordinate 0 says token is even, 1 that the one before is below 50, 2 is noise, 3 always on."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 200, (n, length), generator=generator) // 4
    record = from_ids(model, ids)
    x = torch.zeros(n, length, 32)
    x[..., 0] = (ids % 2 == 0).float()
    x[:, 1:, 1] = (ids[:, :-1] < 10).float()
    x[..., 2] = (torch.rand(n, length, generator=generator) < 0.3).float()
    x[..., 3] = 1.0
    return HeldOut(record=record, site=model.table.one("resid_post.1"), x=x, keep=record.mask)


def reader(d: int = 32) -> SparseDictionary:
    sae = SparseDictionary(d, d, TopK(d))
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(d))
        sae.W_dec.copy_(torch.eye(d))
    return sae


def test_lexical_latents_are_told_from_others(model):
    found = lexical(model, reader(), held(model, 0, n=200), held(model, 1, n=40))
    table = found.table.set_index("latent")
    assert table.index.tolist() == [0, 1, 2]  # latent 3 fires everywhere, 4.. nowhere
    assert found.n_rare == 29
    assert table.loc[0, "token_auc"] == 1.0
    assert table.loc[1, "token_auc"] > 0.8  # needs the token before
    assert table.loc[2, "token_auc"] == pytest.approx(0.5, abs=0.08)
    assert table["token_auc_null"].tolist() == pytest.approx([0.5] * 3, abs=0.08)
    with pytest.raises(InterpError, match="other text"):
        lexical(model, reader(), held(model, 0), held(model, 0))


def test_firings_know_their_neighbours(model):
    data = held(model, 0, n=2, length=5)
    at = firings(reader(), data)
    ids = data.record.ids
    assert at.token.tolist() == ids.flatten().tolist()
    assert at.before.view(2, 5)[:, 0].tolist() == [-1, -1] and at.after.view(2, 5)[:, -1].tolist() == [-1, -1]
    assert torch.equal(at.before.view(2, 5)[:, 1:], ids[:, :-1]) and torch.equal(
        at.after.view(2, 5)[:, :-1], ids[:, 1:]
    )
    assert torch.equal(at.fires[:, 0], (ids.flatten() % 2 == 0))


def test_a_latent_that_says_the_next_token_is_lifted(model):
    """Latent 0 fires before token 7 alone, and its row is the unembedding of token 7."""
    generator = torch.Generator().manual_seed(0)
    both = []
    for _ in range(2):
        ids = torch.randint(0, 20, (40, 24), generator=generator)
        record, x = from_ids(model, ids), torch.zeros(40, 24, 32)
        x[:, :-1, 0] = (ids[:, 1:] == 7).float()
        x[..., 1] = (ids == 3).float()
        both.append(HeldOut(record=record, site=model.table.one("resid_post.1"), x=x, keep=record.mask))
    sae = reader()
    with torch.no_grad():
        sae.W_dec[0] = 10 * model.weight("W_U")[:, 7]
    found = lexical(model, sae, *both).table.set_index("latent")
    assert found.loc[0, "lens"] == 1.0 and found.loc[0, "lens_base"] < 0.5
    assert found.loc[0, "lens_null"] < 0.6


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_the_lens_is_the_models_own_readout(family):
    """Of the last residual: norm and unembedding of the model, up to a scale per row and the norm's bias."""
    model = tiny_model(family)
    record = from_ids(model, torch.randint(0, 256, (2, 6), generator=torch.Generator().manual_seed(0)))
    last = Site(Part.RESID_POST, model.n_layers - 1)
    norm = Site(Part.FINAL_NORM)
    with capture(model, [last, norm], stop=False) as acts:
        model(record)
    x = acts[last].reshape(-1, 32)
    module = model.module.get_submodule(model.table.reach(norm).path)
    bias = getattr(module, "bias", None)
    normed = acts[norm].reshape(-1, 32) - (0 if bias is None else bias.detach())
    expected, found = normed @ model.weight("W_U"), lens_logits(model, x)
    assert found is not None
    torch.testing.assert_close(
        torch.nn.functional.normalize(found, dim=1), torch.nn.functional.normalize(expected, dim=1), atol=1e-5, rtol=0
    )
    tokens = promoted_tokens(model, x, k=3, block=5)
    assert tokens is not None and torch.equal(tokens[:, 0], expected.argmax(1))


def test_without_a_lens_there_is_none(model):
    assert lens_logits(model, torch.ones(2, 8)) is None and promoted_tokens(model, torch.ones(3, 8)) is None
