"""Tables, figures and controls of the `discrete_circuit` method (a helper)."""

from __future__ import annotations

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.core.controls import rank_test
from interp.core.result import Control, Panel
from interp.dictionaries.discrete import agreement

NODE, NORMALISED, EDGE = "codes only on positives", "the same, share of all codes", "pairs of codes"
MEAN, PROBE = "mean difference", "linear probe"
SCORES = (NODE, NORMALISED, EDGE, MEAN, PROBE)


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Rank correlation, ties shared; 0 where one does not vary."""
    x, y = (pd.Series(values.tolist()).rank() for values in (a, b))
    found = x.corr(y)
    return 0.0 if pd.isna(found) else float(found)


def auc_table(
    scores: dict[str, list[Float[Tensor, " head"]]], circuit: Bool[Tensor, " head"], effects: Float[Tensor, " head"]
) -> pd.DataFrame:
    """Of each score: AUC and precision against the circuit, mean and range over seeds; rank correlation."""
    rows: list[tuple[str, float, float, float, float, float, int]] = []
    for name in SCORES:
        found = [agreement(values, circuit) for values in scores[name]]
        aucs = [own.auc for own in found]
        ranks = [spearman(values, effects.abs()) for values in scores[name]]
        n = len(found)
        precision = sum(own.precision for own in found) / n
        rows.append((name, sum(aucs) / n, min(aucs), max(aucs), precision, sum(ranks) / n, n))
    return pd.DataFrame(rows, columns=["score", "auc", "auc_low", "auc_high", "precision", "spearman", "n_seeds"])


def head_table(
    names: list[tuple[int, int]],
    effects: Float[Tensor, " head"],
    circuit: Bool[Tensor, " head"],
    scores: dict[str, list[Float[Tensor, " head"]]],
) -> pd.DataFrame:
    """One row per head: patched effect, membership, every score (mean over seeds)."""
    table = pd.DataFrame({
        "layer": [layer for layer, _ in names], "head": [head for _, head in names],
        "effect": effects.tolist(), "size_of_effect": effects.abs().tolist(), "in_circuit": circuit.tolist(),
    })  # fmt: skip
    for name in SCORES:
        table[name] = torch.stack(scores[name]).mean(0).tolist()
    return table


def control_rows(table: pd.DataFrame, observed: float, null: Float[Tensor, " shuffle"]) -> tuple[Control, ...]:
    """Exchanged labels, and the two baselines that need no dictionary."""
    by_name = {str(row["score"]): float(row["auc"]) for row in table.to_dict("records")}
    p = rank_test(observed, null.double())
    made = [
        Control(
            name=f"{len(null)} exchanges of the labels", statistic="AUC against the patched circuit, 95th percentile",
            observed=observed, control=float(null.double().quantile(0.95)), passed=p < 0.05, p_value=p,
        )
    ]  # fmt: skip
    made += [
        Control(
            name=name, statistic="AUC against the patched circuit", observed=by_name[NODE], control=by_name[name],
            passed=by_name[NODE] > by_name[name],
        )
        for name in (MEAN, PROBE)
    ]  # fmt: skip
    return tuple(made)


PANELS = (
    Panel(
        title="Which score finds the heads", kind="bar", table="scores", x="score", y="auc", low="auc_low",
        high="auc_high", x_label="score", y_label="AUC against the patched circuit",
        reading="Chance that a head of the circuit ranks above another; .5 is chance for a fair score, but exchanged "
        "labels are the fair mark here. Bars: range over seeds. Mean difference and probe need no dictionary: codes "
        "have to beat them.",
    ),
    Panel(
        title="Exchanged labels", kind="bar", table="null", x="labels", y="auc", low="auc_low", high="auc_high",
        x_label="labels", y_label="AUC of the code score",
        reading="Heads that vary more have more codes whatever the labels say, so exchanged labels can score above .5. "
        "Only what lies above their range (5th to 95th percentile) speaks for the codes.",
    ),
    Panel(
        title="Code score by head", kind="heatmap", table="heads", x="head", y="layer", value=NODE, x_label="head",
        y_label="layer", value_label="codes only on positives",
        reading="Number of codes of a head that occur on positive prompts and on no negative one.",
    ),
    Panel(
        title="Patched effect by head", kind="heatmap", table="heads", x="head", y="layer", value="effect",
        x_label="head", y_label="layer", value_label="change of the metric",
        reading="What the metric loses when the head alone carries the corrupted run: the measured truth that the "
        "scores are compared with.",
    ),
)  # fmt: skip
