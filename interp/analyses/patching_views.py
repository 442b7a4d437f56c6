"""Tables and figures of patching (a helper of `patching`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from jaxtyping import Float
from torch import Tensor

from interp.analyses.patching_scores import METRIC_NAMES, Direction, Effects, Endpoints
from interp.analyses.patching_wave import HEAD_KINDS
from interp.core.result import Panel
from interp.core.sites import Site
from interp.tasks.base import PromptPairs

N_TOP = 5
"""Sites named in the headline."""


def effects_table(found: Sequence[Effects], pairs: PromptPairs) -> pd.DataFrame:
    """Tidy: one row per direction, site, index and metric: mean over pairs and its standard error."""
    rows: list[dict[str, object]] = []
    for direction, effects in zip(Direction, found, strict=True):
        for kind, metrics in effects.items():
            for metric in METRIC_NAMES:
                values = metrics[metric]
                mean = values.mean(0)
                error = values.std(0, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else np.zeros_like(mean)
                for layer, index in np.ndindex(mean.shape):
                    rows.append(
                        {
                            "direction": direction.value,
                            "kind": kind,
                            "layer": layer,
                            "index": index,
                            "where": str(index) if kind in HEAD_KINDS else pairs.label(index),
                            "metric": metric,
                            "effect": float(mean[layer, index]),
                            "standard_error": float(error[layer, index]),
                        }
                    )
    return pd.DataFrame(rows)


def heat(effects: pd.DataFrame, *, heads: bool) -> pd.DataFrame:
    """The rows of the heat maps: logit difference, by head or by position, with a name for each small multiple."""
    wanted = (effects["metric"] == "logit_diff") & (effects["kind"].isin(HEAD_KINDS) == heads)
    chosen = effects.loc[wanted]
    panels = [f"{kind}, {way}" for kind, way in zip(chosen["kind"], chosen["direction"], strict=True)]
    return chosen.assign(panel=panels)


def top_sites(effects: Effects, pairs: PromptPairs) -> list[str]:
    """The components with the largest denoising effect; the stream only where nothing else was patched."""
    kinds = [kind for kind in effects if kind != "resid_post"] or list(effects)
    ranked: list[tuple[float, str]] = []
    for kind in kinds:
        mean = effects[kind]["logit_diff"].mean(0)
        for layer, index in np.ndindex(mean.shape):
            where = f"head {index}" if kind in HEAD_KINDS else f"position {pairs.label(index)}"
            ranked.append((abs(float(mean[layer, index])), f"{kind}.{layer} {where}"))
    return [name for _, name in sorted(ranked, reverse=True)[:N_TOP]]


def attribution_table(
    denoise: Effects,
    shortcuts: Mapping[str, Mapping[Site, Float[Tensor, "pair index"]]],
    ends: Endpoints,
    pairs: PromptPairs,
) -> pd.DataFrame:
    """Estimated beside exact denoising effect, per site and method, in units of the gap."""
    gap = ends.clean_mean - ends.corrupt_mean
    rows: list[dict[str, object]] = []
    for method, found in shortcuts.items():
        for site, values in found.items():
            kind, layer = site.part.value, site.layer or 0
            exact = denoise[kind]["logit_diff"][:, layer].mean(0)
            estimate = values.double().mean(0).cpu().numpy() / gap
            for index in range(len(exact)):
                where = f"head {index}" if kind in HEAD_KINDS else pairs.label(index)
                rows.append(
                    {
                        "method": method,
                        "kind": kind,
                        "site": f"{site} {where}",
                        "exact": float(exact[index]),
                        "estimate": float(estimate[index]),
                    }
                )
    return pd.DataFrame(rows)


def correlations(attribution: pd.DataFrame) -> dict[tuple[str, str], float]:
    """Pearson correlation of estimate and exact, per method, for each kind and for all."""
    found: dict[tuple[str, str], float] = {}
    for method in dict.fromkeys(attribution["method"]):
        of_method = attribution.loc[attribution["method"] == method]
        for kind in ("all", *dict.fromkeys(attribution["kind"])):
            rows = of_method if kind == "all" else of_method.loc[of_method["kind"] == kind]
            exact, estimate = rows["exact"].to_numpy(), rows["estimate"].to_numpy()
            flat = exact.std() == 0 or estimate.std() == 0
            found[(str(method), str(kind))] = 0.0 if flat else float(np.corrcoef(exact, estimate)[0, 1])
    return found


def correlation_table(found: Mapping[tuple[str, str], float]) -> pd.DataFrame:
    return pd.DataFrame([{"method": m, "kind": k, "pearson": value} for (m, k), value in found.items()])


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
            kind="scatter", table="attribution", x="exact", y="estimate", group="method",
            x_label="exact effect, share of the gap", y_label="estimated effect",
            reading="On the diagonal the shortcut is right. Sites off it are where a straight line is a bad model.",
        )
    )  # fmt: skip
    return tuple(made)
