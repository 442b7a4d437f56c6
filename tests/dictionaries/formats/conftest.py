"""Dictionaries of every kind with weights that leave nothing at a value that hides a mistake (no zero bias, no unit
row, no scale of 1), and a comparison of two functions in values and gradients."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from interp.dictionaries.activations.batch_topk import BatchTopK
from interp.dictionaries.activations.gated import Gated
from interp.dictionaries.activations.gradient_topk import GradientTopK
from interp.dictionaries.activations.group_max import GroupMax
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.activations.relu import ReLU
from interp.dictionaries.activations.top_afa import TopAFA
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.dictionary import SparseDictionary

D, M, K = 12, 30, 5
ACTIVATIONS = {
    "relu": ReLU, "topk": lambda: TopK(K), "multi_topk": lambda: TopK(K, n_train=20),
    "batch_topk": lambda: BatchTopK(K),
    "jump_relu": lambda: JumpReLU(M), "gated": lambda: Gated(M), "group_max": lambda: GroupMax(K), "top_afa": TopAFA,
    "gradient_topk": lambda: GradientTopK(K),
}  # fmt: skip


def noise(*shape: int, seed: int = 2, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()


def made(kind: str = "topk", *, d_out: int | None = None, skip: bool = False, scale: float = 1.0, **options):
    """A dictionary with random weights; `scale` is its input and output scale."""
    dictionary = SparseDictionary(D, M, ACTIVATIONS[kind](), d_out=d_out, skip=skip, **options)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(dictionary.named_parameters()):
            size = 0.1 if name.startswith("activation") else 0.6
            parameter.add_(noise(*parameter.shape, seed=100 + index, scale=size).to(parameter.dtype))
        if kind == "jump_relu":
            dictionary.activation.log_threshold.copy_(noise(M, seed=7).abs().add(0.1).log())
        if kind == "batch_topk":
            dictionary.activation.threshold.fill_(0.7)
        dictionary.scale_in.fill_(scale)
        dictionary.scale_out.fill_(scale if d_out is None else 3 * scale)
    return dictionary.requires_grad_(False)


def same(ours: SparseDictionary, theirs, x: torch.Tensor, *, encode=None, tol: float = 1e-5) -> None:
    """Equal codes and reconstructions. `theirs` is a module; `encode` its dense codes, where that is no method."""
    x = x.to(ours.W_dec.dtype)
    with torch.no_grad():
        codes = theirs.encode(x) if encode is None else encode(x)
        torch.testing.assert_close(ours.encode(x).dense(), codes, rtol=tol, atol=tol)
        torch.testing.assert_close(ours(x), theirs(x), rtol=tol, atol=tol)


def same_gradients(ours: nn.Module, theirs, x: torch.Tensor, pairs: dict, *, tol: float = 1e-5) -> None:
    """Gradients of a loss that weighs every output differently; pairs: our parameter -> (their parameter, view)."""
    weights = noise(1, ours.d_out, seed=31)
    grads = []
    for model in (ours, theirs):
        model.requires_grad_(True)
        model.zero_grad()
        inputs = x.clone().requires_grad_(True)
        out = model(inputs)
        ((out * weights).square().sum() + (out * weights).sum()).backward()
        grads.append(inputs.grad)
    torch.testing.assert_close(*grads, rtol=tol, atol=tol * float(grads[1].abs().max()))
    named, other = dict(ours.named_parameters()), dict(theirs.named_parameters())
    for name, (their_name, view) in pairs.items():
        grad, expected = named[name].grad, other[their_name].grad
        expected = torch.zeros_like(other[their_name]) if expected is None else expected
        assert grad is not None
        if name != "b_enc" or their_name not in ("b_gate", "gate_bias"):
            assert float(grad.abs().max()) > 0, name
        atol = tol * float(expected.abs().max())
        torch.testing.assert_close(
            grad, view(expected), rtol=tol, atol=atol, msg=lambda text, name=name: f"{name} {text}"
        )


@pytest.fixture
def making():
    """The helpers above, since test modules of this folder cannot import each other."""
    return SimpleNamespace(made=made, noise=noise, same=same, same_gradients=same_gradients, D=D, M=M, K=K)
