"""SparseDictionary and its losses: against a dense reference written here, and against identities."""

from __future__ import annotations

import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.base import Dictionary
from interp.dictionaries.codes import SparseCodes
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.losses import auxk_loss


def filled(d_in: int = 12, d_dict: int = 30, k: int = 4, dtype: torch.dtype = torch.float64) -> SparseDictionary:
    sae = SparseDictionary.random(d_in, d_dict, TopK(k), seed=1, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=dtype))
        sae.scale_in.fill_(0.25)
        sae.scale_out.fill_(0.25)
    return sae


def inputs(n: int = 23, d_in: int = 12) -> torch.Tensor:
    return 4 * torch.randn(n, d_in, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def reference(sae: SparseDictionary, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense latents and reconstruction, from the equations of the module docstring."""
    u = x * sae.scale_in - sae.b_dec
    z = u @ sae.W_enc + sae.b_enc
    keep = torch.zeros_like(z).scatter_(-1, z.topk(sae.activation.k, dim=-1).indices, 1.0)
    f = torch.relu(z * keep)
    return f, (f @ sae.W_dec + sae.b_dec) / sae.scale_in


@pytest.mark.parametrize("k", [1, 4, 30])
def test_latents_reconstruction_and_gradients_equal_dense_autograd(k):
    sae, twin = filled(k=k), filled(k=k)
    x = inputs()
    codes = sae.encode(x)
    f, x_hat = reference(twin, x)
    torch.testing.assert_close(codes.dense(), f, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sae.decode(codes), x_hat, rtol=1e-12, atol=1e-12)
    (x - sae(x)).square().sum().backward()
    (x - x_hat).square().sum().backward()
    for (name, ours), (_, theirs) in zip(sae.named_parameters(), twin.named_parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-10, msg=name)


def test_k_equal_to_d_dict_is_a_relu_autoencoder():
    sae = filled(k=30)
    x = inputs()
    z = (x * sae.scale_in - sae.b_dec) @ sae.W_enc + sae.b_enc
    torch.testing.assert_close(sae.encode(x).dense(), z.relu())


def test_folding_leaves_latents_and_reconstructions():
    sae, x = filled(), inputs()
    plain = sae.folded()
    assert float(plain.scale_in) == 1.0 and float(plain.folded().scale_in) == 1.0
    torch.testing.assert_close(plain.encode(x).dense(), sae.encode(x).dense())
    torch.testing.assert_close(plain(x), sae(x))
    torch.testing.assert_close(plain.features, sae.features)


def test_features_are_what_a_latent_adds_to_the_reconstruction():
    sae, x = filled(), inputs(1)
    codes = sae.encode(x)
    raised = SparseCodes(codes.values.clone(), codes.indices, codes.d_dict)
    raised.values[0, 2] += 1.0
    torch.testing.assert_close(sae.decode(raised) - sae.decode(codes), sae.features[codes.indices[0, 2]][None])


def test_the_scale_is_saved_with_the_weights():
    sae = filled()
    again = SparseDictionary(12, 30, TopK(4), dtype=torch.float64)
    again.load_state_dict(sae.state_dict())
    assert torch.equal(again.scale_in, sae.scale_in) and torch.equal(again(inputs()), sae(inputs()))


def test_permuting_latents_permutes_codes_and_nothing_else():
    sae, x = filled(), inputs()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    other = SparseDictionary(12, 30, TopK(4), dtype=torch.float64)
    with torch.no_grad():
        other.W_enc.copy_(sae.W_enc[:, order])
        other.b_enc.copy_(sae.b_enc[order])
        other.W_dec.copy_(sae.W_dec[order])
        other.b_dec.copy_(sae.b_dec)
        other.scale_in.copy_(sae.scale_in)
        other.scale_out.copy_(sae.scale_out)
    torch.testing.assert_close(other.encode(x).dense(), sae.encode(x).dense()[:, order])
    torch.testing.assert_close(other(x), sae(x))


@pytest.mark.parametrize("shape", [(12,), (0, 12), (2, 3, 12), (2, 0, 12)])
def test_any_leading_axes(shape):
    sae = filled()
    x = torch.randn(*shape, dtype=torch.float64)
    codes = sae.encode(x)
    assert codes.values.shape == (*shape[:-1], 4) and sae(x).shape == x.shape
    assert codes.dense().shape == (*shape[:-1], 30)


def test_batch_split_and_precision():
    sae, x = filled(), inputs()
    torch.testing.assert_close(torch.cat([sae(x[:7]), sae(x[7:])]), sae(x))
    single = filled().float()
    torch.testing.assert_close(single(x.float()).double(), sae(x), rtol=1e-4, atol=1e-4)


def test_codes_views_agree():
    codes = SparseCodes(torch.tensor([[1.0, 0.0], [2.0, 3.0]]), torch.tensor([[4, 1], [0, 4]]), 5)
    assert codes.dense().tolist() == [[0, 0, 0, 0, 1.0], [2.0, 0, 0, 0, 3.0]]
    assert torch.equal(codes.coo().to_dense(), codes.dense()) and codes.coo()._nnz() == 3
    assert codes.l0().tolist() == [1, 2] and codes.firings().tolist() == [1, 0, 0, 0, 2]
    nothing = SparseCodes(torch.zeros(3, 0), torch.zeros(3, 0, dtype=torch.long), 5)
    assert nothing.dense().abs().sum() == 0 and nothing.firings().sum() == 0 and nothing.coo()._nnz() == 0


def test_auxk_trains_encoder_and_decoder_of_dead_latents_only():
    sae, x = filled(), inputs()
    with torch.no_grad():
        sae.b_enc[:6] -= 50.0  # never selected by top-k
    dead = torch.zeros(30, dtype=torch.bool)
    dead[:6] = True
    with torch.no_grad():
        sae.b_enc[:6] += 50.0
    u = sae.centred(x)
    error = torch.randn(u.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64, requires_grad=True)
    auxk_loss(sae, u, error, dead).backward()
    assert error.grad is None  # the target is a constant
    assert sae.W_enc.grad[:, :6].abs().max() > 1e-6 and sae.W_enc.grad[:, 6:].abs().max() == 0
    assert sae.W_dec.grad[:6].abs().max() > 1e-6 and sae.W_dec.grad[6:].abs().max() == 0


def test_auxk_value_and_gradient_equal_a_dense_reference():
    sae, twin, x = filled(), filled(), inputs()
    dead = torch.arange(30) % 3 == 0  # 10 dead latents, k_aux = d_in / 2 = 6
    u = sae.centred(x)
    e = torch.randn(u.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = auxk_loss(sae, u, e, dead)
    v = x * twin.scale_in - twin.b_dec
    z = (v @ twin.W_enc + twin.b_enc).masked_fill(~dead, float("-inf"))
    f = torch.zeros_like(z).scatter(-1, z.topk(6, dim=-1).indices, z.topk(6, dim=-1).values.relu())
    expected = (f @ twin.W_dec - e).square().sum() / (e - e.mean(0)).square().sum()
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(sae, name).grad, getattr(twin, name).grad, msg=name)


def test_auxk_is_zero_without_dead_latents_or_variance():
    sae, x = filled(), inputs()
    u = sae.centred(x)
    none, every = torch.zeros(30, dtype=torch.bool), torch.ones(30, dtype=torch.bool)
    assert float(auxk_loss(sae, u, torch.ones_like(u), none)) == 0.0
    assert float(auxk_loss(sae, u, torch.zeros_like(u), every).detach()) == 0.0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SparseDictionary(8, 48, TopK(64)), "k=64 must lie in 1..d_dict=48; lower k or widen the dictionary"),
        (lambda: SparseDictionary(8, 48, TopK(0)), "k=0"),
        (lambda: SparseDictionary(0, 48, TopK(1)), "d_in=0"),
        (lambda: filled().encode(torch.zeros(2, 5)), "width 5 do not fit a dictionary with d_in=12"),
        (lambda: filled().decode(SparseCodes(torch.zeros(1, 1), torch.zeros(1, 1).long(), 7)), "d_dict=30"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InterpError, match=message):
        call()


def test_it_is_a_dictionary():
    assert isinstance(filled(), Dictionary)
