"""What could refute a patching result (a helper of `patching`).

Patching everything must give the donor's run, an unrelated donor must not bring the answer back, and answers that have
nothing to do with the prompts must not move.
"""

from __future__ import annotations

import numpy as np
import torch

from interp.analyses.patching_scores import OTHER, Effects, Endpoints, Scores, unrelated
from interp.analyses.patching_wave import Patch, make_runs, patched_logits
from interp.core.controls import rank_test
from interp.core.result import Control
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs

IDENTITY = 1e-3
"""Nats: rounding of one forward in another batch, far below any effect."""


def best(effects: Effects) -> tuple[str, int, int]:
    """Kind, layer and index of the largest denoising effect; single components before the stream, whose ends are 1."""
    kinds = [kind for kind in effects if kind != "resid_post"] or list(effects)
    tops = {kind: np.abs(effects[kind]["logit_diff"].mean(0)) for kind in kinds}
    kind = max(tops, key=lambda name: float(tops[name].max()))
    layer, index = np.unravel_index(int(tops[kind].argmax()), tops[kind].shape)
    return kind, int(layer), int(index)


def controls(model: LoadedModel, pairs: PromptPairs, ends: Endpoints, denoise: Effects) -> tuple[Control, ...]:
    """All controls that these pairs allow; an unrelated donor needs two pairs without a common answer."""
    kind, layer, index = best(denoise)
    found = [_identity(model, pairs, ends), _answers(denoise, kind, layer, index)]
    partner = unrelated(pairs)
    if bool((partner != torch.arange(len(pairs))).all()):
        found.append(_donor(model, pairs, ends, denoise, Patch(kind, layer, index, 0)))
    return tuple(found)


def _identity(model: LoadedModel, pairs: PromptPairs, ends: Endpoints) -> Control:
    """Every position of the stream after the middle block from the clean run."""
    layer = model.n_layers // 2
    runs = make_runs(model, pairs.corrupt.ids, pairs.clean.ids, ())
    rows = torch.arange(len(pairs))
    resid = runs.donor.base[f"resid_post.{layer}"]
    for later in range(layer + 1, model.n_layers):
        resid = runs.base.block(later, resid, rows)
    logits = runs.base.head(resid[:, -1:])[:, 0]
    now = Scores.of(logits, pairs.answers, ends.other)
    error = float((now.logit_diff - ends.clean.logit_diff).abs().max())
    return Control(
        name=f"all positions of resid_post.{layer} patched give the clean run",
        statistic="largest difference of logit differences (nats); the control is what rounding may do",
        observed=error,
        control=IDENTITY,
        passed=error <= IDENTITY,
    )


def _answers(denoise: Effects, kind: str, layer: int, index: int) -> Control:
    """Answers of unrelated prompts: what the same patches do to them is the null."""
    observed = float(abs(denoise[kind]["logit_diff"][:, layer, index].mean()))
    null = np.concatenate([np.abs(values[OTHER].mean(0)).ravel() for values in denoise.values()])
    return Control(
        name="answers of unrelated prompts, all sites",
        statistic=f"|effect| of {_name(kind, layer, index)} on the logit difference; the control is the largest of any",
        observed=observed,
        control=float(null.max()),
        p_value=rank_test(observed, null),
        passed=observed > float(null.max()),
    )


def _donor(model: LoadedModel, pairs: PromptPairs, ends: Endpoints, denoise: Effects, at: Patch) -> Control:
    """The same site taken from another pair's clean run."""
    partner = unrelated(pairs)
    runs = make_runs(model, pairs.corrupt.ids, pairs.clean.ids[partner], (at.kind,))
    patches = [Patch(at.kind, at.layer, at.index, row) for row in range(len(pairs))]
    moved = torch.zeros(len(pairs))
    for wave, logits in patched_logits(model, runs, patches, "patching: unrelated donor"):
        rows = torch.tensor([patch.prompt for patch in wave])
        now = Scores.of(logits, pairs.answers[rows], ends.other[rows])
        moved[rows] = now.prob - ends.corrupt.prob[rows]
    gap = float((ends.clean.prob - ends.corrupt.prob).mean())
    observed = float(denoise[at.kind]["prob"][:, at.layer, at.index].mean())
    control = float(moved.mean()) / gap if gap else 0.0
    return Control(
        name=f"{_name(at.kind, at.layer, at.index)} from an unrelated clean prompt",
        statistic="share of the answer's probability restored; passes below half",
        observed=observed,
        control=control,
        passed=control < 0.5 * observed,
    )


def _name(kind: str, layer: int, index: int) -> str:
    return f"{kind}.{layer} {'head' if kind == 'z' else 'position'} {index}"
