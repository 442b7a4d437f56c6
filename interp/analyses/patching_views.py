"""Tables and figures of patching (a helper of `patching`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from interp.analyses.patching_controls import best
from interp.analyses.patching_scores import METRIC_NAMES, Direction, Effects, Endpoints, intervals, kl
from interp.analyses.patching_wave import HEAD_KINDS
from interp.core.result import Panel
from interp.core.sites import Site
from interp.tasks.base import PromptPairs

N_TOP = 5
"""Sites named in the headline."""


def effects_table(found: Sequence[Effects], ends: Endpoints, pairs: PromptPairs) -> pd.DataFrame:
    """Tidy: one row per direction, site, index and metric, with a bootstrap interval over pairs.

    `effect` is a ratio of means over pairs; `mean_of_ratios`, which lets pairs with a small gap speak loudest, stands
    beside it because some papers report it.
    """
    tables: list[pd.DataFrame] = []
    for direction, effects in zip(Direction, found, strict=True):
        for kind, metrics in effects.items():
            for metric in METRIC_NAMES:
                values, shares = metrics[metric], ends.shares(direction, metric)
                low, high = intervals(values, shares)
                with np.errstate(divide="ignore", invalid="ignore"):
                    ratios = (values / shares[:, None, None]).mean(0)
                layer, index = np.indices(values.shape[1:]).reshape(2, -1)
                labels = [str(i) if kind in HEAD_KINDS else pairs.label(i) for i in range(values.shape[2])]
                tables.append(
                    pd.DataFrame(
                        {
                            "direction": direction.value,
                            "kind": kind,
                            "layer": layer,
                            "index": index,
                            "where": [labels[i] for i in index],
                            "metric": metric,
                            "effect": values.mean(0).ravel(),
                            "low": low.ravel(),
                            "high": high.ravel(),
                            "mean_of_ratios": ratios.ravel(),
                        }
                    )
                )
    return pd.concat(tables, ignore_index=True)


def heat(effects: pd.DataFrame, *, heads: bool) -> pd.DataFrame:
    """The rows of the heat maps: logit difference, by head or by position, with a name for each small multiple."""
    wanted = (effects["metric"] == "logit_diff") & (effects["kind"].isin(HEAD_KINDS) == heads)
    chosen = effects.loc[wanted]
    panels = [f"{kind}, {way}" for kind, way in zip(chosen["kind"], chosen["direction"], strict=True)]
    return chosen.assign(panel=panels)


def top_sites(effects: Effects, pairs: PromptPairs) -> list[str]:
    """The components with the largest denoising effect and that effect; the stream only where it alone was patched."""
    named: list[str] = []
    for kind, layer, index in best(effects, N_TOP):
        where = f"head {index}" if kind in HEAD_KINDS else f"position {pairs.label(index)}"
        named.append(f"{kind}.{layer} {where}: {effects[kind]['logit_diff'][:, layer, index].mean():+.2f}")
    return named


@dataclass(frozen=True, kw_only=True)
class Shortcut:
    """One way to estimate the effects, and the direction whose exact effects it estimates."""

    method: str
    direction: Direction
    estimates: Mapping[Site, Float[Tensor, "pair index"]]


def attribution_table(
    found: Sequence[Effects], shortcuts: Sequence[Shortcut], ends: Endpoints, pairs: PromptPairs
) -> pd.DataFrame:
    """Estimated beside exact effect, in units of the gap, of every site that differs between the prompts."""
    exact = dict(zip(Direction, found, strict=True))
    rows: list[dict[str, object]] = []
    for shortcut in shortcuts:
        gap = ends.clean_mean - ends.corrupt_mean
        gap = gap if shortcut.direction is Direction.DENOISE else -gap
        for site, values in shortcut.estimates.items():
            kind, layer = site.part.value, site.layer or 0
            effect = exact[shortcut.direction][kind]["logit_diff"][:, layer].mean(0)
            estimate = values.double().mean(0).cpu().numpy() / gap
            for index in range(0 if kind in HEAD_KINDS else pairs.first_difference, len(effect)):
                where = f"head {index}" if kind in HEAD_KINDS else pairs.label(index)
                rows.append(
                    {
                        "method": shortcut.method,
                        "direction": shortcut.direction.value,
                        "kind": kind,
                        "site": f"{site} {where}",
                        "exact": float(effect[index]),
                        "estimate": float(estimate[index]),
                    }
                )
    table = pd.DataFrame(rows)
    return table.assign(series=table["method"] + ", " + table["direction"])


def correlation_table(attribution: pd.DataFrame) -> pd.DataFrame:
    """Pearson correlation of estimate and exact, per method and direction, for each kind and for all sites."""
    rows: list[tuple[object, ...]] = []
    for name in dict.fromkeys(zip(attribution["method"], attribution["direction"], strict=True)):
        same = (attribution["method"] == name[0]) & (attribution["direction"] == name[1])
        for kind in ("all", *dict.fromkeys(attribution["kind"])):
            chosen = attribution.loc[same] if kind == "all" else attribution.loc[same & (attribution["kind"] == kind)]
            rows.append((*name, kind, _pearson(chosen["exact"].to_numpy(), chosen["estimate"].to_numpy())))
    return pd.DataFrame(rows, columns=["method", "direction", "kind", "pearson"])


def _pearson(a: Float[np.ndarray, " site"], b: Float[np.ndarray, " site"]) -> float:
    """0 where one of them does not vary."""
    return 0.0 if min(a.std(), b.std()) == 0 else float(np.corrcoef(a, b)[0, 1])


def correlation(table: pd.DataFrame, method: str, kinds: Sequence[str]) -> float:
    """The denoising correlation over the first of these kinds that was patched."""
    rows = table.loc[(table["method"] == method) & (table["direction"] == Direction.DENOISE.value)]
    by_kind = dict(zip(rows["kind"].tolist(), rows["pearson"].tolist(), strict=True))
    return next(by_kind[kind] for kind in kinds if kind in by_kind)


def endpoint_table(ends: Endpoints, pairs: PromptPairs) -> pd.DataFrame:
    """What the two unpatched runs say, per prompt."""
    texts = pairs.clean.texts or tuple("".join(row) for row in pairs.clean.strings)
    return pd.DataFrame(
        {
            "prompt": list(texts),
            "logit_diff_clean": ends.clean.logit_diff.tolist(),
            "logit_diff_corrupt": ends.corrupt.logit_diff.tolist(),
            "prob_clean": ends.clean.prob.tolist(),
            "prob_corrupt": ends.corrupt.prob.tolist(),
            "kl_corrupt": kl(ends.clean.log_probs, ends.corrupt.log_probs).tolist(),
        }
    )


def panels(kinds: Sequence[str]) -> tuple[Panel, ...]:
    """Heat maps of what was patched, and the shortcut against the exact effect."""
    made: list[Panel] = []
    if any(kind not in HEAD_KINDS for kind in kinds):
        made.append(
            Panel(
                title="Where the answer is carried, by layer and position",
                kind="heatmap", table="positions", x="where", y="layer", value="effect", facet="panel",
                x_label="position", y_label="layer", value_label="effect, share of the gap",
                reading="In the stream the answer moves from the changed token to the last one; the layer where it "
                "moves is where attention carries it. Columns before the change are exactly 0.",
            )
        )  # fmt: skip
    if any(kind in HEAD_KINDS for kind in kinds):
        made.append(
            Panel(
                title="Heads, all positions at once",
                kind="heatmap", table="heads", x="index", y="layer", value="effect", facet="panel",
                x_label="head", y_label="layer", value_label="effect, share of the gap",
                reading="Few heads matter; negative ones work against the answer. Effects need not add up to 1.",
            )
        )  # fmt: skip
    made.append(
        Panel(
            title="The gradient shortcut against the exact effect",
            kind="scatter", table="attribution", x="exact", y="estimate", group="series",
            x_label="exact effect, share of the gap", y_label="estimated effect, share of the gap",
            reading="On the diagonal the shortcut is right; off it a straight line is a bad model of the site. The "
            "table `correlations` has one number per kind of site and direction.",
        )
    )  # fmt: skip
    return tuple(made)
