"""Does a mean-difference vector move a behaviour, how far, at what cost, and would any vector have done?

v_l     = mean over contrast pairs of (a+ - a-), read at the last token of resid_post.l   (Rimsky et al. 2024)
steered = a + strength * (typical norm of resid_post.l) * v_l / |v_l|, at every token but the first and sinks
effect  = change of log P(good, ...) - log P(bad, ...) on held-out prompts;  cost = KL on neutral text, nats per token
Layer and strength are chosen on one half of the prompts within a KL budget and reported on the other half, beside
random directions of equal norm and directions from the same pairs with half of their labels exchanged.
Paper: Rimsky et al. 2024, arxiv.org/abs/2312.06681; reliability: Tan et al. 2024, arxiv.org/abs/2407.12404.
Beware: random vectors move propensities too; effects need not grow with strength; rank layers by effect at equal cost.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import pandas as pd
import torch

from interp.core.errors import InterpError
from interp.core.hash import hash_json
from interp.core.manifest import Manifest
from interp.core.result import LabelledTensor, Panel, Result
from interp.core.seed import torch_generator
from interp.core.spec import Spec, Tolerance
from interp.instrument.tokens import TokenRecord, adds_start, from_ids
from interp.models.model import LoadedModel
from interp.steering.evaluate import Batch, Neutral, batches, readout, steerable
from interp.steering.measure import Measured, controls, measure, p95
from interp.steering.sweep import Sweep, find_directions, sweep
from interp.tasks.corpora import load_corpus
from interp.tasks.sentiment import ContrastPairs, sentiment_pairs

START_NOTE = "pairs and prompts begin with the tokenizer's start token; neutral text, cut from longer text, does not"


@dataclass(frozen=True, kw_only=True)
class SteeringConfig:
    """What to steer, where to look, and with how many controls."""

    depths: tuple[float, ...] = (0.2, 0.4, 0.55, 0.7, 0.8, 0.9)
    """Layers to try, as fractions of the depth."""
    strengths: tuple[float, ...] = (-0.4, -0.2, 0.1, 0.2, 0.3, 0.4)
    """Norm of what is added, as a multiple of the typical norm of the stream there."""
    method: str = "mean"
    """How the direction is made from the pairs: mean or pca."""
    n_pairs: int = 40
    """Contrast pairs, at most 40."""
    n_prompts: int = 24
    """Held-out prompts, at most 24; half to choose on, half to report."""
    n_random: int = 20
    """Random directions of equal norm, and as many from the same pairs with half of the labels exchanged."""
    kl_budget: float = 0.3
    """Largest KL on neutral text, in nats per token, that a setting may cost to be chosen."""
    corpus: str = "docs:assignment"
    """Neutral text."""
    n_neutral: int = 2
    """Sequences of neutral text to choose on; as many again, taking no part in the choice, to report."""
    length: int = 64
    """Tokens per sequence of neutral text."""
    steer_sinks: bool = False
    """Also steer the first token and attention-sink candidates."""
    seed: int = 0
    """Seed of the controls."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SteeringData:
    """Pairs, prompts and neutral text."""

    pairs: ContrastPairs
    neutral: TokenRecord
    """Text to choose on."""
    neutral_report: TokenRecord


def load(model: LoadedModel, cfg: SteeringConfig) -> SteeringData:
    """The sentiment pairs and the neutral text that the config names."""
    return SteeringData(
        pairs=sentiment_pairs(cfg.n_pairs, cfg.n_prompts),
        neutral=load_corpus(model, cfg.corpus, cfg.n_neutral, cfg.length),
        neutral_report=load_corpus(model, cfg.corpus, cfg.n_neutral, cfg.length, skip=cfg.n_neutral),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Extra:
    """What the result says besides the measurement."""

    directions: pd.DataFrame
    within: bool
    notes: tuple[str, ...]
    seconds: float


def run(model: LoadedModel, data: SteeringData, cfg: SteeringConfig) -> Result:
    """Choose a setting on one half, report it on the other, beside its controls."""
    started = time.perf_counter()
    _check(cfg)
    half = len(data.pairs.prompts) // 2
    layers = sorted({min(int(depth * model.n_layers), model.n_layers - 1) for depth in cfg.depths})
    reading = readout(model, data.pairs.words_for, data.pairs.words_against)
    choosing = batches(model, data.pairs.prompts[:half], sinks=cfg.steer_sinks)
    reporting = batches(model, data.pairs.prompts[half:], sinks=cfg.steer_sinks)
    neutral, neutral_report = (_neutral(model, record, cfg) for record in (data.neutral, data.neutral_report))
    found = find_directions(model, data.pairs, layers, neutral.batch, method=cfg.method, seed=cfg.seed)
    swept = sweep(found, cfg.strengths, choosing, reading, neutral)
    layer, strength, within = swept.choose(cfg.kl_budget)
    measured = measure(
        found, layer, strength, strengths=cfg.strengths, prompts=reporting, reading=reading,
        neutral=neutral_report, method=cfg.method, n_random=cfg.n_random, seed=cfg.seed,
    )  # fmt: skip
    starts = (START_NOTE,) if adds_start(model) else ()
    extra = _Extra(
        directions=found.table, within=within, notes=reading.notes + starts, seconds=time.perf_counter() - started
    )
    return _result(model, data, cfg, swept, measured, extra)


def _check(cfg: SteeringConfig) -> None:
    if not cfg.depths or any(not 0 <= depth <= 1 for depth in cfg.depths):
        raise InterpError(f"depths={cfg.depths} must be fractions of the depth, 0 to 1")
    if not any(s > 0 for s in cfg.strengths) or 0.0 in cfg.strengths or len(set(cfg.strengths)) < len(cfg.strengths):
        raise InterpError(f"strengths={cfg.strengths} must be different, not 0, and one at least positive")
    if cfg.n_random < 2 or cfg.kl_budget <= 0:
        raise InterpError(f"n_random={cfg.n_random} must be at least 2 and kl_budget={cfg.kl_budget} above 0")


def _neutral(model: LoadedModel, record: TokenRecord, cfg: SteeringConfig) -> Neutral:
    where = steerable(model, record, sinks=cfg.steer_sinks)
    return Neutral(Batch(model, record, where, tuple(range(len(record)))))


def _result(
    model: LoadedModel, data: SteeringData, cfg: SteeringConfig, swept: Sweep, found: Measured, extra: _Extra
) -> Result:
    interval = found.interval(cfg.seed)
    prompts = data.pairs.prompts[-len(found.base) :]
    return Result(
        headline={
            "site": found.site,
            "strength": found.strength,
            "effect": interval.estimate,
            "effect_low": interval.low,
            "effect_high": interval.high,
            "control_p95": p95(found.random.mean(1)),
            "kl_neutral": float(found.cost[0]),
            "perplexity_ratio": float(found.cost[1]),
            "slope": float(found.slopes.mean()),
            "anti_steerable": float((found.slopes < 0).double().mean()),
            "split_half_cosine": float(found.split.mean()),
            "activation_norm": found.norm,
        },
        tables={
            "sweep": swept.table(),
            "layers": swept.slopes().merge(extra.directions, on="layer"),
            "dose": found.dose_table(cfg.seed),
            "prompts": found.prompt_table(prompts),
            "controls": found.control_table(),
        },
        panels=_panels(found, cfg),
        controls=controls(found, cfg.kl_budget),
        manifest=_manifest(model, data, cfg, swept, extra.seconds),
        tensors={"vector": LabelledTensor(values=found.unit, axes=("d_model",), unit="unit length")},
        notes=_notes(found, cfg, extra),
    )


def _panels(found: Measured, cfg: SteeringConfig) -> tuple[Panel, ...]:
    strength, change = "strength (multiples of the stream's norm)", "change of propensity (nats)"
    return (
        Panel(
            title="Effect by layer and strength", kind="heatmap", table="sweep", x="strength", y="layer",
            value="effect", x_label=strength, y_label="layer", value_label=change,
            reading=f"Measured on the choosing half of the prompts. Kept: {found.site} at {found.strength:g}.",
        ),
        Panel(
            title="Cost on neutral text", kind="heatmap", table="sweep", x="strength", y="layer",
            value="kl", x_label=strength, y_label="layer", value_label="KL (nats per token)",
            reading=f"To be chosen, a setting may cost at most {cfg.kl_budget:g}; large effects elsewhere cost it.",
        ),
        Panel(
            title=f"Dose and response at {found.site}", kind="line", table="dose", x="strength", y="effect",
            group="series", low="low", high="high", x_label=strength, y_label=change,
            reading="On prompts that took no part in the choice, with bootstrap intervals; grey: random directions of "
            "equal norm. The effect counts only as far as it leaves the grey.",
        ),
        Panel(
            title="The direction among others of its norm", kind="scatter", table="controls", x="number", y="effect",
            group="direction", x_label="direction", y_label=change,
            reading="Each grey point is another direction, added at the same tokens with the same norm: random ones, "
            "and ones made from the same pairs with half of the labels exchanged.",
        ),
        Panel(
            title="Every prompt", kind="bar", table="prompts", x="number", y="effect", x_label="reported prompt",
            y_label=change,
            reading="A mean can hide prompts that move the wrong way; they would point down.",
        ),
    )  # fmt: skip


def _manifest(model: LoadedModel, data: SteeringData, cfg: SteeringConfig, swept: Sweep, seconds: float) -> Manifest:
    pairs = data.pairs
    texts = [pairs.positive, pairs.negative, pairs.prompts, pairs.words_for, pairs.words_against]
    return Manifest(
        method=SPEC.name,
        model=model.record(),
        config=asdict(cfg),
        data={
            "pairs": len(pairs.positive),
            "pairs_hash": hash_json([pairs.positive, pairs.negative]),
            "prompts": len(pairs.prompts),
            "neutral": f"{cfg.corpus}, 2 x {len(data.neutral)} x {data.neutral.ids.shape[1]} tokens",
            "hash": hash_json([texts, data.neutral.hash, data.neutral_report.hash]),
        },
        sites=tuple(f"resid_post.{layer}" for layer in swept.layers),
        seeds=(cfg.seed,),
        metrics=SPEC.metrics,
        seconds=seconds,
    )


def _notes(found: Measured, cfg: SteeringConfig, extra: _Extra) -> tuple[str, ...]:
    notes = list(extra.notes)
    if not extra.within:
        notes.append(f"no setting met the KL budget of {cfg.kl_budget:g}: the cheapest one is reported")
    if not cfg.steer_sinks:
        notes.append("the first token and attention-sink candidates are not steered")
    wrong = int((found.effects < 0).sum())
    if wrong:
        notes.append(f"{wrong} of {len(found.effects)} reported prompts move the wrong way")
    if found.strength == max(cfg.strengths):
        notes.append("the strongest setting was chosen: the best one may lie beyond")
    return tuple(notes)


def example(model: LoadedModel) -> tuple[SteeringData, SteeringConfig]:
    """A few pairs, prompts and random tokens: seconds on a tiny random model, whatever its tokenizer."""
    cfg = SteeringConfig(
        depths=(0.0, 0.9), strengths=(-0.5, 0.5), n_pairs=6, n_prompts=4, n_random=4, n_neutral=2, length=16
    )
    pairs = replace(sentiment_pairs(40, 24), prompts=("The film was", "My day was", "The book was", "Our trip was"))
    pairs = replace(pairs, positive=pairs.positive[:6], negative=pairs.negative[:6])
    ids = torch.randint(0, model.dims.d_vocab or 2, (4, 16), generator=torch_generator(0, "example"))
    return SteeringData(pairs=pairs, neutral=from_ids(model, ids[:2]), neutral_report=from_ids(model, ids[2:])), cfg


SPEC = Spec(
    name="steering",
    question="Which vector, added where and how hard, moves a behaviour more than any vector would, and at what cost?",
    paper="Rimsky et al. 2024, Steering Llama 2 via Contrastive Activation Addition, https://arxiv.org/abs/2312.06681",
    config=SteeringConfig,
    load=load,
    run=run,
    example=example,
    metrics={
        "effect": "v1: mean over reported prompts of the change of log P(for) - log P(against), in nats",
        "control_p95": "v1: 95th percentile of effect over random directions of equal norm",
        "kl_neutral": "v1: mean over steered neutral tokens of KL(P_base || P_steered), in nats",
        "perplexity_ratio": "v1: exp(loss steered - loss base) on neutral text",
        "slope": "v1: least-squares slope of the propensity against strength, mean over reported prompts",
        "anti_steerable": "v1: share of reported prompts with a negative slope",
        "split_half_cosine": "v1: mean cosine between directions of random halves of the pairs, 20 splits",
    },
    tolerances={"anti_steerable": Tolerance(absolute=0.1)},
)
