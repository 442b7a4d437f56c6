"""Tables, controls and figures of the `sae` method."""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.controls import bootstrap_interval, permutation_test
from interp.core.result import Control, Panel
from interp.dictionaries.heldout import Scores
from interp.dictionaries.splice import loss_recovered


def evaluation_table(scores: dict[str, Scores], base: Float[Tensor, "sequence"], seed: int) -> pd.DataFrame:
    """One row per dictionary and one for the untouched model, with 95 % intervals over sequences."""
    ce_base, ce_zero = float(base.mean()), float(scores["zero"].ce.mean())
    rows: list[dict[str, object]] = [
        {"dictionary": "none", "fvu": 0.0, "fvu_low": 0.0, "fvu_high": 0.0, "ce": ce_base, "loss_recovered": 1.0}
        | {"ce_increase": 0.0, "ce_increase_low": 0.0, "ce_increase_high": 0.0}
    ]
    for name, found in scores.items():
        fvu = bootstrap_interval(found.fvu, seed=seed)
        increase = bootstrap_interval(found.ce - base, seed=seed)
        rows.append(
            {
                "dictionary": name,
                "fvu": found.evaluation.fvu,
                "fvu_low": fvu.low,
                "fvu_high": fvu.high,
                "l0": found.evaluation.l0,
                "ce": float(found.ce.mean()),
                "ce_increase": increase.estimate,
                "ce_increase_low": increase.low,
                "ce_increase_high": increase.high,
                "loss_recovered": loss_recovered(ce_zero, float(found.ce.mean()), ce_base),
            }
        )
    return pd.DataFrame(rows)


def control_rows(scores: dict[str, Scores], k: int) -> tuple[Control, ...]:
    """The trained dictionary against each baseline, paired over held-out sequences."""
    sae = scores["SAE"]
    pca, random = f"PCA with {scores['PCA'].evaluation.l0:g} components", f"untrained dictionary with k={k}"
    return (
        _paired(pca, "FVU on held-out text", sae.fvu, scores["PCA"].fvu),
        _paired(random, "FVU on held-out text", sae.fvu, scores["random"].fvu),
        _paired(pca, "loss with it spliced in, nats", sae.ce, scores["PCA"].ce),
        _paired(random, "loss with it spliced in, nats", sae.ce, scores["random"].ce),
        _paired("zero ablation", "loss with it spliced in, nats", sae.ce, scores["zero"].ce),
    )


def _paired(name: str, statistic: str, observed: Tensor, control: Tensor) -> Control:
    """Lower is better. Passed if the 95 % interval of the mean difference over sequences lies above zero."""
    interval = bootstrap_interval(control - observed)
    test = permutation_test(control, observed, paired=True, alternative="greater")
    return Control(
        name=name,
        statistic=f"{statistic} (passed: lower, paired over {len(observed)} sequences)",
        observed=float(observed.mean()),
        control=float(control.mean()),
        passed=interval.low > 0,
        p_value=test.p,
    )


def with_baselines(curve: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """FVU against tokens seen, with the held-out values of the baselines as level lines."""
    parts = [pd.DataFrame({"series": "SAE, training batches", "tokens": curve["tokens"], "fvu": curve["fvu"]})]
    ends = [int(curve["tokens"].min()), int(curve["tokens"].max())]
    for name in ("SAE", "PCA", "random"):
        level = float(table.set_index("dictionary").at[name, "fvu"])
        parts.append(pd.DataFrame({"series": f"{name}, held out", "tokens": ends, "fvu": [level] * 2}))
    return pd.concat(parts, ignore_index=True)


def histogram(density: Float[Tensor, "latent"], n_bins: int = 30) -> pd.DataFrame:
    """Number of latents by log10 of the share of tokens at which they fire; silent ones are left out."""
    live = torch.log10(density[density > 0].double()).numpy()
    low = float(live.min()) if len(live) else -1.0
    counts, edges = np.histogram(live, bins=n_bins, range=(min(low, -0.1), 0.0))
    return pd.DataFrame({"log10_density": (edges[:-1] + edges[1:]) / 2, "n_latents": counts})


PANELS = (
    Panel(
        title="Variance left unexplained",
        kind="bar",
        table="evaluation",
        x="dictionary",
        y="fvu",
        low="fvu_low",
        high="fvu_high",
        log_y=True,
        x_label="dictionary in place of the activation",
        y_label="FVU on held-out text",
        reading="Lower is better. The trained dictionary should stand below PCA with as many components as it has active "
        "latents, and below an untrained dictionary. Bars: 95 % interval over sequences.",
    ),
    Panel(
        title="What the model loses",
        kind="bar",
        table="evaluation",
        x="dictionary",
        y="ce_increase",
        low="ce_increase_low",
        high="ce_increase_high",
        x_label="dictionary in place of the activation",
        y_label="rise of the loss, nats per token",
        reading="Rise of the next-token loss when the reconstruction replaces the activation; `none` is the untouched "
        "model. Zero ablation sets the scale of loss_recovered.",
    ),
    Panel(
        title="Training",
        kind="line",
        table="curve",
        x="tokens",
        y="fvu",
        group="series",
        log_y=True,
        x_label="tokens seen",
        y_label="FVU",
        reading="A held-out level far above the end of the training curve means that the dictionary has learned its "
        "training text by heart.",
    ),
    Panel(
        title="How often latents fire",
        kind="bar",
        table="density",
        x="log10_density",
        y="n_latents",
        x_label="log10 of the share of held-out tokens at which a latent fires",
        y_label="latents",
        reading="A heap at the right end are latents that are always on; silent latents are counted in dead_fraction.",
    ),
)
