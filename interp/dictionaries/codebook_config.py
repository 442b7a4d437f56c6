"""How to learn one codebook: every choice, with its default. Nothing here runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from interp.core.errors import InterpError, unknown
from interp.dictionaries.codebook import Similarity
from interp.dictionaries.schedules import trapezoid

Update = Literal["gradient", "ema", "simvq", "cvq"]
"""How codes move; `interp.dictionaries.codebook_quantise` has the formulas."""
Start = Literal["sample", "kmeans"]
Task = Literal["none", "kl", "ce"]


@dataclass(frozen=True, kw_only=True)
class CodebookConfig:
    """How to learn one codebook."""

    n_codes: int = 1024
    """Codes per group (a group is a head, or the whole site)."""
    k: int = 8
    """Codes per token and group."""
    similarity: Similarity = "cosine"
    """What decides which codes are chosen: cosine with the code, or euclidean distance, which suits k = 1 and ema."""
    update: Update = "gradient"
    """gradient, ema (moving averages), simvq (one matrix moves all codes) or cvq (idle codes move towards inputs)."""
    start: Start = "sample"
    """sample: random inputs are the first codes; kmeans: their clusters. simvq starts from its own random codes."""
    affine: bool = False
    """gradient and cvq: keep mean and variance of all codes at those of the inputs."""
    rotation: bool = False
    """Gradient to the network below by the rotation trick, instead of straight through."""
    decay: float = 0.95
    """Of the moving averages of usage, and of codes for ema."""
    dead_share: float = 0.05
    """A code used less than this times the average is drawn anew from the inputs; 0 never does that."""
    n_steps: int = 400
    """Optimiser steps."""
    batch_size: int = 1024
    """Tokens per step, when trained on activations."""
    lr: float = 0.05
    """Peak learning rate of codes, for Adam; activations have unit variance."""
    task: Task = "none"
    """Through the model: kl to the untouched model's predictions, or ce, the next token's cross-entropy."""
    task_weight: float = 1.0
    """Weight of the task's loss, in nats per token."""
    autoencoder_weight: float = 1.0
    """Weight of half the mean squared error, at activations of unit variance; its gradient goes to the codes."""
    commitment_weight: float = 0.25
    """Weight of the same error with its gradient to the network below, when that is trained too."""
    rows_per_step: int = 4
    """Sequences per step, when trained through the model."""
    model_lr: float = 1e-4
    """Peak learning rate of the model, when it is trained too."""
    seed: int = 0
    """First codes, order of sequences and replacements."""
    log_every: int = 10
    """Steps between rows of the training curve."""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("similarity", self.similarity, get_args(Similarity)),
            ("update", self.update, get_args(Update)),
            ("start", self.start, get_args(Start)),
            ("task", self.task, get_args(Task)),
        ):
            if value not in known:
                raise unknown(name, value, known)
        if not 1 <= self.k <= self.n_codes:
            raise InterpError(f"k={self.k} must lie in 1..n_codes={self.n_codes}; lower k or ask for more codes")
        if min(self.n_steps, self.batch_size, self.rows_per_step, self.log_every) < 1:
            raise InterpError("n_steps, batch_size, rows_per_step and log_every must be at least 1")
        if not 0 < self.decay < 1 or not 0 <= self.dead_share < 1:
            raise InterpError(
                f"decay={self.decay} and dead_share={self.dead_share} must lie in 0..1, decay not at an end"
            )
        if self.affine and self.update not in ("gradient", "cvq"):
            raise InterpError(f"affine=True needs codes that learn by gradient, not update={self.update!r}")
        weights = (self.task_weight, self.autoencoder_weight, self.commitment_weight)
        if min(*weights, self.lr, self.model_lr) < 0:
            raise InterpError("weights and learning rates must not be negative")


def shape_at(step: int, cfg: CodebookConfig) -> float:
    """Share of the peak learning rate that a step uses: a short rise, then level, a fall over the last third."""
    return trapezoid(step, cfg.n_steps, 0.02, 1 / 3)
