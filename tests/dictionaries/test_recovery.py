"""What training must reach: planted features, beside SAELens with one budget; and the curve of an exact reference."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import functional as F

import interp
from interp.dictionaries.metrics import mean_max_cosine
from interp.dictionaries.train import Stepper, TrainConfig, initial
from interp.dictionaries.train_config import learning_rate
from interp.tasks.corpora import load_corpus

N_TRUTH, D, N_ACTIVE = 1024, 128, 5


def planted(n_tokens: int, seed: int, truth: torch.Tensor) -> torch.Tensor:
    """Sums of about five of 1024 directions, frequencies falling as rank^-1/2, values in [.5, 1.5]."""
    frequency = torch.arange(1, N_TRUTH + 1).float() ** -0.5
    frequency *= N_ACTIVE / frequency.sum()
    source = torch.Generator().manual_seed(seed)
    active = torch.rand(n_tokens, N_TRUTH, generator=source) < frequency
    return (active * (0.5 + torch.rand(n_tokens, N_TRUTH, generator=source))) @ truth


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_planted_features_are_found_at_least_as_well_as_by_saelens():
    sae_lens = pytest.importorskip("sae_lens")
    from sae_lens.saes.sae import TrainStepInput

    generator = torch.Generator().manual_seed(0)
    truth = F.normalize(torch.randn(N_TRUTH, D, generator=generator), dim=1)
    cfg = TrainConfig(d_dict=N_TRUTH, k=N_ACTIVE, n_steps=2500, batch_size=1024, lr=2e-3, dead_after_tokens=50_000)
    sample = planted(8192, 10**6, truth)
    ours = Stepper(initial(sample, cfg), cfg)
    chance = mean_max_cosine(truth, ours.sae.features)
    theirs = sae_lens.TopKTrainingSAE(sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=N_TRUTH, k=N_ACTIVE))
    optimiser = torch.optim.Adam(theirs.parameters(), lr=1.0)
    scale = float(ours.sae.scale_in)
    silent = torch.zeros(N_TRUTH)
    for number in range(cfg.n_steps):
        x = planted(cfg.batch_size, number, truth)
        ours.step(number, x)
        given = TrainStepInput(sae_in=scale * x, coefficients={}, dead_neuron_mask=silent >= 49,
                               n_training_steps=number, is_logging_step=False)  # fmt: skip
        output = theirs.training_forward_pass(step_input=given)
        fired = (output.feature_acts.to_dense() if output.feature_acts.is_sparse else output.feature_acts) > 0
        silent = torch.where(fired.any(0), 0, silent + 1)
        optimiser.zero_grad()
        output.loss.backward()
        optimiser.param_groups[0]["lr"] = learning_rate(number, cfg)
        torch.nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        optimiser.step()
    found = mean_max_cosine(truth, ours.sae.features)
    peer = mean_max_cosine(truth, theirs.W_dec.detach())
    said = f"mean max cosine: ours {found:.4f}, SAELens {peer:.4f}, chance {chance:.4f}"
    warnings.warn(said, stacklevel=1)  # shown by pytest, for the record
    assert chance < 0.45, said
    assert found >= 0.95, said
    assert found >= peer, said


class Exact(torch.nn.Module):
    """Top-k autoencoder with dense float32 autograd and nothing clever."""

    def __init__(self, start) -> None:
        super().__init__()
        self.W_enc = torch.nn.Parameter(start.W_enc.detach().clone())
        self.b_enc = torch.nn.Parameter(start.b_enc.detach().clone())
        self.W_dec = torch.nn.Parameter(start.W_dec.detach().clone())
        self.b_dec = torch.nn.Parameter(start.b_dec.detach().clone())
        self.k = start.activation.k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z = (x - self.b_dec) @ self.W_enc + self.b_enc
        cut = z.topk(self.k, dim=-1).values[:, -1:]
        return (z * (z >= cut)).relu() @ self.W_dec + self.b_dec


def exact_curve(batches: list[torch.Tensor], cfg: TrainConfig, start) -> list[float]:
    model = Exact(start)
    optimiser = torch.optim.Adam(model.parameters(), lr=1.0)
    curve = []
    for number, x in enumerate(batches):
        x = x * start.scale_in
        fvu = (x - model(x)).square().sum() / (x - x.mean(0)).square().sum()
        optimiser.zero_grad()
        fvu.backward()
        with torch.no_grad():
            rows = model.W_dec
            rows.grad -= (rows.grad * rows).sum(1, keepdim=True) * rows
            optimiser.param_groups[0]["lr"] = learning_rate(number, cfg)
            optimiser.step()
            rows /= rows.norm(dim=1, keepdim=True)
        curve.append(float(fvu.detach()))
    return curve


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.needs_model("smollm2-135m")
def test_the_loss_curve_on_a_real_model_is_that_of_an_exact_reference():
    model = interp.load("smollm2-135m")
    record = load_corpus(model, "docs", 32, 128)
    with interp.capture(model, ["resid_post.10"]) as acts:
        model(record.ids)
    x = acts["resid_post.10"][:, 1:].reshape(-1, 576)
    n_steps = 60

    def order(seed: int) -> list[torch.Tensor]:
        source = torch.Generator().manual_seed(seed)
        return [x[torch.randint(len(x), (512,), generator=source)] for _ in range(n_steps)]

    cfg = TrainConfig(d_dict=2048, k=32, n_steps=n_steps, batch_size=512, aux_weight=0.0)

    def ours(seed: int) -> list[float]:
        steps = Stepper(initial(x, cfg), cfg)
        curve = [steps.step(number, batch)["fvu"] for number, batch in enumerate(order(seed))]
        assert steps.workspace.counters.fast + steps.workspace.counters.plain > 0
        return curve

    reference = exact_curve(order(0), cfg, initial(x, cfg))
    same, other = torch.tensor(ours(0)), torch.tensor(ours(1))
    reference = torch.tensor(reference)
    noise = (same - other).abs().mean()
    warnings.warn(f"mean |ours - reference| {(same - reference).abs().mean():.2e}, seeds {noise:.2e}", stacklevel=1)
    assert (same - reference).abs().mean() < 0.05 * noise
    assert float(reference[-1]) < 0.6 * float(reference[0])
