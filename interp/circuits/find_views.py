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

from interp.circuits.controls import STABLE, draw_controls
from interp.circuits.export import edge_table
from interp.circuits.faithfulness import MINIMAL, SHARES
from interp.circuits.figure import graph_panel, graph_tables
from interp.circuits.find_steps import N_FEW, N_NULL, Measured, Work, n_evidence
from interp.circuits.graph import Circuit, EdgeScores
from interp.core.controls import bootstrap_interval, rank_test
from interp.core.result import Control, LabelledTensor, Panel
from interp.core.seed import numpy_generator
from interp.tasks.library import Accuracy

LEVELS = {"random": 0.01, "degree-matched": 0.05, "held-out": 0.05}
"""p at which a control counts as held: the same parts wired differently are a near neighbour, not chance."""
LEVEL = 0.01
IDENTITY = 1e-3
N_SHUFFLES = 999
WORDS = {
    "random": "{n} random circuits of {size} edges",
    "degree-matched": "{n} circuits of the same parts and degrees, wired differently",
    "held-out": "prompts of other words: {n} circuits of the same degrees there",
}


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
    nulls: Mapping[str, Float[Tensor, " draw"]]
    effects: Float[Tensor, "source destination"]
    complete: Mapping[str, Tensor]
    worth: Mapping[str, float]
    stability: float | None
    bands: Mapping[str, Float[Tensor, "share draw"]]
    places: Mapping[str, str]
    columns: tuple[str, ...]
    roles: Mapping[str, str]

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
            x_label="position of most of a node's weight" if found.columns else "",
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


def controls(found: Found) -> tuple[Control, ...]:
    """What could have refuted the circuit."""
    made = [
        Control(
            name="all edges give the clean run, none the corrupted one",
            statistic="largest difference of the metric, share of the gap; the control is what rounding may do",
            observed=found.own.error, control=IDENTITY, passed=found.own.error <= IDENTITY,
        )
    ]  # fmt: skip
    for kind, null in found.nulls.items():
        observed, p = found.held if kind == "held-out" else found.own, found.p(kind)
        if observed is None or p is None:
            continue
        made.append(
            Control(
                name=WORDS[kind].format(n=len(null), size=found.circuit.size),
                statistic=f"faithfulness; the control is the 95th percentile; passes at p <= {LEVELS[kind]:g}",
                observed=observed.f_of_first(N_NULL), control=float(np.quantile(null.double().numpy(), 0.95)),
                p_value=p, passed=p <= LEVELS[kind],
            )
        )  # fmt: skip
    if (shuffled := _shuffled(found)) is not None:
        made.append(shuffled)
    if found.stability is not None:
        made.append(
            Control(
                name="resampled prompts",
                statistic=f"mean Jaccard overlap of the circuits; passes from {STABLE:g}, a bar the field proposed",
                observed=found.stability, control=STABLE, passed=found.stability >= STABLE,
            )
        )  # fmt: skip
    return tuple(made)


def _shuffled(found: Found) -> Control | None:
    """Do scores say which edges matter more, within the circuit?"""
    if (observed := found.agreement) is None:
        return None
    a, b = found.evidence
    generator = numpy_generator(found.work.seed, "shuffled effects")
    null = np.array([np.corrcoef(a, generator.permutation(b))[0, 1] for _ in range(N_SHUFFLES)])
    p = rank_test(observed, null)
    return Control(
        name=f"measured effects of {len(a)} edges, shuffled",
        statistic="correlation of score and effect; the control is the 95th percentile; passes at p <= 0.01",
        observed=observed, control=float(np.quantile(null, 0.95)), p_value=p, passed=p <= LEVEL,
    )  # fmt: skip


def tensors(found: Found) -> dict[str, LabelledTensor]:
    """Scores of all edges and the circuit itself, from which it can be run again."""
    axes = ("source", "destination")
    return {
        "scores": LabelledTensor(values=found.scores.values.float(), axes=axes, unit=found.work.metric.name),
        "circuit": LabelledTensor(values=found.circuit.edges.to(torch.uint8), axes=axes),
    }


def notes(found: Found) -> tuple[str, ...]:
    """What to doubt."""
    made = [f"effects of single edges are measured on {n_evidence(found.work)} pairs"]
    same = [each.edges for each in draw_controls("degree-matched", found.circuit, 5, found.work.seed)]
    kept = float(np.mean([float((edges & found.circuit.edges).sum()) for edges in same])) / found.circuit.size
    if kept > 0.5:
        made.append(
            f"circuits of the same degrees share {kept:.0%} of the edges with this one: that control asks whether the "
            "wiring matters once the parts are known, not whether chance would find them"
        )
    f = found.own.per_pair[found.own.per_pair.isfinite()]
    if len(f) > 1:
        quarter, three = np.quantile(f.double().numpy(), (0.25, 0.75))
        made.append(f"faithfulness of single pairs: a quarter below {quarter:.2f}, a quarter above {three:.2f}")
    few = [kind for kind, null in found.nulls.items() if len(null) < found.work.n_random]
    if few:
        made.append(f"the time was up: fewer control circuits than asked for ({', '.join(few)})")
    n_there = len(found.evidence[0])
    if n_there < found.circuit.size:
        made.append(f"the time was up: effects of {n_there} of {found.circuit.size} edges were measured")
    if not found.worth or not found.complete:
        made.append("the time was up: completeness or minimality was not measured")
    if found.work.n_random < 99:
        made.append(f"{found.work.n_random} control circuits cannot give p below {1 / (1 + found.work.n_random):.2g}")
    return tuple(made)
