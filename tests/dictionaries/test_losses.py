"""Every term of the training loss, value and gradients, against its formula written with dense tensors in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from interp.core.seed import torch_generator
from interp.dictionaries import losses
from interp.dictionaries.activations.base import Activation
from interp.dictionaries.activations.batch_topk import BatchTopK
from interp.dictionaries.activations.gated import Gated
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.activations.relu import ReLU
from interp.dictionaries.activations.top_afa import TopAFA
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.activity import observe
from interp.dictionaries.dictionary import SparseDictionary

D, M, B = 6, 16, 40
DEAD = torch.arange(M) % 3 == 0


def noise(name: str, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch_generator(0, name), dtype=torch.float64)


X = noise("x", B, D)


def made(activation: Activation) -> SparseDictionary:
    """Rows of other norms than 1, biases that are not 0."""
    sae = SparseDictionary(D, M, activation, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.add_(0.5 * noise(name, *parameter.shape))
        if isinstance(activation, JumpReLU):
            activation.log_threshold.copy_(noise("theta", M).abs().add(0.1).log())
    return sae


class Plain:
    """The same dictionary in plain torch, with parameters of its own; `f` is given the selection as a constant."""

    def __init__(self, sae: SparseDictionary) -> None:
        self.p = {name: p.detach().clone().requires_grad_(True) for name, p in sae.named_parameters()}
        self.W_dec, self.b_dec = self.p["W_dec"], self.p["b_dec"]
        self.u = X - self.b_dec
        self.z = self.u @ self.p["W_enc"] + self.p["b_enc"]

    def variance(self) -> Tensor:
        return (X - X.mean(0)).square().sum()

    def fvu(self, f: Tensor) -> Tensor:
        return (X - f @ self.W_dec - self.b_dec).square().sum() / self.variance()

    def largest(self, k: int) -> Tensor:
        """relu of the k largest of each token."""
        chosen = torch.zeros_like(self.z).scatter(1, self.z.detach().topk(k, dim=1).indices, 1.0)
        return (self.z * chosen).relu()

    def norms(self) -> Tensor:
        return self.W_dec.norm(dim=1)


def batch_topk(plain: Plain, k: int) -> Tensor:
    cut = plain.z.detach().flatten().sort(descending=True).values[k * B - 1]
    return (plain.z * (plain.z >= cut)).relu()


def matryoshka(plain: Plain) -> Tensor:
    f = batch_topk(plain, 3)
    return (plain.fvu(f * (torch.arange(M) < 4)) + plain.fvu(f * (torch.arange(M) < 8)) + plain.fvu(f)) / 3


def auxk(plain: Plain) -> Tensor:
    """k_aux = d / 2 = 3 of the six dead ones; the error, and its mean, are constants."""
    z = torch.where(DEAD, plain.z, -torch.inf)
    chosen = torch.zeros_like(z).scatter(1, z.detach().topk(D // 2, dim=1).indices, 1.0)
    error = (X - plain.largest(3) @ plain.W_dec - plain.b_dec).detach()
    hat = (plain.z * chosen).relu() @ plain.W_dec
    return (hat - error).square().sum() / (error - error.mean(0)).square().sum()


def afa(plain: Plain) -> Tensor:
    f = observe(made(TopAFA()), X).codes
    assert f is not None
    code = plain.z.relu() * (f.dense().detach() > 0) * plain.norms()
    return (code.norm(dim=1) - plain.u.norm(dim=1)).square().mean()


def gate_auxiliary(plain: Plain) -> Tensor:
    """The decoder is held constant; the encoder's own b_dec is not."""
    return (X - plain.z.relu() @ plain.W_dec.detach() - plain.b_dec.detach()).square().sum(1).mean()


def jumped(plain: Plain) -> Tensor:
    """f as a function of z alone: thresholds have a gradient of their own, tested elsewhere."""
    return plain.z * (plain.z > plain.p["activation.log_threshold"].detach().exp())


def gap(plain: Plain) -> Tensor:
    below = (plain.p["activation.log_threshold"].exp() - plain.z).relu()
    return (below * plain.norms() * DEAD).sum(1).mean()


CASES: dict[str, tuple[Callable[[], Activation], losses.Term, Callable[[Plain], Tensor]]] = {
    "fvu": (lambda: TopK(3), losses.fvu, lambda p: p.fvu(p.largest(3))),
    "multi_topk": (
        lambda: TopK(3, n_train=12), losses.multi_topk(), lambda p: p.fvu(p.largest(3)) + p.fvu(p.largest(12)) / 8,
    ),
    "matryoshka": (lambda: BatchTopK(3), losses.matryoshka((0.25, 0.25, 0.5)), matryoshka),
    "auxk": (lambda: TopK(3), losses.auxk, auxk),
    "l1": (ReLU, losses.l1, lambda p: (p.z.relu() * p.norms()).sum(1).mean()),
    "l1 of a selection": (lambda: TopK(3), losses.l1, lambda p: (p.largest(3) * p.norms()).sum(1).mean()),
    "tanh": (lambda: JumpReLU(M), losses.tanh(), lambda p: torch.tanh(4 * jumped(p) * p.norms()).sum(1).mean()),
    "squared": (
        lambda: JumpReLU(M), losses.squared, lambda p: (X - jumped(p) @ p.W_dec - p.b_dec).square().sum(1).mean(),
    ),
    "pre_act": (lambda: JumpReLU(M), losses.pre_act, gap),
    "gate_l1": (lambda: Gated(M), losses.gate_l1, lambda p: (p.z.relu() * p.norms()).sum(1).mean()),
    "gate_auxiliary": (lambda: Gated(M), losses.gate_auxiliary, gate_auxiliary),
    "afa": (TopAFA, losses.afa, afa),
}  # fmt: skip
STRAIGHT_THROUGH = {"tanh", "squared"}
"""Their gradient to the thresholds is an estimate that no plain formula has."""


@pytest.mark.parametrize("case", CASES)
def test_a_term_is_its_formula_in_value_and_gradients(case: str):
    activation, term, formula = CASES[case]
    sae = made(activation())
    plain = Plain(sae)
    value, expected = term(observe(sae, X, dead=DEAD)), formula(plain)
    assert float(expected.detach()) > 0.05
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    for name, parameter in sae.named_parameters():
        if case in STRAIGHT_THROUGH and name == "activation.log_threshold":
            continue
        wanted = plain.p[name].grad
        found = parameter.grad
        zero = torch.zeros_like(parameter)
        torch.testing.assert_close(zero if found is None else found, zero if wanted is None else wanted, msg=name)


def test_counting_active_latents_moves_thresholds_alone():
    sae = made(JumpReLU(M, bandwidth=0.5))
    value = losses.l0_step(observe(sae, X))
    z = Plain(sae).z.detach()
    assert float(value.detach()) == pytest.approx(float((z > sae.activation.threshold).double().sum(1).mean()))
    value.backward()
    assert sae.W_enc.grad is None or not sae.W_enc.grad.any()
    assert bool((sae.activation.log_threshold.grad <= 0).all()) and bool(sae.activation.log_threshold.grad.any())


def test_the_straight_through_window_ends_at_half_a_bandwidth():
    for z, inside in ((0.349, True), (0.351, False), (0.251, True), (0.249, False)):
        for what in ("values", "fired"):
            jump = JumpReLU(1, threshold=0.3, bandwidth=0.1).double()
            at = torch.tensor([[z]], dtype=torch.float64)
            found = jump.values(at, torch.zeros(1)) if what == "values" else jump.fired(at)
            if found.requires_grad:
                found.sum().backward()
            assert bool(jump.log_threshold.grad.any()) == inside, (z, what)


def test_the_threshold_of_batch_topk_is_a_slow_mean_of_the_smallest_kept():
    activation = BatchTopK(2)
    for smallest in (0.5, 1.5, 1.5):
        values = torch.tensor([[smallest, 3.0], [0.0, 2.0]])
        activation.observe(values, torch.zeros(2, 2, dtype=torch.long))
    assert float(activation.threshold) == pytest.approx(1.5 - 0.99**2)
    activation.observe(torch.zeros(2, 2), torch.zeros(2, 2, dtype=torch.long))  # nothing fired: nothing learned
    assert float(activation.threshold) == pytest.approx(1.5 - 0.99**2)
