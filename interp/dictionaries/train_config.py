"""How to train one dictionary: every choice, with its default. Nothing here runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from interp.core.errors import InterpError, unknown
from interp.dictionaries.schedules import annealed, peak_lr, ramp, trapezoid

Kind = Literal[
    "topk", "batch_topk", "matryoshka", "multi_topk", "group_max", "top_afa", "gradient_topk", "relu", "jump_relu",
    "gated",
]  # fmt: skip
"""What makes the codes sparse; `interp.dictionaries.kinds` says which activation and which loss each one is."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How to train one dictionary."""

    kind: Kind = "topk"
    """topk, batch_topk, matryoshka, multi_topk, group_max, top_afa, gradient_topk, relu, jump_relu or gated."""
    d_dict: int = 2304
    """Number of latents."""
    k: int = 32
    """Active latents per token, for kinds that select them; a target for nothing else."""
    k_start: int = 0
    """Active latents per token at the first step, falling linearly to k; 0 starts with k."""
    k_fraction: float = 0.2
    """Share of the steps over which k falls from k_start."""
    n_steps: int = 400
    """Optimiser steps."""
    batch_size: int = 1024
    """Tokens per step, over all processes."""
    lr: float = 0.0
    """Peak learning rate; 0 takes 2e-4 / sqrt(d_dict / 2^14)."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly from 0."""
    decay_fraction: float = 0.2
    """Share of the steps, at the end, over which it falls linearly to 0."""
    clip_norm: float = 0.0
    """Largest norm of all gradients together; 0 does not clip."""
    sparsity_weight: float = -1.0
    """Weight of the sparsity penalty (relu, jump_relu, gated, AFA loss of top_afa); below 0 takes the kind's own."""
    sparsity_warmup_fraction: float = 0.1
    """Share of the steps over which that weight rises linearly from 0."""
    penalty: Literal["step", "tanh"] = "step"
    """jump_relu: count active latents by a step or by tanh."""
    bandwidth: float = 0.05
    """jump_relu: width of the straight-through window, in units of the pre-activations."""
    threshold: float = 0.0
    """jump_relu: threshold at the start; 0 starts where k latents fire per token."""
    pre_act_weight: float = 0.0
    """jump_relu: weight of the term that pulls dead latents to their thresholds; 3e-6 is usual where it is used."""
    shells: tuple[float, ...] = (0.0625, 0.0625, 0.125, 0.25, 0.5)
    """matryoshka: width of each shell as a fraction of d_dict."""
    gradient_weight: float = 1.0
    """gradient_topk: how much the effect on the model's loss counts beside the size."""
    aux_weight: float = 1 / 32
    """Weight of the auxiliary loss of dead latents, for kinds that select them (Gao et al., appendix A.2)."""
    dead_after_tokens: int = 10_000_000
    """A latent silent for this many tokens is dead; papers use 10 million."""
    resample_every: int = 0
    """Steps between replacements of dead latents by badly reconstructed inputs; 0 never replaces."""
    decoder_norm: Literal["unit", "free"] = "unit"
    """unit: rows of W_dec are kept at norm 1; free: they are not, and penalties weigh each latent by its norm."""
    skip: bool = False
    """Transcoders: add a linear path from input to output."""
    seed: int = 0
    """Initial directions and resampling."""
    log_every: int = 10
    """Steps between rows of the training curve."""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown("kind", self.kind, get_args(Kind))
        if min(self.n_steps, self.batch_size, self.log_every, self.dead_after_tokens) < 1:
            raise InterpError("n_steps, batch_size, log_every and dead_after_tokens must be at least 1")
        if not 1 <= self.k <= self.d_dict:
            raise InterpError(f"k={self.k} must lie in 1..d_dict={self.d_dict}; lower k or widen the dictionary")
        if self.k_start and not self.k <= self.k_start <= self.d_dict:
            raise InterpError(f"k_start={self.k_start} must lie in k={self.k}..d_dict={self.d_dict}, or be 0")
        if self.lr < 0 or self.aux_weight < 0 or self.clip_norm < 0 or self.resample_every < 0:
            raise InterpError(
                f"lr={self.lr}, aux_weight={self.aux_weight}, clip_norm={self.clip_norm} and "
                f"resample_every={self.resample_every} must not be negative"
            )
        fractions = (self.warmup_fraction, self.decay_fraction)
        if min(fractions) < 0 or sum(fractions) > 1:
            raise InterpError("warmup_fraction and decay_fraction must lie in 0..1 and sum to at most 1")
        if not (0 <= self.sparsity_warmup_fraction <= 1 and 0 <= self.k_fraction <= 1):
            raise InterpError("sparsity_warmup_fraction and k_fraction must lie in 0..1")
        if self.bandwidth <= 0 or self.threshold < 0:
            raise InterpError(f"bandwidth={self.bandwidth} must be positive, threshold={self.threshold} not negative")
        if self.kind == "matryoshka" and (min(self.shells, default=0) <= 0 or abs(sum(self.shells) - 1) > 1e-6):
            raise InterpError(f"shells={self.shells} must be positive fractions that sum to 1")
        if self.kind == "group_max" and (self.d_dict % self.k or self.k_start not in (0, self.k)):
            raise InterpError(
                f"group_max cuts d_dict={self.d_dict} into k={self.k} equal groups; choose a k that divides it, "
                "without k_start"
            )
        if self.decoder_norm == "free" and self.kind not in ("relu", "jump_relu", "gated"):
            raise InterpError(
                f"decoder_norm='free' would let the {self.kind} selection prefer latents with short rows; use 'unit'"
            )


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Learning rate of a step, 0 <= step < n_steps; never 0."""
    shape = trapezoid(step, cfg.n_steps, cfg.warmup_fraction, cfg.decay_fraction)
    return (cfg.lr or peak_lr(cfg.d_dict)) * shape


def k_at(step: int, cfg: TrainConfig) -> int:
    """Active latents per token at a step."""
    return annealed(step, cfg.n_steps, cfg.k_start or cfg.k, cfg.k, cfg.k_fraction)


def penalty_at(step: int, cfg: TrainConfig) -> float:
    """Share of the sparsity weight that a step uses."""
    return ramp(step, cfg.n_steps, cfg.sparsity_warmup_fraction)
