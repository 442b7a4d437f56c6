"""Tables, controls and figures of the `subspace` method."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from interp.analyses.subspace_das import Learnt
from interp.analyses.subspace_illusion import (
    FULL,
    LEAST,
    MEANS,
    NULL,
    OTHER_NULL,
    OTHER_ROW,
    RANDOM,
    READ_NULL,
    READ_ROW,
    ROW,
    ROW_AS_IS,
    SHARE,
    WHOLE,
    Examined,
    Patched,
)
from interp.core.controls import bootstrap_interval, rank_test
from interp.core.result import Control, Panel

LABELS = "control: learnt from random labels"
SEED = "learnt again, other seed"
MODEL = "control: learnt in a random model"
ORDER = (
    WHOLE, ROW, NULL, ROW_AS_IS, READ_NULL, READ_ROW, FULL, MEANS, SEED, RANDOM, LABELS, OTHER_ROW, OTHER_NULL,
)  # fmt: skip
SHOWN = {
    WHOLE: "subspace", ROW: "row part", NULL: "null part", READ_NULL: "read unseen", FULL: "component",
    MEANS: "means", RANDOM: "control: random", LABELS: "control: labels",
}  # fmt: skip
"""What the figure shows, in words that fit under a bar."""
NULL_LIMIT = 1e-3
"""Effect that rounding may give to a part that nothing can see."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Learned:
    """The subspace and its rivals, all measured on the same held-out pairs."""

    own: Learnt
    again: Patched
    labels: Patched
    cosine_again: float
    """Largest cosine between the two seeds' subspaces."""
    random_model_nats: float
    """Mean fall of the logit difference that a subspace learnt in a random model gets there."""
    endpoint_error: float
    """Largest difference of the unpatched logit difference from a whole forward's, nats."""


def effect_table(found: Examined, learned: Learned, seed: int) -> pd.DataFrame:
    """One row per way of patching; the random directions as one row, their mean."""
    items = [*found.rows, learned.again, learned.labels, *found.randoms]
    rows: list[dict[str, object]] = []
    for name in ORDER:
        same = [item for item in items if item.name == name]
        if not same:
            continue
        per_pair = np.mean([found.effects(item).numpy() for item in same], axis=0)
        ends = bootstrap_interval(per_pair, seed=seed)
        rows.append(
            {
                "patch": name,
                "effect": float(per_pair.mean()),
                "low": ends.low,
                "high": ends.high,
                "accuracy": float(np.mean([item.accuracy for item in same])),
                "nats": float(np.mean([(found.base.logit_diff - item.logit_diff).mean() for item in same])),
            }
        )
    return pd.DataFrame(rows)


def bars(effects: pd.DataFrame) -> pd.DataFrame:
    """The rows of the figure."""
    kept = effects.loc[effects["patch"].isin(list(SHOWN))]
    return kept.assign(part=[SHOWN[str(name)] for name in kept["patch"]])


def pair_table(found: Examined) -> pd.DataFrame:
    """One row per held-out pair and way of patching."""
    named = {"nothing": found.base, **{item.name: item for item in found.rows}}
    return pd.DataFrame(
        [
            {"patch": name, "pair": pair, "logit_diff": value, "hit": hit}
            for name, item in named.items()
            for pair, (value, hit) in enumerate(zip(item.logit_diff.tolist(), item.hit.tolist(), strict=True))
        ]
    )


def test_table(found: Examined) -> pd.DataFrame:
    """The illusion test as a reader goes through it; what does not apply at the site says so."""
    parts, effect = found.split, found.effect(WHOLE)
    none = "does not apply: no single matrix reads this site"
    few = "" if parts is None or parts.telling else " (says little: too few dimensions)"

    def share(name: str) -> str:
        return f"{found.effect(name):.3f} of {effect:.3f}" if name in found else none

    rows = [
        ("effect of the subspace", f"{effect:.3f}", "1 erases the answer, 2 turns it round"),
        ("effect of the whole component", share(FULL), "near 0 is a sign of an illusion"),
        ("effect of the row part", share(ROW) + few, "much less than the subspace is a sign"),
        ("effect of the null part", share(NULL), "0, or the split is wrong"),
        ("read by the null part, written whole", share(READ_NULL) + few, "near the subspace's is a sign"),
        ("read by the row part, written whole", share(READ_ROW) + few, "near 0 is a sign"),
        ("classes along the subspace (AUC)", f"{found.auc:.3f}", "0.5 is no difference at all"),
        ("classes along the row part (AUC)", none if parts is None else f"{parts.auc_row:.3f}", "0.5 is dormant"),
        ("classes along the null part (AUC)", none if parts is None else f"{parts.auc_null:.3f}", ""),
        ("row share of the direction", none if parts is None else f"{parts.row_share:.3f}", "of its squared length"),
        ("dimensions seen", none if parts is None else f"{parts.rank} of {parts.width}", ""),
        (
            "distance from clean activations",
            f"{found.distance_patched:.2f} against {found.distance_clean:.2f}",
            "patched against clean, in standard deviations",
        ),
    ]
    return pd.DataFrame(rows, columns=["test", "value", "how to read it"])


def controls(found: Examined, learned: Learned) -> tuple[Control, ...]:
    """What could refute that the subspace carries the variable."""
    effect = found.effect(WHOLE)
    randoms = [float(found.effects(item).mean()) for item in found.randoms]
    labels = float(found.effects(learned.labels).mean())
    nats = float((found.base.logit_diff - found[WHOLE].logit_diff).mean())
    made = [
        Control(
            name=f"{len(randoms)} random directions",
            statistic="effect on held-out pairs; the control is the largest of them",
            observed=effect,
            control=max(randoms),
            p_value=rank_test(effect, randoms),
            passed=effect > max(LEAST, *randoms),
        ),
        Control(
            name="a subspace learnt from random labels",
            statistic="effect on held-out pairs; passes below half",
            observed=effect,
            control=labels,
            passed=effect > LEAST and labels < SHARE * effect,
        ),
        Control(
            name="a subspace learnt in the same model with its weights shuffled",
            statistic="fall of the logit difference on held-out pairs (nats); passes below half",
            observed=nats,
            control=learned.random_model_nats,
            passed=nats > 0 and learned.random_model_nats < SHARE * nats,
        ),
        Control(
            name="the whole component",
            statistic="effect on held-out pairs; passes from half of the subspace's",
            observed=effect,
            control=found.effect(FULL),
            passed=found.effect(FULL) >= SHARE * effect,
        ),
        Control(
            name="nothing patched gives the base run",
            statistic="largest difference of logit differences (nats); the control is what rounding may do",
            observed=learned.endpoint_error,
            control=NULL_LIMIT,
            passed=learned.endpoint_error <= NULL_LIMIT,
        ),
    ]
    return (*made, *_split_controls(found, effect))


def _split_controls(found: Examined, effect: float) -> list[Control]:
    if found.split is None:
        return []
    return [
        Control(
            name="the part that the layer's output can see, alone",
            statistic="effect on held-out pairs; passes from half of the subspace's, if the split says anything",
            observed=effect,
            control=found.effect(ROW),
            passed=found.split.telling and found.effect(ROW) >= SHARE * effect,
        ),
        Control(
            name="the part that it cannot see, alone",
            statistic="|effect| on held-out pairs, which is 0 if the split is right; the control is the limit",
            observed=abs(found.effect(NULL)),
            control=NULL_LIMIT,
            passed=abs(found.effect(NULL)) <= NULL_LIMIT,
        ),
    ]


PANELS = (
    Panel(
        title="What each part of the subspace does",
        kind="bar", table="bars", x="part", y="effect", low="low", high="high",
        x_label="what is patched", y_label="effect (1 erases the answer, 2 turns it round)",
        reading="A subspace that carries the variable keeps its effect when its row part is patched alone, and the "
        "whole component has it too. In an illusion both are near 0, and reading by the part that nothing sees (read "
        "unseen) does the work. The table `effects` has all rows.",
    ),
    Panel(
        title="How the logit difference fell while the subspace was learnt",
        kind="line", table="learning", x="step", y="logit_diff",
        x_label="step", y_label="mean logit difference of the batch (nats)",
        reading="On training pairs. It falls in an illusion as well, so it is no evidence by itself.",
    ),
)  # fmt: skip


def learning_table(learned: Learned) -> pd.DataFrame:
    losses = learned.own.losses
    return pd.DataFrame({"step": range(len(losses)), "logit_diff": losses})
