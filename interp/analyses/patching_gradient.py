"""Attribution patching: the effect of every patch at once, from gradients (a helper of `patching`).

    effect(n) ~ sum over the patched coordinates of (donor - base) * d metric / d activation
at the base run (Nanda 2023; one backward pass), or with the gradient averaged over runs whose embeddings lie between
the two (midpoints k + 1/2 of m steps, the integrated form; Hanna et al. 2024, https://arxiv.org/abs/2403.17806).
Beware: it linearises; saturated softmaxes hide effects, and a site that acts through the norm is misjudged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from interp.analyses.patching_wave import HEAD_KINDS
from interp.core.progress import track
from interp.core.sites import Site
from interp.instrument.capture import capture
from interp.instrument.edits import edited, set_to
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel


def estimates(
    model: LoadedModel,
    base: TokenRecord,
    donor: TokenRecord,
    answers: Tensor,
    kinds: Sequence[str],
    n_steps: int,
) -> dict[Site, Float[Tensor, "pair index"]]:
    """Estimated change of the logit difference for every patch: per site, pair and position (or head, for z).

    n_steps: 0 takes the gradient at the base run, m > 0 averages over m midpoints on the way to the donor.
    """
    sites = model.resolve([f"{kind}.*" for kind in kinds])
    values = {
        name: _values(model, record, [*sites, model.table.one("embed")])
        for name, record in (("base", base), ("donor", donor))
    }
    grads = [torch.zeros_like(values["base"][site]) for site in sites]
    points = [(k + 0.5) / n_steps for k in range(n_steps)] or [0.0]
    embed = model.table.one("embed")
    for point in track(points, "attribution patching"):
        at = torch.lerp(values["base"][embed], values["donor"][embed], point)
        with edited(model, set_to(embed, at)), capture(model, sites, grad=True) as acts:
            logits = model(base.ids)[:, -1]
            difference = logits.gather(1, answers.to(logits.device))
            total = (difference[:, 0] - difference[:, 1]).sum()
            # Into the activations alone: the weights' own gradients stay as they were, also after an exception.
            torch.autograd.backward(
                total, inputs=[raw for site in sites if (raw := acts.records[site][-1].raw) is not None]
            )
        for grad, site in zip(grads, sites, strict=True):
            grad += acts.grad(site) / len(points)
    found: dict[Site, Tensor] = {}
    for grad, site in zip(grads, sites, strict=True):
        product = (values["donor"][site] - values["base"][site]) * grad
        found[site] = product.sum(dim=(1, 3)) if site.part.value in HEAD_KINDS else product.sum(dim=2)
    return found


def _values(model: LoadedModel, record: TokenRecord, sites: Sequence[Site]) -> dict[Site, Tensor]:
    with capture(model, sites) as acts:
        model(record.ids)
    return dict(acts.items())
