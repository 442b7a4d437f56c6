"""Models of flash-linear-attention: their tables bind, and where the package and a GPU are, they pass the probe.

On any machine: a restatement of each layer in plain torch, with the module names and torch calls of the package's
source, shows that the gate sites read and edit what they name. It says nothing about the package itself.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from interp.core.seed import torch_generator
from interp.instrument.capture import capture
from interp.instrument.edits import Edit, edited
from interp.models.model import LoadedModel
from interp.models.probe import verify

SIZES = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_heads": 2, "intermediate_size": 96}
MODELS = {
    "gla": ("GLAConfig", "GLAForCausalLM", {}),
    "hgrn2": ("HGRN2Config", "HGRN2ForCausalLM", {"expand_ratio": 32}),
    "gsa": ("GSAConfig", "GSAForCausalLM", {"num_slots": 16}),
    "gated_deltanet": ("GatedDeltaNetConfig", "GatedDeltaNetForCausalLM", {"head_dim": 32}),
}


@pytest.mark.gpu
@pytest.mark.needs_package("fla")
@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_the_package_passes_the_probe(name: str) -> None:
    """Never run so far: no machine of ours had both."""
    config, model, more = MODELS[name]
    package = importlib.import_module("fla.models")
    made = getattr(package, model)(getattr(package, config)(**SIZES, **more)).cuda().eval()
    loaded = LoadedModel(module=made, source=name)
    assert loaded.table.name == f"fla-{name.replace('_', '-')}"
    report = verify(loaded)
    assert report.passed, report.first_failure
    assert not report.unfired


class Attention(nn.Module):
    """Gates as the package's layers compute them; the kernel is a plain loop."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.head_k_dim, self.num_slots, self.gate_logit_normalizer = kind, 8, 8, 16

        def linear() -> nn.Linear:
            return nn.Linear(16, 16, bias=False)

        self.q_proj, self.o_proj = linear(), linear()
        if kind == "hgrn2":
            self.i_proj, self.f_proj = linear(), linear()
            return
        self.k_proj, self.v_proj = linear(), linear()
        if kind == "gsa":
            self.f_proj = linear()
            return
        self.g_proj = linear()
        if kind == "gla":
            self.gk_proj = nn.Sequential(nn.Linear(16, 4, bias=False), nn.Linear(4, 16))
            return
        self.a_proj, self.b_proj = nn.Linear(16, 2, bias=False), nn.Linear(16, 2, bias=False)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None, None]:
        x = hidden_states
        heads = (2, 8)
        if self.kind == "hgrn2":
            g = F.logsigmoid(self.f_proj(x))
            k = 1 - g.exp()
            out = _scan(F.silu(self.q_proj(x)), k, self.i_proj(x), g)
            return F.linear(out, self.o_proj.weight), None, None
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.kind == "gsa":
            f = F.logsigmoid(self.f_proj(x).unflatten(-1, heads)) / self.gate_logit_normalizer
            s = (1 - f.exp()).to(f.dtype)
            out = _scan(q, s.flatten(-2) * k, v, f.flatten(-2))
            return F.linear(out, self.o_proj.weight), None, None
        if self.kind == "gla":
            g = F.logsigmoid(self.gk_proj(x).unflatten(-1, heads)) / self.gate_logit_normalizer
            out = _scan(q, k, v, g.flatten(-2))
        else:
            beta, g = self.b_proj(x).sigmoid(), -F.softplus(self.a_proj(x))
            out = _scan(q, k * beta.repeat_interleave(8, -1), v, g.repeat_interleave(8, -1))
        return self.o_proj(out * F.silu(self.g_proj(x))), None, None


def _scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor) -> Tensor:
    state, outputs = torch.zeros_like(q[:, 0]), list[Tensor]()
    for t in range(q.shape[1]):
        state = state * log_decay[:, t].exp() + k[:, t] * v[:, t]
        outputs.append(state * q[:, t])
    return torch.stack(outputs, dim=1)


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.attn_norm, self.mlp_norm, self.attn = nn.RMSNorm(16), nn.RMSNorm(16), Attention(kind)
        self.mlp = GatedMLP()

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = x + self.attn(hidden_states=self.attn_norm(x))[0]
        return x + self.mlp(self.mlp_norm(x)), None


class GatedMLP(nn.Module):
    """Its last product uses the weight alone, as the fused one does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(16, 24, bias=False), nn.Linear(16, 24, bias=False)
        self.down_proj = nn.Linear(24, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.silu(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)


class Restated(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.config = SimpleNamespace(model_type=kind)
        self.model = nn.Module()
        self.model.embeddings = nn.Embedding(64, 16)
        self.model.layers = nn.ModuleList([Block(kind) for _ in range(2)])
        self.model.norm, self.lm_head = nn.RMSNorm(16), nn.Linear(16, 64, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        inner: Any = self.model
        x = inner.embeddings(ids)
        for block in inner.layers:
            x = block(x)[0]
        return self.lm_head(inner.norm(x))


def restated(kind: str) -> LoadedModel:
    module = Restated(kind).eval()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch_generator(0, name)) * 0.4)
    return LoadedModel(module=module, source=kind)


@pytest.mark.parametrize("name", MODELS)
def test_a_restatement_passes_the_probe(name: str) -> None:
    model = restated(name)
    assert model.table.name == f"fla-{name.replace('_', '-')}"
    report = verify(model)
    assert report.passed, report.first_failure
    assert not report.unfired


def test_log_decay_at_minus_infinity_forgets() -> None:
    model = restated("gla")
    ids = torch.arange(1, 9)[None]

    def wipe(x: Tensor, _context: object) -> Tensor:
        new = x.clone()
        new[:, 5] = -1e4
        return new

    def entering(x: Tensor, _context: object) -> Tensor:
        return torch.cat([x[:, :5] + 1, x[:, 5:]], dim=1)

    outputs: list[Tensor] = []
    for edits in ([Edit("log_decay.0", wipe)], [Edit("log_decay.0", wipe), Edit("v.0", entering)]):
        with capture(model, "mixer_out.0") as acts, edited(model, edits):
            model(ids)
        outputs.append(acts["mixer_out.0"])
    assert torch.equal(outputs[0][:, 5:], outputs[1][:, 5:])
    assert not torch.equal(outputs[0][:, :5], outputs[1][:, :5])
