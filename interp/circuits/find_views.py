"""Tables, figures, controls and notes of a found circuit (a helper of `find`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.circuits.calibration import upper_share
from interp.circuits.export import edge_table
from interp.circuits.faithfulness import MINIMAL, SHARES
from interp.circuits.figure import graph_panel, graph_tables
from interp.circuits.find_steps import N_FEW, N_NULL, Measured, Work
from interp.circuits.graph import Circuit, EdgeScores
from interp.core.controls import bootstrap_interval, rank_test
from interp.core.result import LabelledTensor, Panel
from interp.tasks.library import Accuracy


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """Everything that was measured."""

    work: Work
    data_name: str
    accuracy: Accuracy
    scores: EdgeScores
    circuit: Circuit
    own: Measured
    held: Measured | None
    curves: Mapping[str, Tensor]
    nulls: Mapping[str, Float[Tensor, " _"]]
    effects: Float[Tensor, "source destination"]
    tail: Float[Tensor, " _"]
    complete: Mapping[str, Tensor]
    worth: Mapping[str, float]
    stability: float | None
    bands: Mapping[str, Float[Tensor, "share _"]]
    places: Mapping[str, str]
    columns: tuple[str, ...]
    roles: Mapping[str, str]
    n_unvisited: int
    """Destinations that ACDC had no time for."""

    def p(self, kind: str) -> float | None:
        null = self.nulls.get(kind)
        observed = self.held if kind == "held-out" else self.own
        if observed is None or null is None or not len(null):
            return None
        return rank_test(observed.f_of_first(N_NULL), null.double())

    @property
    def evidence(self) -> tuple[np.ndarray, np.ndarray]:
        """Score and measured effect of the edges that were measured."""
        there = self.circuit.edges & self.effects.isfinite()
        return self.scores.values[there].double().numpy(), self.effects[there].double().numpy()

    @property
    def missed(self) -> tuple[int, float] | None:
        """Of the random edges outside, how many move the metric as much as the lightest edge inside is said to; and
        with 95 % confidence the largest share of such edges.
        """
        if not len(self.tail):
            return None
        least = float(self.scores.values[self.circuit.edges].abs().min())
        n = int((self.tail.abs() >= least).sum())
        return n, upper_share(n, len(self.tail))

    @property
    def agreement(self) -> float | None:
        """Pearson correlation of score and measured effect."""
        a, b = self.evidence
        return float(np.corrcoef(a, b)[0, 1]) if len(a) > 2 and min(a.std(), b.std()) > 0 else None


def headline(found: Found, seconds: float) -> dict[str, Any]:
    """The numbers to read first."""
    cpr, cmd = float(found.curves["signed_areas"][0]), float(found.curves["absolute_areas"][1])
    complete = found.complete
    worst = float((complete["circuit"] - complete["model"]).abs().max()) if complete else None
    return {
        "accuracy": str(found.accuracy),
        "metric": found.work.metric.name,
        "n_edges": found.circuit.size,
        "n_nodes": len(found.circuit.nodes()),
        "share_of_edges": found.circuit.share,
        "faithfulness": found.own.f,
        "faithfulness_held_out": found.held.f if found.held else None,
        "faithfulness_of_the_rest": found.own.rest,
        "p_random": found.p("random"),
        "p_degree_matched": found.p("degree-matched"),
        "cpr": cpr,
        "cmd": cmd,
        "completeness": worst,
        "n_nodes_needed": sum(worth >= MINIMAL for worth in found.worth.values()) if found.worth else None,
        "stability": found.stability,
        "score_against_effect": found.agreement,
        "share_of_edges_missed_at_most": found.missed[1] if found.missed else None,
        "top_edges": [f"{name} {value:+.3g}" for name, value in top(found, 8)],
        "seconds": seconds,
    }


def top(found: Found, n: int) -> list[tuple[str, float]]:
    """The heaviest edges of the circuit."""
    ranked = sorted(found.circuit, key=lambda name: -abs(found.scores[name]))
    return [(name, found.scores[name]) for name in ranked[:n]]


def weights(found: Found) -> Float[Tensor, "source destination"]:
    """Measured effects; where they are missing, scores."""
    return torch.where(found.effects.isfinite(), found.effects, found.scores.values.to(found.effects))


def tables(found: Found) -> dict[str, pd.DataFrame]:
    """Edges with their evidence, the drawing, curves, controls, nodes and what each is worth, the graph's ends."""
    nodes, drawn = graph_tables(
        found.circuit, weights(found), places=found.places, columns=found.columns, roles=found.roles
    )
    edges = edge_table(found.circuit, {"score": found.scores.values, "effect": found.effects})
    order = np.argsort(-edges["score"].abs().to_numpy(), kind="stable")
    graph = found.circuit.graph
    ends = [("source", name) for name in graph.source_names] + [("destination", n) for n in graph.destination_names]
    made = {
        "edges": edges.iloc[order].reset_index(drop=True),
        "nodes": nodes,
        "drawn": drawn,
        "curve": _curve(found),
        "controls_drawn": pd.DataFrame(
            [(kind, float(f)) for kind, null in found.nulls.items() for f in null], columns=["kind", "faithfulness"]
        ),
        "pairs": pd.DataFrame({"pair": range(len(found.own.per_pair)), "faithfulness": found.own.per_pair.tolist()}),
        "graph": pd.DataFrame(ends, columns=["end", "name"]),
    }
    if found.worth:
        made["node_worth"] = pd.DataFrame({"node": list(found.worth), "worth": list(found.worth.values())})
    return made


def _curve(found: Found) -> pd.DataFrame:
    """Long: one row per size and series, with an interval over pairs or the range of the controls."""
    rows: list[tuple[object, ...]] = []
    sizes = found.curves["sizes"].tolist()
    for i, share in enumerate(SHARES):
        label = f"{100 * share:g} %"
        for name, words in (("absolute", "best by |score|"), ("signed", "best by signed score")):
            per_pair = found.curves[f"{name}_pairs"][i]
            low, high = _interval(per_pair[per_pair.isfinite()])
            rows.append((label, sizes[i], words, float(found.curves[name][i]), low, high))
        for kind, band in found.bands.items():
            drawn = band[i][band[i].isfinite()]
            if len(drawn):
                words = "random edges" if kind == "random" else "same degrees (random)"
                ends = float(drawn.mean()), float(drawn.min()), float(drawn.max())
                rows.append((label, sizes[i], words, *ends))
    return pd.DataFrame(rows, columns=["share", "n_edges", "series", "faithfulness", "low", "high"])


def _interval(values: Tensor) -> tuple[float, float]:
    if len(values) < 2 or float(values.std()) == 0:
        return (float(values.mean()), float(values.mean())) if len(values) else (0.0, 0.0)
    found = bootstrap_interval(values.double(), n_resamples=500)
    return found.low, found.high


def panels(found: Found) -> tuple[Panel, ...]:
    """The graph, the curve, scores against effects, the controls at this size, faithfulness by pair."""
    made = [
        graph_panel(
            f"The circuit for {found.data_name}",
            value_label=f"change of {found.work.metric.name}",
            x_label="main position" if found.columns else "",
            reading="Read upwards: an edge is what one part writes and another reads. Its width is how far the metric "
            "moves when the edge alone carries the corrupted run: blue edges speak for the answer, red against it.",
        ),
        Panel(
            title="Faithfulness at every size", kind="line", table="curve", x="share", y="faithfulness",
            group="series", low="low", high="high", x_label="edges kept", y_label="faithfulness",
            reading="1 is the whole model, 0 the corrupted run. Bands: bootstrap over pairs for the circuit, range of "
            f"{next(iter(found.bands.values())).shape[1]} draws for the controls (grey, on {N_FEW} pairs). Random "
            "edges are chance; circuits of the same degrees have the same parts, wired differently.",
        ),
        Panel(
            title="Control circuits of this size", kind="scatter", table="controls_drawn", x="kind", y="faithfulness",
            y_label="faithfulness",
            reading=f"On the same pairs the circuit has {found.own.f_of_first(N_NULL):.3f}. Random edges seldom "
            "connect at all; circuits of the same degrees have the same parts, wired differently.",
        ),
    ]  # fmt: skip
    if len(found.evidence[0]):
        made.insert(
            2,
            Panel(
                title="Scores against measured effects", kind="scatter", table="edges", x="effect", y="score",
                x_label=f"measured change of {found.work.metric.name}", y_label="score",
                reading="On the diagonal the score is right. Edges far off it are badly described by a gradient; the "
                "measured effect counts.",
            ),
        )  # fmt: skip
    return tuple(made)


def tensors(found: Found) -> dict[str, LabelledTensor]:
    """Scores of all edges and the circuit itself, from which it can be run again."""
    axes = ("source", "destination")
    return {
        "scores": LabelledTensor(values=found.scores.values.float(), axes=axes, unit=found.work.metric.name),
        "circuit": LabelledTensor(values=found.circuit.edges.to(torch.uint8), axes=axes),
    }
