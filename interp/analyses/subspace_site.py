"""A site of a real model as something that can be patched at one position (a helper of `subspace`).

Only the patched position and those after it are run again, from the patched block on: keys and values of the positions
before it come from a cache of the base prompts, and what enters the block is remembered. The graph for gradients begins
at the patched activation.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.analyses.subspace_maths import Acts, Outcome, Sides
from interp.core.errors import InterpError, unknown
from interp.core.seed import torch_generator
from interp.core.sites import Part, Site
from interp.instrument.blocks import BlockRunner
from interp.instrument.capture import capture
from interp.instrument.edits import Context, Edit, edited
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs

STREAM = (Part.RESID_PRE, Part.RESID_MID, Part.RESID_POST)
COMPONENTS = (Part.ATTN_OUT, Part.MLP_OUT)
HIDDEN = {Part.NEURONS: "W_down", Part.Z: "W_O"}
"""Sites that one matrix reads, and that matrix: there the row and null parts of a direction mean something."""


def default_site(model: LoadedModel) -> str:
    """The stream two thirds of the way up."""
    return f"resid_post.{min(model.n_layers - 1, round(2 * model.n_layers / 3))}"


def find_site(model: LoadedModel, name: str) -> Site:
    """A site that can be patched here."""
    site = model.table.one(name or default_site(model))
    known = (*STREAM, *COMPONENTS, *HIDDEN)
    if site.part not in known or site.layer is None:
        raise unknown("site of a subspace", name, [f"{part.value}.{site.layer or 0}" for part in known])
    return site


def output_matrix(model: LoadedModel, site: Site) -> Float[Tensor, "D d"] | None:
    """The matrix that alone reads the site; None for the stream and for what is added to it."""
    name = HIDDEN.get(site.part)
    if name is None or not model.table.has_weight(name, site.layer):
        return None
    weight = model.weight(name, site.layer).detach()
    return weight.flatten(0, -2)


class SiteReader:
    """The rest of the model behind one site and position, for the base prompts of some pairs."""

    def __init__(self, model: LoadedModel, pairs: PromptPairs, site: Site, role: str) -> None:
        if role not in pairs.roles:
            raise unknown("role", role, pairs.roles)
        where = pairs.roles[role].unique()
        if len(where) != 1:
            raise InterpError(
                f"role {role!r} lies at positions {where.tolist()} of the prompts; choose one with one place"
            )
        self.model, self.site, self.layer = model, site, site.layer or 0
        self.pos, self.answers = int(where), pairs.answers
        sites = tuple(dict.fromkeys((f"resid_pre.{self.layer}", str(site))))
        self.runner = BlockRunner(model, pairs.clean.ids, start=self.pos, sites=sites)
        self.base: Acts = self.runner.base[str(site)][:, 0].flatten(1)
        with capture(model, site, positions=self.pos) as acts:
            model(pairs.corrupt.ids)
        self.source: Acts = acts[site][:, 0].flatten(1)

    def sides(self, label: Bool[Tensor, " row"]) -> Sides:
        """Clean activations with their classes."""
        return Sides(base=self.base, source=self.source, label=label.to(self.base.device))

    def __call__(self, acts: Acts, rows: Int[Tensor, " row"]) -> Outcome:
        """See `Reader`."""
        grad, rows = acts.requires_grad, rows.to(self.model.device)

        def put(x: Tensor, _: Context) -> Tensor:
            return torch.cat([acts.to(x).view_as(x[:, :1]), x[:, 1:]], dim=1)

        resid = self.runner.base[f"resid_pre.{self.layer}"][rows]
        with edited(self.model, Edit(self.site, put, label="subspace")):
            resid = self.runner.block(self.layer, resid, rows, grad=grad)
        for layer in range(self.layer + 1, self.model.n_layers):
            resid = self.runner.block(layer, resid, rows, grad=grad)
        logits = self.runner.head(resid[:, -1:], grad=grad)[:, 0]
        chosen = logits.gather(1, self.answers[rows.cpu()].to(logits.device))
        hit = (logits.argmax(-1) == self.answers[rows.cpu(), 1].to(logits.device)).to(logits)
        return Outcome(logit_diff=chosen[:, 0] - chosen[:, 1], hit=hit)


def shuffled(model: LoadedModel, seed: int) -> LoadedModel:
    """The same architecture with the entries of every matrix in random order: equal norms, nothing learnt."""
    module: Any = model.module
    with torch.random.fork_rng(devices=[]):
        made = type(module)(copy.deepcopy(module.config))
    made.to(device=model.device, dtype=model.dtype).eval().requires_grad_(False)
    own = dict(module.named_parameters())
    for name, parameter in made.named_parameters():
        value = own[name].detach()
        if value.ndim > 1:
            order = torch.randperm(value.numel(), generator=torch_generator(seed, "shuffled", name))
            value = value.flatten()[order.to(value.device)].view_as(value)
        parameter.copy_(value)
    return LoadedModel(module=made, tokenizer=model.tokenizer, source=f"{model.source}, weights shuffled")
