"""What could refute a patching result (a helper of `patching`).

Patching nothing must give the base run and patching everything the donor's. An unrelated donor must not bring the
answer back. Answers that have nothing to do with the prompts must not move. Sites chosen on some prompts must matter on
others.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float

from interp.analyses.patching_scores import OTHER, Effects, Endpoints, Scores, unrelated
from interp.analyses.patching_wave import Patch, make_runs, patched_logits
from interp.core.controls import permutation_test, rank_test
from interp.core.result import Control
from interp.core.seed import numpy_generator
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs

IDENTITY = 1e-3
"""Nats: rounding of one forward in another batch, far below any effect."""
N_SITES = 5
"""Sites that are tested together."""
N_DRAWS = 999
"""Random sets of as many sites."""
LEVEL = 0.05


def components(effects: Effects) -> list[str]:
    """The kinds whose sites are worth ranking: single components, since the stream's ends are 1 by construction."""
    return [kind for kind in effects if kind != "resid_post"] or list(effects)


def best(effects: Effects, n: int) -> list[tuple[str, int, int]]:
    """Kind, layer and index of the `n` sites with the largest |denoising effect|, ties in the order of the model."""
    ranked = [
        (-round(abs(float(value)), 4), layer, kind, index)
        for kind in components(effects)
        for (layer, index), value in np.ndenumerate(effects[kind]["logit_diff"].mean(0))
    ]
    return [(kind, layer, index) for _, layer, kind, index in sorted(ranked)[:n]]


def controls(
    model: LoadedModel, pairs: PromptPairs, ends: Endpoints, denoise: Effects, seed: int
) -> tuple[Control, ...]:
    """All controls that these pairs allow: other donors and other prompts need at least two pairs."""
    found = [*_identities(model, pairs, ends), _answers(denoise)]
    partner = unrelated(pairs)
    if bool((partner != torch.arange(len(pairs))).all()):
        found.append(_donor(model, pairs, ends, denoise))
    if len(pairs) > 1:
        found.append(_other_prompts(denoise, seed))
    return tuple(found)


def _identities(model: LoadedModel, pairs: PromptPairs, ends: Endpoints) -> list[Control]:
    """No patch at all, and every position of the stream after the middle block, against whole forwards."""
    layer = model.n_layers // 2
    runs = make_runs(model, pairs.corrupt.ids, pairs.clean.ids, ())
    cases = (
        ("nothing patched gives the corrupted run", runs.through(-1, runs.base.base["resid_pre.0"]), ends.corrupt),
        (
            f"all positions of resid_post.{layer} patched give the clean run",
            runs.through(layer, runs.donor.base[f"resid_post.{layer}"]),
            ends.clean,
        ),
    )
    found: list[Control] = []
    for name, logits, whole in cases:
        now = Scores.of(logits, pairs.answers, ends.other)
        error = float((now.logit_diff - whole.logit_diff).abs().max())
        statistic = "largest difference of logit differences (nats); the control is what rounding may do"
        passed = error <= IDENTITY
        found.append(Control(name=name, statistic=statistic, observed=error, control=IDENTITY, passed=passed))
    return found


def _answers(denoise: Effects) -> Control:
    """The same patches, scored by answers of unrelated prompts: the largest effect of each, over the same sites."""
    largest = {
        metric: max(float(np.abs(denoise[kind][metric].mean(0)).max()) for kind in components(denoise))
        for metric in ("logit_diff", OTHER)
    }
    return Control(
        name="answers of unrelated prompts",
        statistic="largest |effect| of any site on the logit difference, share of the gap; passes below half",
        observed=largest["logit_diff"],
        control=largest[OTHER],
        passed=largest[OTHER] < 0.5 * largest["logit_diff"],
    )


def _donor(model: LoadedModel, pairs: PromptPairs, ends: Endpoints, denoise: Effects) -> Control:
    """The best sites, taken from another pair's clean run. Compared by pair: signs of the difference are flipped.

    The probability, not the logit difference: any other name in place of the corrupted one takes the wrong answer away
    and so closes half of the gap between the two logits, without bringing the right one back.
    """
    sites = best(denoise, N_SITES)
    runs = make_runs(model, pairs.corrupt.ids, pairs.clean.ids[unrelated(pairs)], list({kind for kind, _, _ in sites}))
    patches = [Patch(kind, layer, index, row) for kind, layer, index in sites for row in range(len(pairs))]
    theirs = np.zeros(len(pairs))
    gap = float((ends.clean.prob - ends.corrupt.prob).mean()) or 1.0
    for wave, logits in patched_logits(model, runs, patches, "patching: unrelated donor"):
        rows = torch.tensor([patch.prompt for patch in wave])
        moved = Scores.of(logits, pairs.answers[rows], ends.other[rows]).prob - ends.corrupt.prob[rows]
        np.add.at(theirs, rows.numpy(), moved.double().cpu().numpy() / gap / len(sites))
    own = np.stack([denoise[kind]["prob"][:, layer, index] for kind, layer, index in sites]).mean(0)
    p = permutation_test(own, theirs, paired=True, alternative="greater").p
    return Control(
        name=f"the {len(sites)} best sites taken from unrelated clean prompts",
        statistic="share of the answer's probability restored, mean over sites and prompts; passes at p < 0.05",
        observed=float(own.mean()),
        control=float(theirs.mean()),
        p_value=p,
        passed=p < LEVEL,
    )


def _other_prompts(denoise: Effects, seed: int) -> Control:
    """Sites chosen on one half of the prompts, measured on the other, against random sites measured there."""
    values = {kind: denoise[kind]["logit_diff"] for kind in components(denoise)}
    half = len(next(iter(values.values()))) // 2
    sites = best({kind: {"logit_diff": value[:half]} for kind, value in values.items()}, N_SITES)
    mean = {kind: np.abs(value[half:].mean(0)) for kind, value in values.items()}
    observed = float(np.mean([mean[kind][layer, index] for kind, layer, index in sites]))
    null = _random_sets([mean[kind].ravel() for kind, _, _ in sites], seed)
    p = rank_test(observed, null)
    return Control(
        name=f"{N_DRAWS} sets of {len(sites)} random sites of the same kinds",
        statistic="mean |effect| on prompts that the sites were not chosen on; the control is the 95th percentile",
        observed=observed,
        control=float(np.quantile(null, 0.95)),
        p_value=p,
        passed=p < LEVEL,
    )


def _random_sets(pools: Sequence[np.ndarray], seed: int) -> Float[np.ndarray, " draw"]:
    """Mean over one random member of each pool, many times."""
    generator = numpy_generator(seed, "random sites")
    return np.mean([generator.choice(pool, size=N_DRAWS) for pool in pools], axis=0)
