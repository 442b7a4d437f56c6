"""Activations: inference and training against dense references, gradients by closed forms and finite differences."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries import losses
from interp.dictionaries.activations.batch_topk import BatchTopK
from interp.dictionaries.activations.gated import Gated
from interp.dictionaries.activations.gradient_topk import GradientTopK
from interp.dictionaries.activations.group_max import GroupMax
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.activations.relu import ReLU
from interp.dictionaries.activations.table import ACTIVATIONS, rebuild
from interp.dictionaries.activations.top_afa import TopAFA
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.activity import observe
from interp.dictionaries.codes import from_dense, pack
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.train import Stepper, TrainConfig, initial

D, M, B = 10, 24, 17


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def made(activation, **options) -> SparseDictionary:
    sae = SparseDictionary(D, M, activation, dtype=torch.float64, **options)
    with torch.no_grad():
        sae.W_enc.copy_(noise(D, M, seed=1))
        sae.b_enc.copy_(0.3 * noise(M, seed=2))
        sae.W_dec.copy_(noise(M, sae.d_out, seed=3))
        sae.b_dec.copy_(0.2 * noise(sae.d_out, seed=4))
    return sae


def preactivations(sae: SparseDictionary, x: torch.Tensor) -> torch.Tensor:
    return ((x - sae.b_dec) @ sae.W_enc + sae.b_enc).detach()


def test_pack_fills_as_many_slots_as_the_fullest_row_needs():
    z = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    values, indices = pack(z, torch.tensor([[True, False, True], [False, False, False], [False, True, False]]))
    assert values.tolist() == [[1.0, 3.0], [0.0, 0.0], [8.0, 0.0]] and indices[0].tolist() == [0, 2]
    empty = pack(z, torch.zeros(3, 3, dtype=torch.bool))
    assert empty[0].shape == (3, 0)
    f = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]])
    assert torch.equal(from_dense(f).dense(), f)


def test_relu_keeps_the_positive():
    sae, x = made(ReLU()), noise(B, D)
    torch.testing.assert_close(sae.encode(x).dense(), preactivations(sae, x).clamp_min(0))


def test_jump_relu_drops_what_its_threshold_does_not_pass():
    sae, x = made(JumpReLU(M, threshold=0.7)), noise(B, D)
    z = preactivations(sae, x)
    torch.testing.assert_close(sae.encode(x).dense(), torch.where(z > 0.7, z, 0))
    torch.testing.assert_close(observe(sae, x).f, sae.encode(x).dense())


def test_gated_equals_its_definition_and_relu_when_the_maps_agree():
    sae, x = made(Gated(M)), noise(B, D)
    with torch.no_grad():
        sae.activation.r_mag.copy_(0.3 * noise(M, seed=5))
        sae.activation.b_mag.copy_(0.3 * noise(M, seed=6))
    u = x - sae.b_dec
    gate = (u @ sae.W_enc + sae.b_enc) > 0
    magnitude = (u @ (sae.W_enc * sae.activation.r_mag.exp()) + sae.activation.b_mag).clamp_min(0)
    torch.testing.assert_close(sae.encode(x).dense(), (gate * magnitude).detach())
    torch.testing.assert_close(observe(sae, x).f.detach(), (gate * magnitude).detach())
    with torch.no_grad():
        sae.activation.r_mag.zero_()
        sae.activation.b_mag.copy_(sae.b_enc)
    torch.testing.assert_close(sae(x), made(ReLU())(x))


def test_group_max_takes_the_largest_of_each_group():
    sae, x = made(GroupMax(6)), noise(B, D)
    z = preactivations(sae, x)
    expected = torch.zeros_like(z)
    for row, group in itertools.product(range(B), range(6)):
        best = max(range(4 * group, 4 * group + 4), key=lambda i: float(z[row, i]))
        expected[row, best] = z[row, best].clamp_min(0)
    torch.testing.assert_close(sae.encode(x).dense(), expected)
    with pytest.raises(InterpError, match="multiple of k=7"):
        made(GroupMax(7)).encode(x)


def test_batch_topk_keeps_the_largest_of_the_batch_then_a_threshold():
    sae, x = made(BatchTopK(3)), noise(B, D)
    with pytest.raises(InterpError, match="no threshold yet"):
        sae.encode(x)
    at = observe(sae, x)
    z = preactivations(sae, x)
    cut = z.flatten().sort(descending=True).values[3 * B - 1]
    torch.testing.assert_close(at.codes.dense(), torch.where(z >= cut, z, 0).clamp_min(0))
    sae.activation.observe(at.codes.values.detach(), at.codes.indices)
    assert float(sae.activation.threshold) == pytest.approx(float(cut))
    sae.activation.threshold.fill_(0.5)
    lower = torch.where(z > 0.5, z, 0)
    torch.testing.assert_close(sae.encode(x).dense(), lower)
    alone = torch.cat([sae.encode(row[None]).dense() for row in x])
    torch.testing.assert_close(alone, lower)  # who else is in the batch does not matter
    assert "activation.threshold" in sae.state_dict()


def test_top_afa_picks_the_k_whose_code_norm_meets_the_input_norm():
    sae, x = made(TopAFA()), noise(B, D)
    z, norms = preactivations(sae, x).clamp_min(0), sae.W_dec.detach().norm(dim=1)
    codes = sae.encode(x).dense()
    for row in range(B):
        sizes, order = (z[row] * norms).sort(descending=True)
        goal = float((x[row] - sae.b_dec.detach()).norm())
        best = min(range(1, M + 1), key=lambda n: abs(math.sqrt(float(sizes[:n].square().sum())) - goal))
        expected = torch.zeros(M, dtype=torch.float64)
        expected[order[:best]] = z[row, order[:best]]
        torch.testing.assert_close(codes[row].detach(), expected)


def test_top_afa_is_not_folded_where_that_would_change_which_latents_fire():
    """It compares |f| with |u|: one scale for both leaves the comparison as it is, two scales do not."""
    x = noise(40, 6)
    sae = SparseDictionary.random(6, 12, TopAFA(), seed=0, dtype=torch.float64)
    sae.scale_in = sae.scale_out = torch.tensor(3.0, dtype=torch.float64)
    torch.testing.assert_close(sae.folded()(x), sae(x))
    for scale_in, scale_out in (
        (torch.tensor(3.0), torch.tensor(0.5)),
        (torch.tensor([1.0, 1, 1, 4, 4, 4]), torch.tensor([1.0, 1, 1, 4, 4, 4])),
    ):
        sae.scale_in, sae.scale_out = scale_in.double(), scale_out.double()
        with pytest.raises(InterpError, match="norms of input and output"):
            sae.folded()
    with pytest.raises(InterpError, match="in two spaces"):
        initial(x.float(), TrainConfig(kind="top_afa", d_dict=12, k=4), targets=x.float())


def test_top_afa_on_an_orthonormal_dictionary_keeps_exactly_the_active():
    sae = SparseDictionary(6, 6, TopAFA(), dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(6))
        sae.W_dec.copy_(torch.eye(6))
    x = torch.tensor([[3.0, 0, 0, 4.0, 0, 0]], dtype=torch.float64)
    assert sae.encode(x).dense().tolist() == x.tolist()


def test_gradient_topk_without_weight_or_gradient_is_topk_bit_for_bit():
    x, g = noise(B, D), noise(B, D, seed=9)
    plain = observe(made(TopK(4)), x).codes
    for activation, gradient in ((GradientTopK(4, beta=0.0), g), (GradientTopK(4, beta=3.0), None)):
        found = observe(made(activation), x, gradient=gradient).codes
        assert torch.equal(found.values, plain.values) and torch.equal(found.indices, plain.indices)


def test_gradient_topk_by_hand_and_without_gradient_through_the_choice():
    sae = SparseDictionary(3, 3, GradientTopK(1, beta=1.0), dtype=torch.float64)
    with torch.no_grad():
        sae.W_enc.copy_(torch.eye(3))
        sae.W_dec.copy_(torch.eye(3))
    x = torch.tensor([[3.0, 2.0, 1.0]], dtype=torch.float64)
    # effects relative to that of the largest latent: 1, 4, 0 -> scores 3 * 2, 2 * 5, 1 * 1
    g = torch.tensor([[0.5, -2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    at = observe(sae, x, gradient=g)
    assert at.codes.dense().tolist() == [[0.0, 2.0, 0.0]]
    losses.squared(at).backward()
    assert g.grad is None


def test_gradient_topk_finds_a_weak_feature_that_alone_matters():
    """20 strong directions (three on, size 1) and one weak one (size .2) that alone determines the loss."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64)).Q[:21]
    strong = torch.stack([torch.randperm(20, generator=generator)[:3] for _ in range(500)])
    codes = torch.zeros(500, 21, dtype=torch.float64).scatter(1, strong, 1.0)
    codes[:, 20] = 0.2
    gradient = torch.randn(500, 1, generator=generator, dtype=torch.float64) * basis[20]
    recall = {}
    for beta in (0.0, 3.0, 30.0):
        sae = SparseDictionary(64, 21, GradientTopK(3, beta=beta), dtype=torch.float64)
        with torch.no_grad():
            sae.W_enc.copy_(basis.t())
            sae.W_dec.copy_(basis)
        found = observe(sae, codes @ basis, gradient=gradient).codes.dense()
        recall[beta] = float((found[:, 20] > 0).double().mean())
    assert recall[0.0] == 0.0 and recall[30.0] > 0.99


def test_straight_through_estimates_inside_and_outside_the_window():
    jump = JumpReLU(1, threshold=0.3, bandwidth=0.1)
    for z, in_f, in_h in ((0.32, -3.0, -10.0), (0.28, -3.0, -10.0), (0.4, 0.0, 0.0), (0.1, 0.0, 0.0)):
        at = torch.tensor([[z]], requires_grad=True)
        theta = jump.threshold.detach()
        for value, expected in ((jump.values(at, torch.zeros(1)), in_f), (jump.fired(at), in_h)):
            jump.log_threshold.grad = at.grad = None
            value.sum().backward()
            to_theta = float(jump.log_threshold.grad) / float(theta)  # d theta / d log theta = theta
            assert to_theta == pytest.approx(expected, rel=1e-5)
    z = noise(400_000, 1, seed=3).float()
    jump.log_threshold.grad = None
    jump.fired(z).mean().backward()
    density = math.exp(-0.045) / math.sqrt(2 * math.pi)  # of N(0, 1) at the threshold
    assert float(jump.log_threshold.grad) / 0.3 == pytest.approx(-density, rel=0.03)


@pytest.mark.parametrize("activation", [ReLU(), JumpReLU(M, threshold=0.2), Gated(M)], ids=lambda a: a.kind)
def test_unit_rows_leave_the_reconstruction(activation):
    sae, x = made(activation), noise(B, D)
    if isinstance(sae.activation, Gated):
        with torch.no_grad():
            sae.activation.r_mag.copy_(0.3 * noise(M, seed=5))
            sae.activation.b_mag.copy_(0.3 * noise(M, seed=6))
    unit = sae.unit_rows()
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(M, dtype=torch.float64))
    torch.testing.assert_close(unit(x), sae(x))
    torch.testing.assert_close(unit.encode(x).dense(), sae.encode(x).dense() * sae.W_dec.detach().norm(dim=1))


def test_unit_rows_refuse_kinds_whose_choice_would_change():
    with pytest.raises(InterpError, match="unit rows would change"):
        made(TopK(3)).unit_rows()


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
def test_every_activation_is_rebuilt_from_its_settings(kind):
    given = {"k": 4} if kind in ("topk", "batch_topk", "group_max", "gradient_topk") else {}
    first = rebuild(kind, M, given)
    again = rebuild(kind, M, first.settings())
    assert type(again) is type(first) and again.settings() == first.settings() and first.kind == kind


@pytest.mark.parametrize("kind", sorted(ACTIVATIONS))
@pytest.mark.parametrize("shape", [(D,), (0, D), (2, 3, D)])
def test_any_leading_axes_and_folding(kind, shape):
    sae = made(rebuild(kind, M, {"k": 4} if kind in ("topk", "batch_topk", "group_max", "gradient_topk") else {}))
    if kind == "batch_topk":
        sae.activation.threshold.fill_(0.5)
    sae.scale_in, sae.scale_out = torch.tensor(0.5).double(), torch.tensor(0.5).double()
    x = noise(*shape)
    codes = sae.encode(x)
    assert codes.values.shape[:-1] == shape[:-1] and sae(x).shape == x.shape
    folded = sae.folded()
    torch.testing.assert_close(folded.encode(x).dense(), codes.dense())
    torch.testing.assert_close(folded(x), sae(x))


def test_gradients_of_encode_run_through_active_latents_only():
    for activation in (ReLU(), JumpReLU(M, threshold=0.4), Gated(M), TopK(5)):
        sae, x = made(activation), noise(B, D).requires_grad_(True)
        dense = sae.encode(x).dense()
        (grad,) = torch.autograd.grad((dense * noise(B, M, seed=8)).sum(), x)
        step = noise(B, D, seed=10)
        eps = 1e-6
        change = ((sae.encode(x + eps * step).dense() - sae.encode(x - eps * step).dense()) * noise(B, M, seed=8)).sum()
        assert float((grad * step).sum()) == pytest.approx(float(change) / (2 * eps), rel=1e-4)


def test_skip_and_token_norms_are_undone():
    x = 5 * noise(B, D) + 3
    skip = made(TopK(4), d_out=7, skip=True)
    with torch.no_grad():
        skip.W_skip.copy_(noise(D, 7, seed=11))
    skip.scale_in, skip.scale_out = torch.tensor(2.0).double(), torch.tensor(0.25).double()
    plain = SparseDictionary(D, M, TopK(4), d_out=7, dtype=torch.float64)
    plain.load_state_dict({k: v for k, v in skip.state_dict().items() if k != "W_skip"})
    torch.testing.assert_close(skip(x) - plain(x), (2.0 * x) @ skip.W_skip / 0.25)
    torch.testing.assert_close(skip.folded()(x), skip(x))
    for norm in ("layer_norm", "constant_norm"):
        sae = made(TopK(4), token_norm=norm)
        shifted = x * 3 + 2 if norm == "layer_norm" else x * 3
        expected = sae(x) * 3 + 2 if norm == "layer_norm" else sae(x) * 3
        torch.testing.assert_close(sae(shifted), expected, rtol=1e-4, atol=1e-4)
        perfect = SparseDictionary(D, 2 * D, TopK(2 * D), token_norm=norm, dtype=torch.float64)
        with torch.no_grad():
            perfect.W_dec.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
            perfect.W_enc.copy_(perfect.W_dec.t())
        torch.testing.assert_close(perfect(x), x)


KINDS = ("topk", "batch_topk", "matryoshka", "multi_topk", "group_max", "top_afa", "gradient_topk", "relu",
         "jump_relu", "gated")  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_learns_planted_features_and_resumes_bit_for_bit(kind):
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(32, 16, generator=generator), dim=1)

    def batch(step: int) -> torch.Tensor:
        source = torch.Generator().manual_seed(step)
        active = torch.rand(256, 32, generator=source) < 0.09
        return (active * (0.5 + torch.rand(256, 32, generator=source))) @ truth + 0.3

    cfg = TrainConfig(kind=kind, d_dict=32, k=4, n_steps=300, batch_size=256, lr=3e-3, shells=(0.5, 0.5),
                      threshold=0.5, bandwidth=0.3, dead_after_tokens=20_000,
                      sparsity_weight=0.3 if kind == "relu" else -1.0)  # fmt: skip
    sample = torch.cat([batch(10_000 + i) for i in range(4)])
    given = {"gradient": noise(256, 16).float()} if kind == "gradient_topk" else {}
    steps = Stepper(initial(sample, cfg), cfg)
    rows, saved = [], None
    for number in range(cfg.n_steps):
        if number == 290:
            saved = {key: _copy(value) for key, value in steps.state().items()}
        rows.append(steps.step(number, batch(number), **given))
    assert rows[-1]["fvu"] < 0.6 * rows[0]["fvu"] and rows[-1]["fvu"] < 0.5
    assert rows[-1]["l0"] <= (20 if kind in ("relu", "jump_relu", "gated", "top_afa") else cfg.k)
    again = Stepper(initial(sample, cfg), cfg)
    again.restore(saved)
    for number in range(290, cfg.n_steps):
        again.step(number, batch(number), **given)
    for (name, a), (_, b) in zip(steps.sae.state_dict().items(), again.sae.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_gradient_topk_without_a_gradient_is_refused():
    cfg = TrainConfig(kind="gradient_topk", d_dict=8, k=2)
    x = noise(20, 4).float()
    with pytest.raises(InterpError, match="pass it with every batch"):
        Stepper(initial(x, cfg), cfg).step(0, x)


def _copy(value):
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value
