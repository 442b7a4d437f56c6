"""Which neurons write a class: probes of the stream, neurons along them, and what it costs to switch these off (a
helper of `glu_neurons`).

A ridge probe of the stream after each layer at the last token, w = (X^T X + lambda I)^-1 X^T y on centred activations,
lambda = RIDGE * mean squared length; its accuracy on other words stands beside that of probes of shuffled labels.
Neurons of a class: the k of each layer whose value vectors have the largest cosine with w (with -w for the other
class), in the layers where the class can be read at all: before them a probe points nowhere. They are set to zero at
the last token only. Beside them random neurons of the same layers whose contribution |hidden_j| * |W_down[j]| is alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.analyses.glu_neurons_inputs import ROWS, Prompts
from interp.analyses.glu_neurons_scan import Mlp
from interp.core.seed import torch_generator
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.instrument.edits import Edit, zero
from interp.models.model import LoadedModel

RIDGE = 0.1
"""Of the mean squared length of the centred activations."""
READABLE = 0.75
"""Accuracy from which a layer's probe is worth following."""
N_SHUFFLES = 20
"""Probes of shuffled labels: along a direction as strong as the class, one alone is right nearly always or never."""
ALIKE = 8
"""Neurons nearest in contribution, among which one stands in for each chosen one."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Probe:
    """One layer's probe."""

    layer: int
    direction: Float[Tensor, " d_model"]
    """Towards the second class, of length 1."""
    accuracy: float
    """On the test prompts."""
    accuracy_train: float
    """On training prompts whose deciding token the probe has not seen: two folds, each probe tested on the other."""
    accuracy_shuffled: float
    """On the test prompts, of probes of shuffled labels, mean."""

    @property
    def readable(self) -> bool:
        """Whether the class is there to be read, as far as the training prompts tell."""
        return self.accuracy_train >= READABLE


def at_last(model: LoadedModel, given: Prompts, sites: Sequence[Site]) -> dict[Site, Float[Tensor, "prompt ..."]]:
    """Sites at the last token, float64."""
    parts: dict[Site, list[Tensor]] = {site: [] for site in sites}
    for start in range(0, len(given), ROWS):
        with capture(model, sites, positions=given.last) as acts:
            model(given.ids[start : start + ROWS])
        for site in sites:
            parts[site].append(acts[site][:, 0].double().cpu())
    return {site: torch.cat(found) for site, found in parts.items()}


def ridge(x: Float[Tensor, "n d"], y: Float[Tensor, " n"]) -> Float[Tensor, " d"]:
    """The probe's direction; solved in the smaller space, X^T (X X^T + lambda I)^-1 y."""
    centred = x - x.mean(0)
    gram = centred @ centred.T
    strength = RIDGE * float(gram.diagonal().mean()) or 1.0
    factor = torch.linalg.cholesky(gram + strength * torch.eye(len(x), dtype=x.dtype))
    return centred.T @ torch.cholesky_solve((y - y.mean())[:, None], factor)[:, 0]


def two_folds(x: Float[Tensor, "n d"], given: Prompts) -> float:
    """Accuracy over two folds that share no deciding token; 0.5 if one of them has a single class."""
    token = given.ids[torch.arange(len(given)), given.where]
    order = {value: number for number, value in enumerate(token.unique().tolist())}
    fold = torch.tensor([order[value] % 2 == 0 for value in token.tolist()])
    right = 0.0
    for held in (fold, ~fold):
        seen = ~held
        if any(len(given.label[part].unique()) < 2 for part in (held, seen)):
            return 0.5
        said = (x[held] - x[seen].mean(0)) @ ridge(x[seen], given.sign[seen])
        right += float(((said > 0) == given.label[held]).sum())
    return right / len(given)


def probes(model: LoadedModel, train: Prompts, test: Prompts, layers: Sequence[int], seed: int) -> list[Probe]:
    """A probe for the stream after each layer."""
    sites = [Site(Part.RESID_POST, layer) for layer in layers]
    x, held = at_last(model, train, sites), at_last(model, test, sites)
    generator = torch_generator(seed, "shuffled labels")
    orders = [torch.randperm(len(train), generator=generator) for _ in range(N_SHUFFLES)]
    found: list[Probe] = []
    for layer, site in zip(layers, sites, strict=True):

        def right(direction: Tensor, site: Site = site) -> float:
            said = (held[site] - x[site].mean(0)) @ direction
            return float(((said > 0) == test.label).double().mean())

        shuffled = [right(ridge(x[site], train.sign[order])) for order in orders]
        direction = ridge(x[site], train.sign)
        found.append(
            Probe(
                layer=layer,
                direction=direction / direction.norm().clamp_min(1e-30),
                accuracy=right(direction),
                accuracy_train=two_folds(x[site], train),
                accuracy_shuffled=sum(shuffled) / len(shuffled),
            )
        )
    return found


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """Neurons of one layer that write a class."""

    layer: int
    positive: bool
    """Whether they write the second class."""
    neurons: Int[Tensor, " k"]
    cosines: Float[Tensor, " k"]
    """With the probe, towards their class; descending."""


def choose(mlps: Sequence[Mlp], found: Sequence[Probe], k: int) -> list[Chosen]:
    """The k neurons of each layer and class."""
    made: list[Chosen] = []
    for mlp, probe in zip(mlps, found, strict=True):
        cosines = torch.nn.functional.normalize(mlp.values, dim=1) @ probe.direction
        for positive in (False, True):
            best = (cosines if positive else -cosines).topk(min(k, len(cosines) // 4))
            made.append(Chosen(layer=mlp.layer, positive=positive, neurons=best.indices, cosines=best.values))
    return made


def alike(
    contribution: Float[Tensor, " neuron"], chosen: Bool[Tensor, " neuron"], generator: torch.Generator
) -> Int[Tensor, " k"]:
    """For each chosen neuron another of like contribution, none twice."""
    free = (~chosen).nonzero()[:, 0]
    taken: list[int] = []
    for neuron in chosen.nonzero()[:, 0].tolist():
        left = free[~torch.isin(free, torch.tensor(taken, dtype=free.dtype))]
        near = (contribution[left] - contribution[neuron]).abs().argsort(stable=True)[:ALIKE]
        taken.append(int(left[near[int(torch.randint(len(near), (1,), generator=generator))]]))
    return torch.tensor(taken)


def hidden(model: LoadedModel, given: Prompts, mlps: Sequence[Mlp]) -> dict[int, Float[Tensor, "prompt neuron"]]:
    """Hidden values at the last token, by layer."""
    sites = {mlp.layer: Site(Part.NEURONS, mlp.layer) for mlp in mlps}
    values = at_last(model, given, list(sites.values()))
    return {layer: values[site] for layer, site in sites.items()}


def contributions(
    values: Mapping[int, Float[Tensor, "prompt neuron"]], mlps: Sequence[Mlp]
) -> dict[int, Float[Tensor, " neuron"]]:
    """Mean |hidden_j| times the length of what the neuron writes."""
    return {mlp.layer: values[mlp.layer].abs().mean(0) * mlp.values.norm(dim=1) for mlp in mlps}


def pushes(
    values: Mapping[int, Float[Tensor, "prompt neuron"]], given: Prompts, mlps: Sequence[Mlp],
    found: Sequence[Probe], chosen: Sequence[Chosen],
) -> list[Float[Tensor, " k"]]:  # fmt: skip
    """How far each chosen neuron moves the stream towards the right class, along the probe, mean over prompts.

    The cosine says which way a neuron writes where its hidden value is positive; a GLU's can be negative.
    """
    by_layer = {mlp.layer: (mlp, probe) for mlp, probe in zip(mlps, found, strict=True)}
    made: list[Tensor] = []
    for item in chosen:
        mlp, probe = by_layer[item.layer]
        signed = (values[item.layer][:, item.neurons] * given.sign[:, None]).mean(0)
        made.append(signed * (mlp.values[item.neurons] @ probe.direction))
    return made


def switched_off(chosen: dict[int, list[int]], *, at: int | None) -> list[Edit]:
    """Neurons set to zero, layer by layer."""
    return [
        zero(Site(Part.NEURONS, layer), at=at, dims=sorted(neurons)) for layer, neurons in chosen.items() if neurons
    ]


def by_layer(chosen: Sequence[Chosen], positive: bool | None = None) -> dict[int, list[int]]:
    """The neurons of one class, or of both, by layer."""
    found: dict[int, list[int]] = {}
    for item in chosen:
        if positive is None or item.positive == positive:
            found.setdefault(item.layer, []).extend(item.neurons.tolist())
    return found
