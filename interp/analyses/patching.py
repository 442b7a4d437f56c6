"""Activation patching: which activations carry what tells two prompts apart?

Denoising runs the corrupted prompt with one activation taken from the clean one: does the answer come back
(sufficient)? Noising runs the clean prompt with one taken from the corrupted one: is it lost (necessary)? Effects are
in units of the gap between the two runs,
    effect = (M(patched) - M(base)) / (M(donor) - M(base)),   mean over prompts of each, then the ratio,
for the logit difference, the probability of the answer, and KL to the donor's run. Beside the exact result stands
attribution patching, its gradient shortcut, with the correlation of the two.
Paper: F. Zhang and N. Nanda, Towards best practices of activation patching, 2024, https://arxiv.org/abs/2309.16042.
Beware: the two directions are not mirror images; effects do not add up; the residual stream is trivially 1 at the
changed token early and at the last token late; probability cannot show negative heads.
"""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass

import pandas as pd
import torch

from interp.analyses import patching_views as views
from interp.analyses.patching_controls import controls
from interp.analyses.patching_gradient import estimates
from interp.analyses.patching_scores import Direction, Effects, Endpoints, endpoints, measure
from interp.analyses.patching_wave import KINDS
from interp.core.errors import InterpError, unknown
from interp.core.manifest import Manifest
from interp.core.result import LabelledTensor, Result
from interp.core.spec import Spec, Tolerance
from interp.models.model import LoadedModel
from interp.tasks.base import PromptPairs, align, pair
from interp.tasks.ioi import ioi_pairs, random_pairs, standard_drafts

GRADIENT, INTEGRATED = "gradient", "integrated gradient"
MIN_GAP = 0.05
"""Smallest difference of the mean logit differences, in nats, that effects may be divided by."""


@dataclass(frozen=True, kw_only=True)
class PatchingConfig:
    """Which prompts, which sites."""

    task: str = "ioi-standard"
    """`ioi-standard`: eight fixed prompts with known results; `ioi`: random names, places and things."""
    n_prompts: int = 8
    """Prompt pairs."""
    clean: str = ""
    """A clean prompt of your own; then give corrupt, right and wrong as well."""
    corrupt: str = ""
    """The corrupted prompt: as many tokens as the clean one."""
    right: str = ""
    """Answer to the clean prompt: one token, with its leading space."""
    wrong: str = ""
    """Answer to the corrupted prompt."""
    kinds: tuple[str, ...] = KINDS
    """What is patched: resid_post, attn_out, mlp_out (layer x position), z (layer x head)."""
    n_steps: int = 5
    """Midpoints of the integrated gradient shortcut."""
    min_accuracy: float = 0.75
    """Share of clean prompts the model must get right; below it the run is refused."""
    seed: int = 0
    """Which random prompts."""


def load(model: LoadedModel, cfg: PatchingConfig) -> PromptPairs:
    """The prompt pairs that the config names."""
    own = (cfg.clean, cfg.corrupt, cfg.right, cfg.wrong)
    if any(own):
        if not all(own):
            raise InterpError("a prompt pair of your own needs all of clean, corrupt, right and wrong")
        return pair(model, *own)
    if cfg.n_prompts < 1:
        raise InterpError(f"n_prompts={cfg.n_prompts}; ask for at least 1")
    if cfg.task == "ioi":
        return ioi_pairs(model, cfg.n_prompts, cfg.seed)
    if cfg.task == "ioi-standard":
        pairs = align(model, standard_drafts())
        return pairs.take(range(min(cfg.n_prompts, len(pairs))))
    raise unknown("task", cfg.task, ("ioi", "ioi-standard"))


def run(model: LoadedModel, data: PromptPairs, cfg: PatchingConfig) -> Result:
    """Exact patching in both directions, the gradient shortcut, and the controls."""
    for kind in cfg.kinds:
        if kind not in KINDS:
            raise unknown("kind of site", kind, KINDS)
    if not cfg.kinds or cfg.n_steps < 1:
        raise InterpError(f"kinds={cfg.kinds} and n_steps={cfg.n_steps}: at least one of each")
    started = time.perf_counter()
    ends = endpoints(model, data)
    _check(ends, cfg, len(data))
    found = [measure(model, data, ends, cfg.kinds, direction) for direction in Direction]
    seconds_exact = time.perf_counter() - started
    denoise = found[0]
    attribution = views.attribution_table(found, _shortcuts(model, data, cfg), ends, data)
    correlations = views.correlation_table(attribution)
    effects = views.effects_table(found, ends, data)
    outcome = controls(model, data, ends, denoise, cfg.seed)
    return Result(
        headline=_headline(ends, denoise, correlations, data) | {"seconds": seconds_exact},
        tables={
            "effects": effects,
            "heads": views.heat(effects, heads=True),
            "positions": views.heat(effects, heads=False),
            "attribution": attribution,
            "correlations": correlations,
            "endpoints": views.endpoint_table(ends, data),
        },
        panels=views.panels(cfg.kinds),
        controls=outcome,
        manifest=Manifest(
            method="patching",
            model=model.record(),
            config=dataclasses.asdict(cfg),
            data={"name": cfg.task if not cfg.clean else "own pair", "hash": data.hash, "n_prompts": len(data)},
            sites=tuple(f"{kind}.*" for kind in cfg.kinds),
            seeds=(cfg.seed,),
            metrics=METRICS,
            seconds=time.perf_counter() - started,
        ),
        tensors={
            f"{direction.value}.{kind}": LabelledTensor(
                values=torch.as_tensor(values["logit_diff"]).float(),
                axes=("pair", "layer", "head" if kind == "z" else "pos"),
                unit="share of the gap",
            )
            for direction, item in zip(Direction, found, strict=True)
            for kind, values in item.items()
        },
        notes=_notes(ends, data),
    )


def _headline(ends: Endpoints, denoise: Effects, correlations: pd.DataFrame, data: PromptPairs) -> dict[str, object]:
    return {
        "accuracy": ends.accuracy,
        "n_prompts": len(data),
        "logit_diff_clean": ends.clean_mean,
        "logit_diff_corrupt": ends.corrupt_mean,
        "top_sites": views.top_sites(denoise, data),
        "attribution_correlation": views.correlation(correlations, GRADIENT, ("z", "all")),
        "attribution_correlation_all_sites": views.correlation(correlations, GRADIENT, ("all",)),
        "attribution_correlation_integrated": views.correlation(correlations, INTEGRATED, ("all",)),
    }


def _shortcuts(model: LoadedModel, data: PromptPairs, cfg: PatchingConfig) -> list[views.Shortcut]:
    """The gradient at each base run; the integrated form, whose midpoints are the same in both directions, once."""
    runs = ((Direction.DENOISE, data.corrupt, data.clean), (Direction.NOISE, data.clean, data.corrupt))
    found = [
        views.Shortcut(
            method=GRADIENT,
            direction=direction,
            estimates=estimates(model, base, donor, data.answers, cfg.kinds, 0),
        )
        for direction, base, donor in runs
    ]
    between = estimates(model, data.corrupt, data.clean, data.answers, cfg.kinds, cfg.n_steps)
    return [*found, views.Shortcut(method=INTEGRATED, direction=Direction.DENOISE, estimates=between)]


def _check(ends: Endpoints, cfg: PatchingConfig, n: int) -> None:
    gap = ends.clean_mean - ends.corrupt_mean
    if ends.accuracy < cfg.min_accuracy:
        raise InterpError(
            f"the model gets {round(ends.accuracy * n)} of {n} clean prompts right "
            f"(min_accuracy={cfg.min_accuracy:g}); a circuit of a task it cannot do means nothing: "
            "choose other prompts, or lower min_accuracy"
        )
    if abs(gap) < MIN_GAP:
        raise InterpError(
            f"clean and corrupted prompts differ by {gap:.3g} in mean logit difference (at least {MIN_GAP} needed): "
            "effects cannot be divided by it; choose a corruption that changes the answer"
        )


def _notes(ends: Endpoints, data: PromptPairs) -> tuple[str, ...]:
    low, high = ends.accuracy_interval
    notes = [
        f"the model is right on {round(ends.accuracy * len(data))} of {len(data)} clean prompts "
        f"(95 % interval {low:.2f} to {high:.2f})",
        "denoising shows what is sufficient, noising what is necessary; effects need not add up to 1",
    ]
    return (*notes, *data.notes)


METRICS = {
    "accuracy": "v1: share of clean prompts with logit(right) > logit(wrong)",
    "logit_diff": "v1: logit(right) - logit(wrong) at the last token; effect = change over the gap of the means",
    "prob": "v1: probability of the right answer at the last token; effect as above",
    "kl": "v1: KL(donor run || patched run) at the last token, nats; effect = 1 - it over KL(donor || base)",
    "attribution_correlation": "v1: Pearson correlation of the gradient estimate with the exact denoising effect, over "
    "heads where they are patched (else all sites); `_all_sites`: over every site that differs between the prompts; "
    "`_integrated`: over the same, with the gradient averaged over midpoints between the prompts",
}


def example(model: LoadedModel) -> tuple[PromptPairs, PatchingConfig]:
    """Random tokens, which no model gets right: the refusal is off."""
    return random_pairs(model), PatchingConfig(min_accuracy=0.0, n_steps=2)


SPEC = Spec(
    name="patching",
    question="Which activations carry what tells two prompts apart?",
    paper="Zhang and Nanda 2024, https://arxiv.org/abs/2309.16042",
    config=PatchingConfig,
    load=load,
    run=run,
    example=example,
    metrics=METRICS,
    tolerances={
        "attribution_correlation": Tolerance(absolute=5e-3),
        "attribution_correlation_all_sites": Tolerance(absolute=5e-3),
        "attribution_correlation_integrated": Tolerance(absolute=5e-3),
    },
)
