"""Headline, controls and figures of the `codebook` method."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.controls import holm, permutation_test
from interp.core.result import Control, Panel
from interp.dictionaries.codebook_search import Match, match_table
from interp.dictionaries.codebook_stats import Usage
from interp.dictionaries.codebook_steer import Steering
from interp.dictionaries.heldout import Scores
from interp.dictionaries.splice import loss_recovered

LEVEL = 0.05
"""A control is passed when its adjusted p is below this."""
FIRST, RANDOM, ZERO = "first codes", "random codes", "zero ablation"


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Everything that was measured."""

    scores: dict[str, Scores]
    base: Float[Tensor, " sequence"]
    """Loss of the untouched model, nats per token."""
    matches: dict[str, Match]
    steering: Steering
    usage: Usage
    table: pd.DataFrame


def headline(found: Found) -> dict[str, Any]:
    """The few numbers that count."""
    by_name = {row["dictionary"]: row for row in found.table.to_dict("records")}
    ce = {name: float(row["ce"]) for name, row in by_name.items()}
    pairs = precisions(found.matches)
    steering = found.steering
    shown: dict[str, Any] = {
        "fvu": float(by_name["codebook"]["fvu"]),
        "fvu_low": float(by_name["codebook"]["fvu_low"]),
        "fvu_high": float(by_name["codebook"]["fvu_high"]),
        "fvu_random": float(by_name[RANDOM]["fvu"]),
        "ce_base": ce["untouched"],
        "ce_codebook": ce["codebook"],
        "ce_random": ce[RANDOM],
        "ce_zero": ce[ZERO],
        "loss_recovered": loss_recovered(ce[ZERO], ce["codebook"], ce["untouched"]),
        "perplexity": float(found.usage.perplexity.mean()),
        "dead_fraction": found.usage.dead_fraction,
        "precision": mean([code for code, _ in pairs]),
        "neuron_precision": mean([neuron for _, neuron in pairs]),
        "base_rate": mean([match.base_rate for match in found.matches.values()]),
        "steer_effect": float(steering.own.mean()),
        "steer_random": float(steering.random.mean()),
    }
    if "finetuned, no codes" in ce:
        shown["ce_finetuned"] = ce["finetuned, no codes"]
    return shown


def mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def precisions(matches: dict[str, Match]) -> list[tuple[float, float]]:
    """Held-out precision of the code and of the neuron of each pattern; 0 for one that is never on."""
    return [(match.precision(match.code).value or 0.0, match.precision(match.neuron).value or 0.0)
            for match in matches.values()]  # fmt: skip


def control_rows(found: Found, k: int) -> tuple[Control, ...]:
    """Sign-flip tests, paired over sequences (losses), patterns (precision) and codes (steering); Holm-adjusted."""
    scores, steering = found.scores, found.steering
    ours, pairs = scores["codebook"], precisions(found.matches)
    loss, fvu = "loss with it spliced in, nats (lower is better)", "FVU on held-out text (lower is better)"
    rows: list[tuple[str, str, Tensor, Tensor, bool]] = [
        (f"fixed random codes, k={k}", fvu, ours.fvu, scores[RANDOM].fvu, False),
        (f"fixed random codes, k={k}", loss, ours.ce, scores[RANDOM].ce, False),
        ("the codes that learning started from", loss, ours.ce, scores[FIRST].ce, False),
        ("zero ablation", loss, ours.ce, scores[ZERO].ce, False),
        (
            f"another code in use patched in its place, mean of {len(steering.random)}",
            "change of log P(what follows the code), nats, mean over codes",
            steering.own.mean(1),
            steering.random.mean(0),
            True,
        ),
    ]
    if pairs:
        codes, neurons = torch.tensor(pairs, dtype=torch.float64).T
        name = "best of as many neurons, at equal recall on the search text"
        rows.append((name, "precision on held-out text, mean over patterns", codes, neurons, True))
    p = [
        permutation_test(mine, theirs, paired=True, alternative="greater" if higher else "less").p
        for _, _, mine, theirs, higher in rows
    ]
    return tuple(
        Control(
            name=name,
            statistic=statistic,
            observed=float(mine.mean()),
            control=float(theirs.mean()),
            passed=bool(adjusted < LEVEL),
            p_value=float(adjusted),
        )
        for (name, statistic, mine, theirs, _), adjusted in zip(rows, holm(p), strict=True)
    )


def search_summary(matches: dict[str, Match], *, seed: int) -> pd.DataFrame:
    """Precision of code and neuron by pattern, with the base rate as a third kind; for the figure."""
    table = match_table(matches, seed=seed).drop(columns=["unit", "recall", "base_rate", "searched"])
    table["precision"] = [value or 0.0 for value in table["precision"].tolist()]
    base = pd.DataFrame(
        [(pattern, "base rate", match.base_rate) for pattern, match in matches.items()],
        columns=["pattern", "kind", "precision"],
    )
    return pd.concat([table, base], ignore_index=True)


def steering_chart(steering: Steering) -> pd.DataFrame:
    """One row per steered code and series: the code itself, and other codes in its place."""
    labels = [str(latent) for latent in steering.latents.tolist()]
    own = pd.DataFrame({"latent": labels, "patched": "the code itself", "effect": steering.own.mean(1).tolist()})
    other = pd.DataFrame(
        {
            "latent": labels,
            "patched": "other codes, mean",
            "effect": steering.random.mean(0).tolist(),
            "low": steering.random.quantile(0.05, dim=0).tolist(),
            "high": steering.random.quantile(0.95, dim=0).tolist(),
        }
    )
    return pd.concat([own, other], ignore_index=True)


def notes(found: Found, *, learn: str, k: int, patterns: tuple[str, ...], n_left_out: int) -> tuple[str, ...]:
    """What to doubt."""
    n_tokens = found.usage.n_tokens
    said = [
        f"position 0 and tokens of extreme norm keep their own activation everywhere ({n_left_out} of "
        f"{n_left_out + n_tokens} held-out tokens)",
        f"dead_fraction counts codes chosen at none of {n_tokens} held-out tokens, {k} choices each",
        "steering replaces all codes of a token; effects are those of random codes in use, not of chosen examples",
    ]
    if learn == "activations":
        said.append("the model is frozen and the codes never saw its loss; learn=kl or finetune loses less")
    if learn == "finetune":
        said.append("ce_base is the untouched model; ce_codebook must be compared with ce_finetuned")
    missing = [pattern for pattern in patterns if pattern not in found.matches]
    if missing:
        said.append(f"left out, as one of the two texts does not show them: {', '.join(missing)}")
    return tuple(said)


PANELS = (
    Panel(
        title="What the model loses",
        kind="bar",
        table="evaluation",
        x="dictionary",
        y="ce_increase",
        low="ce_increase_low",
        high="ce_increase_high",
        x_label="in place of the activation",
        y_label="rise of the loss, nats per token",
        reading="Rise of the next-token loss on held-out text when each token's activation becomes the mean of its k "
        "codes. Learned codes should stand below fixed random ones and below the ones they started from.",
    ),
    Panel(
        title="How codes are used",
        kind="line",
        table="usage",
        x="rank",
        y="share",
        group="series",
        log_y=True,
        x_label="code, from the most used on",
        y_label="share of all choices",
        reading="A line that falls off a cliff is a collapsed codebook. Perplexity is the number of equally used codes "
        "with the same entropy.",
    ),
    Panel(
        title="Codes and neurons for patterns of the text",
        kind="bar",
        table="precision",
        x="pattern",
        y="precision",
        low="precision_low",
        high="precision_high",
        group="kind",
        x_label="regular expression",
        y_label="precision on held-out text",
        reading="Code and neuron were chosen on training text, the neuron among as many candidates and at the code's "
        "recall. A precision near the base rate says nothing.",
    ),
    Panel(
        title="Patching a code",
        kind="scatter",
        table="steering_chart",
        x="latent",
        y="effect",
        low="low",
        high="high",
        group="patched",
        x_label="code (random among those in use)",
        y_label="change of log P(its followers), nats",
        reading="Followers are the tokens most raised after the code in training text. The code itself should raise "
        "them above what other codes, patched in the same slots, do (5 % to 95 % of them).",
    ),
    Panel(
        title="Learning",
        kind="line",
        table="training",
        x="tokens",
        y="loss",
        x_label="tokens seen",
        y_label="loss",
        reading="Half the squared error at unit variance on activations; in the model, plus the task's loss in nats.",
    ),
)
