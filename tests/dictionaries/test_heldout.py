"""Spliced losses against a naive loop and against the model itself; held-out scores against their parts."""

from __future__ import annotations

import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.baselines import PCADictionary, ZeroDictionary
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.examples import top_examples
from interp.dictionaries.heldout import HeldOut, held_out, score, sequence_fvu
from interp.dictionaries.splice import loss_recovered, n_predicted, sequence_losses, spliced_losses
from interp.instrument.capture import capture
from interp.instrument.edits import clamp_feature, edited, set_to
from interp.instrument.tokens import TokenRecord, tokenize
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def record(model: LoadedModel) -> TokenRecord:
    return tokenize(model, ["gates open and close", "a dictionary", "of few directions", "xyzw"], pad="right")


def everything(record: TokenRecord) -> torch.Tensor:
    return record.mask.clone()


def identity(d: int) -> PCADictionary:
    """Reconstructs exactly: all principal components of nothing."""
    return PCADictionary(torch.zeros(d), torch.eye(d))


def test_losses_equal_a_loop_over_tokens(model, record):
    logits = model(record)
    expected = torch.zeros(len(record), dtype=torch.float64)
    count = 0
    for row in range(len(record)):
        for position in range(int(record.mask[row].sum()) - 1):
            p = torch.softmax(logits[row, position].double(), dim=-1)[record.ids[row, position + 1]]
            expected[row] -= torch.log(p)
            count += 1
    torch.testing.assert_close(sequence_losses(logits, record), expected, rtol=1e-5, atol=1e-5)
    assert n_predicted(record) == count


def test_the_exact_dictionary_changes_nothing_and_zero_is_zero_ablation(model, record):
    site = model.table.one("resid_post.1")
    conditions = {"base": None, "exact": identity(32), "zero": ZeroDictionary(torch.zeros(32))}
    keep = everything(record)
    found = spliced_losses(model, record, site, conditions, keep)
    assert torch.equal(found["base"], sequence_losses(model(record), record))
    torch.testing.assert_close(found["exact"], found["base"], rtol=1e-4, atol=1e-4)
    with edited(model, set_to(site, 0.0, at=keep)):
        ablated = sequence_losses(model(record), record)
    assert torch.equal(found["zero"], ablated)
    assert not torch.allclose(found["zero"], found["base"], rtol=1e-2)


def test_tokens_that_are_not_kept_keep_their_own_activation(model, record):
    site = model.table.one("resid_post.1")
    keep = everything(record)
    keep[:, 0] = False
    keep[1] = False  # a whole sequence untouched
    zero = ZeroDictionary(torch.zeros(32))
    found = spliced_losses(model, record, site, {"base": None, "zero": zero}, keep, batch_size=1)
    assert torch.equal(found["zero"][1], found["base"][1])
    assert float((found["zero"] - found["base"]).abs().max()) > 0.1


def test_batch_split_does_not_matter(model, record):
    site = model.table.one("resid_post.1")
    sae = SparseDictionary.random(32, 64, TopK(4), seed=0)
    one = spliced_losses(model, record, site, {"sae": sae}, everything(record), batch_size=4)["sae"]
    many = spliced_losses(model, record, site, {"sae": sae}, everything(record), batch_size=1)["sae"]
    torch.testing.assert_close(one, many, rtol=1e-4, atol=1e-4)


def test_scores_agree_with_their_parts(model, record):
    site = model.table.one("resid_post.1")
    data = held_out(model, record, site, drop_norm=10.0, median=1e9)
    assert not bool(data.keep[:, 0].any()) and int(data.keep.sum()) == record.n_tokens - len(record)
    sae = SparseDictionary.random(32, 64, TopK(4), seed=0)
    scores, base = score(model, data, {"sae": sae, "exact": identity(32)})
    assert float(scores["sae"].fvu.mean()) == pytest.approx(scores["sae"].evaluation.fvu, rel=1e-6)
    assert scores["exact"].evaluation.fvu == pytest.approx(0.0, abs=1e-9)
    flat = data.x[data.keep]
    wanted = (flat - sae(flat)).square().sum() / (flat - flat.mean(0)).square().sum()
    assert scores["sae"].evaluation.fvu == pytest.approx(float(wanted.detach()), rel=1e-4)
    ce = sequence_losses(model(record), record).sum() / n_predicted(record)
    assert float(base.mean()) == pytest.approx(float(ce))
    assert sequence_fvu(sae, data).shape == (len(record),)


def test_massive_tokens_are_left_out_by_the_training_median(model, record):
    site = model.table.one("resid_post.1")
    everyone = held_out(model, record, site, drop_norm=0.0, median=1.0)
    assert torch.equal(everyone.keep, record.mask)
    norms = everyone.x.norm(dim=-1)
    cut = float(norms[record.mask].sort().values[-4])
    some = held_out(model, record, site, drop_norm=1.0, median=cut)
    assert torch.equal(some.keep, record.mask & (norms <= cut) & (torch.arange(record.ids.shape[1]) > 0))
    with pytest.raises(InterpError, match="keeps no token"):
        held_out(model, record, site, drop_norm=1.0, median=1e-6)


def test_examples_are_the_most_active_tokens_in_their_context(model, record):
    site = model.table.one("resid_post.1")
    data = held_out(model, record, site, drop_norm=0.0, median=1.0)
    x = data.x.clone()
    x[2, 3], x[0, 5], x[1, 0] = 900.0, 800.0, 700.0  # latent 1 reads coordinate 0 alone
    planted = HeldOut(record=record, site=site, x=x, keep=data.keep)
    sae = SparseDictionary(32, 2, TopK(1))
    with torch.no_grad():
        sae.W_enc[0, 1] = 1.0
        sae.b_enc[1] = -500.0
    table = top_examples(sae, planted, n_latents=9, n_examples=2, window=2)
    assert table["latent"].tolist() == [1, 1] and table["rank"].tolist() == [1, 2]
    assert table["activation"].tolist() == pytest.approx([400.0, 300.0])
    assert table[["sequence", "pos"]].to_numpy().tolist() == [[2, 3], [0, 5]]
    text = record.strings[2]
    first = table.iloc[0]
    assert (first["before"], first["token"], first["after"]) == ("".join(text[1:3]), text[3], "".join(text[4:6]))
    assert first["density"] == pytest.approx(3 / record.n_tokens)
    silent = SparseDictionary(32, 2, TopK(1))
    assert list(top_examples(silent, planted).columns) == list(table.columns)
    assert len(top_examples(silent, planted)) == 0
    with pytest.raises(InterpError, match="n_latents=0"):
        top_examples(sae, planted, n_latents=0)


def test_loss_recovered():
    assert loss_recovered(10.0, 4.0, 2.0) == pytest.approx(0.75)
    assert loss_recovered(10.0, 10.0, 2.0) == 0.0 and loss_recovered(10.0, 2.0, 2.0) == 1.0
    assert loss_recovered(10.0, 12.0, 2.0) == pytest.approx(-0.25)  # worse than zeros is said, not clipped
    assert loss_recovered(2.0, 2.0, 2.0) is None and loss_recovered(1.0, 2.0, 2.0) is None


def test_bad_input_is_named(model, record):
    site = model.table.one("resid_post.1")
    sae = SparseDictionary.random(32, 64, TopK(4), seed=0)
    with pytest.raises(InterpError, match="no token is left to replace"):
        spliced_losses(model, record, site, {"sae": sae}, torch.zeros_like(record.mask))
    with pytest.raises(InterpError, match="keep has shape"):
        spliced_losses(model, record, site, {"sae": sae}, record.mask[:1])
    with pytest.raises(InterpError, match="width 32 do not fit a dictionary with d_in=8"):
        spliced_losses(model, record, site, {"sae": SparseDictionary.random(8, 16, TopK(2), seed=0)}, record.mask)


def test_clamping_a_latent_moves_the_activation_along_its_feature(model, record):
    """The edit and the dictionary agree on units: the latent read afterwards is the value asked for."""
    site = model.table.one("resid_post.1")
    sae = SparseDictionary(32, 3, TopK(3))
    with torch.no_grad():  # orthonormal rows: clamping one latent leaves the others
        sae.W_dec.copy_(torch.linalg.qr(torch.randn(32, 3, generator=torch.Generator().manual_seed(0))).Q.T)
        sae.W_enc.copy_(sae.W_dec.t())
        sae.b_enc.fill_(50.0)  # all latents positive
        sae.scale_in.fill_(0.5)
        sae.scale_out.fill_(0.5)
    plain = sae.folded()
    with edited(model, clamp_feature(site, plain, 1, 123.0)), capture(model, site) as acts:
        model(record)
    with capture(model, site) as untouched:
        model(record)
    after, before = plain.encode(acts[site]).dense(), plain.encode(untouched[site]).dense()
    moved = (acts[site] - untouched[site]) @ plain.features.T / plain.features.square().sum(1)
    torch.testing.assert_close(moved[..., 1], 123.0 - before[..., 1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after[..., [0, 2]], before[..., [0, 2]], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(after[..., 1], torch.full_like(after[..., 1], 123.0), rtol=1e-3, atol=1e-3)
