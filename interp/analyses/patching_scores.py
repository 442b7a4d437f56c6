"""Metrics and effects of patching, per prompt (a helper of `patching`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.analyses.patching_wave import HEAD_KINDS, all_patches, make_runs, patched_logits
from interp.core.seed import numpy_generator, torch_generator
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs

METRIC_NAMES = ("logit_diff", "prob", "kl")
OTHER = "other_answers"
"""The logit difference of an unrelated pair's answers: a control, which should not move."""


class Direction(Enum):
    """Which run is patched with the other's activations."""

    DENOISE = "denoising"
    NOISE = "noising"


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Metrics of some logits (pair, vocab), one value per pair."""

    logit_diff: Tensor
    prob: Tensor
    other_answers: Tensor
    log_probs: Tensor

    @classmethod
    def of(
        cls, logits: Float[Tensor, "pair vocab"], answers: Int[Tensor, "pair 2"], other: Int[Tensor, "pair 2"]
    ) -> Scores:
        log_probs = logits.float().log_softmax(-1)
        chosen, unrelated = (log_probs.gather(1, ids.to(log_probs.device)) for ids in (answers, other))
        return cls(
            logit_diff=chosen[:, 0] - chosen[:, 1],
            prob=chosen[:, 0].exp(),
            other_answers=unrelated[:, 0] - unrelated[:, 1],
            log_probs=log_probs,
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Endpoints:
    """The two unpatched runs."""

    clean: Scores
    corrupt: Scores
    other: Int[Tensor, "pair 2"]
    """Answers of an unrelated pair."""

    @property
    def clean_mean(self) -> float:
        return float(self.clean.logit_diff.mean())

    @property
    def corrupt_mean(self) -> float:
        return float(self.corrupt.logit_diff.mean())

    def shares(self, direction: Direction, metric: str) -> Float[np.ndarray, " pair"]:
        """Each pair's gap between donor and base over the mean gap: what its effects are fractions of."""
        base, donor = (self.corrupt, self.clean) if direction is Direction.DENOISE else (self.clean, self.corrupt)
        gap = kl(donor.log_probs, base.log_probs) if metric == "kl" else getattr(donor, metric) - getattr(base, metric)
        return (gap / (float(gap.mean()) or 1.0)).double().cpu().numpy()

    @property
    def accuracy(self) -> float:
        """Share of clean prompts with the right answer above the wrong one."""
        return float((self.clean.logit_diff > 0).double().mean())

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """Wilson interval, 95 %."""
        n, p, z = len(self.clean.logit_diff), self.accuracy, 1.959964
        middle, spread = p + z * z / (2 * n), z * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return float((middle - spread) / (1 + z * z / n)), float((middle + spread) / (1 + z * z / n))


def unrelated(pairs: PromptPairs) -> Int[Tensor, " pair"]:
    """For each pair the next one with none of its answers; itself where there is none."""
    n, sets = len(pairs), [set(row) for row in pairs.answers.tolist()]
    found = [next((j % n for j in range(i + 1, i + n) if not sets[i] & sets[j % n]), i) for i in range(n)]
    return torch.tensor(found)


def _other_answers(model: LoadedModel, pairs: PromptPairs) -> Int[Tensor, "pair 2"]:
    """An unrelated pair's answers, or two random tokens where every pair has the same answers."""
    partner = unrelated(pairs)
    other = pairs.answers[partner].clone()
    alone = partner == torch.arange(len(pairs))
    generator = torch_generator(0, "other answers")
    for row in alone.nonzero()[:, 0].tolist():
        taken = set(pairs.answers[row].tolist())
        draws = torch.randperm(model.dims.d_vocab or 4, generator=generator)[:4].tolist()
        other[row] = torch.tensor([token for token in draws if token not in taken][:2])
    return other


def endpoints(model: LoadedModel, pairs: PromptPairs) -> Endpoints:
    """Run both prompts of every pair untouched."""
    other = _other_answers(model, pairs)
    clean, corrupt = model(pairs.clean.ids)[:, -1], model(pairs.corrupt.ids)[:, -1]
    return Endpoints(
        clean=Scores.of(clean, pairs.answers, other), corrupt=Scores.of(corrupt, pairs.answers, other), other=other
    )


Effects = Mapping[str, Mapping[str, Float[np.ndarray, "pair layer index"]]]
"""kind -> metric -> normalised effect of every pair; averaging over pairs gives the ratio of means."""


def measure(
    model: LoadedModel, pairs: PromptPairs, ends: Endpoints, kinds: Sequence[str], direction: Direction
) -> Effects:
    """Exact effects of every patch of every pair."""
    denoise = direction is Direction.DENOISE
    base, donor = (ends.corrupt, ends.clean) if denoise else (ends.clean, ends.corrupt)
    first, second = (pairs.corrupt, pairs.clean) if denoise else (pairs.clean, pairs.corrupt)
    runs = make_runs(model, first.ids, second.ids, kinds)
    shape = {
        k: (len(pairs), model.n_layers, (model.dims.n_heads or 0) if k in HEAD_KINDS else pairs.n_pos) for k in kinds
    }
    found = {k: {m: np.zeros(shape[k]) for m in (*METRIC_NAMES, OTHER)} for k in kinds}
    patches = all_patches(model, pairs.n_pos, kinds, len(pairs))
    gap = float((donor.logit_diff - base.logit_diff).mean())
    gap_prob = float((donor.prob - base.prob).mean())
    kl_base = kl(donor.log_probs, base.log_probs)
    for wave, logits in patched_logits(model, runs, patches, f"patching: {direction.value}"):
        rows = torch.tensor([patch.prompt for patch in wave])
        now = Scores.of(logits, pairs.answers[rows], ends.other[rows])
        moved = {
            "logit_diff": (now.logit_diff - base.logit_diff[rows]) / gap,
            "prob": (now.prob - base.prob[rows]) / (gap_prob or 1.0),
            "kl": (kl_base[rows] - kl(donor.log_probs[rows], now.log_probs)) / (float(kl_base.mean()) or 1.0),
            OTHER: (now.other_answers - base.other_answers[rows]) / gap,
        }
        for metric, values in moved.items():
            for patch, value in zip(wave, values.tolist(), strict=True):
                found[patch.kind][metric][patch.prompt, patch.layer, patch.index] = value
    return found


def kl(p: Tensor, q: Tensor) -> Float[Tensor, " pair"]:
    """KL(p || q) of log-probabilities, nats."""
    return (p.exp() * (p - q)).sum(-1)


N_RESAMPLES = 2000
"""Bootstrap draws of the pairs."""


def intervals(
    values: Float[np.ndarray, "pair layer index"], shares: Float[np.ndarray, " pair"], seed: int = 0
) -> tuple[Float[np.ndarray, "layer index"], Float[np.ndarray, "layer index"]]:
    """95 % percentile interval of every effect, all from the same resampled pairs; nan for a single pair.

    The gap is resampled with the effects, since both ends of the ratio vary over prompts.
    """
    n = len(values)
    if n < 2:
        nothing = np.full(values.shape[1:], np.nan)
        return nothing, nothing
    drawn = numpy_generator(seed, "patching").multinomial(n, np.full(n, 1 / n), size=N_RESAMPLES) / n
    gap = drawn @ shares
    drawn, gap = drawn[gap > 0], gap[gap > 0, None]  # a resample without a gap has no effects to speak of
    ends = [np.quantile(drawn @ values[:, layer] / gap, (0.025, 0.975), axis=0) for layer in range(values.shape[1])]
    return np.stack([low for low, _ in ends]), np.stack([high for _, high in ends])
