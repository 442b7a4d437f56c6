"""One trainer for top-k dictionaries.

Each step: encode (one GEMM and an exact top-k), FVU loss plus AuxK for dead latents, gradients through the active
latents only, the part of the decoder gradient along each row removed BEFORE the optimiser sees it, fused Adam, rows
back to unit norm. Schedules are functions of the step. A latent is dead when it has not fired for `dead_after_tokens`.

    lr(step) = peak * warm-up * decay ;  peak = 2e-4 / sqrt(d_dict / 2^14) unless given
Paper: L. Gao et al., 2024, https://arxiv.org/abs/2406.04093; the lr law is that of dictionary_learning and sparsify.
Feed shuffled tokens (neighbours are correlated), and drop massive activations first (`interp.dictionaries.sinks`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.progress import track
from interp.dictionaries.losses import auxk_loss, fvu_loss
from interp.dictionaries.sae import TopKSAE


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train one dictionary."""

    d_dict: int = 2304
    """Number of latents."""
    k: int = 32
    """Active latents per token."""
    n_steps: int = 400
    """Optimiser steps."""
    batch_size: int = 1024
    """Tokens per step."""
    lr: float = 0.0
    """Peak learning rate; 0 takes 2e-4 / sqrt(d_dict / 2^14)."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly from 0."""
    decay_fraction: float = 0.2
    """Share of the steps, at the end, over which it falls linearly to 0."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss of dead latents (Gao et al., appendix A.2)."""
    dead_after_tokens: int = 10_000_000
    """A latent silent for this many tokens is dead; papers use 10 million."""
    seed: int = 0
    """Initial directions."""
    log_every: int = 10
    """Steps between rows of the training curve."""

    def __post_init__(self) -> None:
        if self.n_steps < 1 or self.batch_size < 1 or self.log_every < 1 or self.dead_after_tokens < 1:
            raise InterpError("n_steps, batch_size, log_every and dead_after_tokens must be at least 1")
        if not 1 <= self.k <= self.d_dict:
            raise InterpError(f"k={self.k} must lie in 1..d_dict={self.d_dict}; lower k or widen the dictionary")
        if self.lr < 0 or self.aux_weight < 0:
            raise InterpError(f"lr={self.lr} and aux_weight={self.aux_weight} must not be negative")
        fractions = (self.warmup_fraction, self.decay_fraction)
        if min(fractions) < 0 or sum(fractions) > 1:
            raise InterpError("warmup_fraction and decay_fraction must lie in 0..1 and sum to at most 1")


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A trained dictionary, in the units of the activations (scale folded in), and how it got there."""

    sae: TopKSAE
    curve: pd.DataFrame
    """Columns step, tokens, fvu, aux, l0, dead_fraction, lr; losses are those of the step's own batch."""
    scale: float
    """Factor by which inputs were multiplied during training."""


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Learning rate of a step, 0 <= step < n_steps; never 0."""
    peak = cfg.lr or 2e-4 / math.sqrt(cfg.d_dict / 2**14)
    warmup, decay = cfg.warmup_fraction * cfg.n_steps, cfg.decay_fraction * cfg.n_steps
    rise = min(1.0, (step + 1) / warmup) if warmup else 1.0
    fall = min(1.0, (cfg.n_steps - step) / decay) if decay else 1.0
    return peak * rise * fall


@torch.no_grad()
def initial(sample: Float[Tensor, "n d"], cfg: TrainConfig) -> TopKSAE:
    """Random unit rows, tied encoder, scale sqrt(d) / mean norm, b_dec the geometric median of the scaled sample."""
    if len(sample) == 0:
        raise InterpError("no activations to train on; raise the number of sequences")
    if not bool(torch.isfinite(sample).all()):
        raise InterpError("the activations hold NaN or infinity; check the model's dtype and the site")
    norm = float(sample.float().norm(dim=1).mean())
    if norm == 0:
        raise InterpError("the activations are all zero; check the site")
    sae = TopKSAE.random(sample.shape[1], cfg.d_dict, cfg.k, seed=cfg.seed).to(sample.device)
    sae.scale.fill_(math.sqrt(sample.shape[1]) / norm)
    sae.b_dec.copy_(geometric_median(sample[:32_768].float() * sae.scale))
    return sae


@torch.no_grad()
def geometric_median(x: Float[Tensor, "n d"], n_iterations: int = 100) -> Float[Tensor, "d"]:
    """Point of least summed distance (Weiszfeld); a point that meets a sample is kept off the division by zero."""
    median = x.mean(0)
    for _ in range(n_iterations):
        weights = 1 / (x - median).norm(dim=1).clamp_min(1e-12)
        following = (weights / weights.sum()) @ x
        if float((following - median).norm()) < 1e-5 * (1 + float(median.norm())):
            return following
        median = following
    return median


@torch.no_grad()
def project_decoder_grad(sae: TopKSAE) -> None:
    """Remove from each row's gradient its part along the row: G_i <- G_i - (G_i . d_i) d_i."""
    grad = sae.W_dec.grad
    if grad is not None:
        grad.addcmul_(sae.W_dec, (grad * sae.W_dec).sum(1, keepdim=True), value=-1)


@torch.no_grad()
def normalise_decoder(sae: TopKSAE) -> None:
    """Rows of W_dec to unit norm."""
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True).clamp_min(1e-12))


class Stepper:
    """A dictionary in training: its optimiser, and how long each latent has been silent. `train_sae` drives it."""

    def __init__(self, sae: TopKSAE, cfg: TrainConfig) -> None:
        self.sae, self.cfg = sae, cfg
        fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in sae.parameters())
        self.optimiser = torch.optim.Adam(sae.parameters(), lr=1.0, fused=fused)
        self.silent: Int[Tensor, "d_dict"] = torch.zeros(sae.d_dict, dtype=torch.long, device=sae.W_dec.device)
        self.n_tokens = 0
        self._z: Tensor | None = None

    def _buffer(self, x: Tensor) -> Tensor:
        if self._z is None or self._z.shape[0] < len(x):
            self._z = torch.empty(len(x), self.sae.d_dict, dtype=x.dtype, device=x.device)
        return self._z

    def step(self, number: int, x: Float[Tensor, "batch d"]) -> dict[str, float | int]:
        """One optimiser step on one batch; the row of the training curve."""
        sae, cfg = self.sae, self.cfg
        u = sae.centred(x)
        z = sae.preactivations(u, self._buffer(x))
        selected, indices = z.topk(cfg.k, dim=-1, sorted=False)
        codes = sae.latents(u, selected, indices)
        error = u - sae.combine(codes)
        target = x * sae.scale
        fvu = fvu_loss(target, target - error)
        dead = self.silent >= cfg.dead_after_tokens
        aux = auxk_loss(sae, u, z, error, dead) if cfg.aux_weight else u.new_zeros(())
        loss = fvu + cfg.aux_weight * aux
        if not bool(torch.isfinite(loss)):
            raise InterpError(
                f"the loss became {float(loss.detach())} at step {number} (lr {learning_rate(number, cfg):.3g}); "
                "lower lr, or look for NaN or huge rows in the activations"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        project_decoder_grad(sae)
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(number, cfg)
        self.optimiser.step()
        normalise_decoder(sae)
        firings = codes.firings()
        self.n_tokens += len(x)
        self.silent = torch.where(firings > 0, 0, self.silent + len(x))
        return {
            "step": number + 1,
            "tokens": self.n_tokens,
            "fvu": float(fvu.detach()),
            "aux": float(aux.detach()),
            "l0": float(firings.sum()) / len(x),
            "dead_fraction": float(dead.double().mean()),
            "lr": learning_rate(number, cfg),
        }


def train_sae(batches: Iterator[Float[Tensor, "batch d"]], sample: Float[Tensor, "n d"], cfg: TrainConfig) -> Trained:
    """Train a top-k dictionary on an endless stream of shuffled activations.

    sample: activations from which scale and b_dec start (a few thousand; the first 32,768 are used).
    """
    steps = Stepper(initial(sample, cfg), cfg)
    curve: list[dict[str, float | int]] = []
    for number in track(range(cfg.n_steps), "training the dictionary"):
        try:
            x = next(batches)
        except StopIteration as error:
            raise InterpError(
                f"the activations ran out at step {number} of {cfg.n_steps}; pass an endless stream"
            ) from error
        row = steps.step(number, x.float())
        if number % cfg.log_every == 0 or number == cfg.n_steps - 1:
            curve.append(row)
    scale = float(steps.sae.scale)
    return Trained(sae=steps.sae.folded().requires_grad_(False), curve=pd.DataFrame(curve), scale=scale)
