"""Can a concept be removed by switching off a few latents, and does that leave the others?

A probe w_c per concept is fitted on activations. The effect of a latent on concept c is
    e_i = (mean f_i with c - mean f_i without) * (d_i . w_c)
TPP (targeted probe perturbation): the n latents with the largest e_i (mean difference positive) are set to zero, what
the dictionary does not reconstruct stays;
    tpp_n = mean_c [ drop of accuracy on c  -  mean drop on the other concepts ]
SCR (spurious correlation removal): a probe for a wanted label is trained where a spurious one always goes with it; the
n latents with the largest |e_i| for the spurious label are set to zero;
    scr_n = (acc_ablated - acc_biased) / (acc_clean - acc_biased)
with acc_clean that of a probe trained on texts where the two are independent.
Null for both: as many live latents of nearly equal mean activation, drawn at random.
Source: A. Karvonen et al. 2024, https://arxiv.org/abs/2411.18895; S. Marks et al. 2024 (SHIFT),
https://arxiv.org/abs/2403.19647. Beware: scr has no scale where the bias costs nothing (None). Setting latents to zero
also moves the mean, and the probe keeps its threshold: where only one side of a label has latents, that alone can cost
accuracy. Decoders are taken to be linear in the codes, as all kinds here are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.dictionaries.base import Dictionary
from interp.dictionaries.judge.concepts import (
    Labelled,
    Probe,
    balanced,
    fit_probe,
    matched_latents,
    mean_difference,
)

METRICS = {
    "tpp": "v1: mean over concepts of (drop of probe accuracy on the concept - mean drop on the others) when the n "
    "latents with the largest positive effect on it are set to zero; test texts, classes balanced",
    "scr": "v1: (acc_ablated - acc_biased) / (acc_clean - acc_biased) on test texts where labels are independent, with "
    "the n latents of the largest |effect| on the spurious label set to zero",
}
NS = (2, 5, 10, 20, 50, 100, 500)


@dataclass(frozen=True, kw_only=True, eq=False)
class Perturbed:
    """Accuracies with n latents off."""

    n: int
    n_latents: Int[Tensor, "concept"]
    """How many were switched off: fewer than n where fewer have an effect."""
    drops: Float[Tensor, "concept probe"]
    """Drop of each probe's accuracy when each concept's latents are off."""
    null: Float[Tensor, "draw concept probe"]
    """The same for random latents of equal mean activation."""

    @property
    def score(self) -> float:
        return _targeted(self.drops)

    @property
    def null_score(self) -> float:
        """Mean over draws."""
        return sum(_targeted(drops) for drops in self.null) / len(self.null)


def _targeted(drops: Tensor) -> float:
    own = drops.diagonal()
    others = (drops.sum(1) - own) / (drops.shape[1] - 1)
    return float((own - others).mean())


def without(
    x: Float[Tensor, "text d"], codes: Float[Tensor, "text m"], features: Float[Tensor, "m d"], off: Int[Tensor, "n"]
) -> Float[Tensor, "text d"]:
    """Activations less the contribution of some latents; what is not reconstructed stays."""
    return x - codes[:, off].to(x) @ features[off.to(features.device)].to(x)


@torch.no_grad()
def tpp(
    train: Labelled, test: Labelled, dictionary: Dictionary, *, ns: Sequence[int] = NS, n_null: int = 3, seed: int = 0
) -> list[Perturbed]:
    """One entry per n that the dictionary is wide enough for."""
    if train.names != test.names:
        raise InterpError(f"train and test have other concepts: {train.names} and {test.names}")
    features = dictionary.features.float()
    x, codes = (train.activations(), test.activations()), (train.codes(dictionary), test.codes(dictionary))
    fits = [balanced(train.labels, concept, seed=seed) for concept in range(len(train.names))]
    tests = [balanced(test.labels, concept, seed=seed) for concept in range(len(train.names))]
    probes = [fit_probe(x[0][rows], y) for rows, y in fits]

    def accuracies(changed: Tensor) -> Tensor:
        return torch.stack([p.correct(changed[r], y).double().mean() for p, (r, y) in zip(probes, tests, strict=True)])

    base, activity = accuracies(x[1]), codes[0].mean(0)

    def dropped(off: Tensor) -> Tensor:
        return base - accuracies(without(x[1], codes[1], features, off))

    def alike(off: Tensor, generator: torch.Generator) -> Tensor:
        return matched_latents(off, activity, generator=generator)

    orders = [
        _ranked(mean_difference(codes[0][rows], y).clamp_min(0), features, probe)
        for probe, (rows, y) in zip(probes, fits, strict=True)
    ]
    found: list[Perturbed] = []
    for n in ns:
        if n > dictionary.d_dict:
            break
        chosen = [order[:n] for order in orders]
        generator = torch_generator(seed, "tpp-null", n)
        null = torch.stack([torch.stack([dropped(alike(off, generator)) for off in chosen]) for _ in range(n_null)])
        drops = torch.stack([dropped(off) for off in chosen])
        found.append(Perturbed(n=n, n_latents=torch.tensor([len(off) for off in chosen]), drops=drops, null=null))
    return found


def _ranked(difference: Tensor, features: Tensor, probe: Probe, *, absolute: bool = False) -> Int[Tensor, "n"]:
    """Latents with an effect, largest first."""
    effect = difference.double() * (features.double().cpu() @ probe.weight)
    effect = effect.abs() if absolute else effect
    order = effect.argsort(descending=True)
    return order[effect[order] > 0]


@dataclass(frozen=True, kw_only=True)
class Removal:
    """Removing a spurious label by switching off n latents."""

    n: int
    biased: float
    """Accuracy of the probe trained where the labels go together."""
    ablated: float
    clean: float
    """Accuracy of a probe trained where they do not."""
    null: float
    """As `ablated`, with random latents of equal mean activation; mean of the draws."""

    @property
    def score(self) -> float | None:
        return self._share(self.ablated)

    @property
    def null_score(self) -> float | None:
        return self._share(self.null)

    def _share(self, accuracy: float) -> float | None:
        gap = self.clean - self.biased
        return (accuracy - self.biased) / gap if gap > 0 else None


@torch.no_grad()
def scr(
    x: tuple[Float[Tensor, "train d"], Float[Tensor, "test d"]],
    codes: tuple[Float[Tensor, "train m"], Float[Tensor, "test m"]],
    features: Float[Tensor, "m d"],
    wanted: tuple[Bool[Tensor, "train"], Bool[Tensor, "test"]],
    spurious: tuple[Bool[Tensor, "train"], Bool[Tensor, "test"]],
    *,
    ns: Sequence[int] = NS,
    n_null: int = 3,
    seed: int = 0,
) -> list[Removal]:
    """x, codes, labels: training and test texts, all four combinations of the two labels in each.

    The biased probe sees the training texts on which the labels agree, the clean one all of them.
    """
    for part in (0, 1):
        cells = {(bool(a), bool(b)) for a, b in zip(wanted[part], spurious[part], strict=True)}
        if len(cells) < 4:
            raise InterpError("scr needs texts with all four combinations of the two labels, to train and to test")
    agree = wanted[0] == spurious[0]
    biased, clean = fit_probe(x[0][agree], wanted[0][agree]), fit_probe(x[0], wanted[0])
    order = _ranked(
        mean_difference(codes[0], spurious[0]), features, fit_probe(x[0], spurious[0]), absolute=True
    )  # fmt: skip

    def accuracy(probe: Probe, off: Tensor) -> float:
        return float(probe.correct(without(x[1], codes[1], features, off), wanted[1]).double().mean())

    nothing, activity = torch.empty(0, dtype=torch.long), codes[0].mean(0)
    start, best = accuracy(biased, nothing), accuracy(clean, nothing)
    found: list[Removal] = []
    for n in ns:
        if n > len(features):
            break
        generator = torch_generator(seed, "scr-null", n)
        off = order[:n]
        null = [accuracy(biased, matched_latents(off, activity, generator=generator)) for _ in range(n_null)]
        ablated = accuracy(biased, off)
        found.append(Removal(n=n, biased=start, ablated=ablated, clean=best, null=sum(null) / n_null))
    return found
