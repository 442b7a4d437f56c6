"""Which method finds planted circuits? Edge scores of each against the edges that were written into the weights.

    AUROC             probability that an edge of the circuit scores above one that is not (ties count half)
    precision, recall of the edges with |score| of at least 5 % of the gap between clean and corrupted metric
    decoy             largest |score| of an edge that touches a decoy, over the smallest of an edge of the circuit
ACDC gives sets, not scores: an edge scores the largest tau at which it stays, over a grid of shares of the gap.
Beware: an edge counts as not in the circuit also where a little noise in the weights gives it a real effect, so that a
perfect method need not have recall 1 at precision 1; its AUROC is 1 as long as the noise is below the circuit.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from interp.circuits.acdc import acdc
from interp.circuits.attribution import edge_scores
from interp.circuits.evaluate import faithfulness
from interp.circuits.graph import Circuit, Graph
from interp.circuits.planted import planted_circuit, planted_graph, planted_pairs
from interp.core.errors import InterpError
from interp.core.progress import track
from interp.models.model import LoadedModel
from interp.models.toy.planted import planted, planted_names
from interp.tasks.base import PromptPairs
from interp.tasks.metrics import Metric

METHODS = ("eap", "clean-corrupt", "eap-ig", "eap-ig-activations", "exact", "acdc")
TAUS = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
"""For ACDC, as shares of the gap."""
CUT = 0.05
"""Share of the gap from which an edge is said to be found."""


def auroc(scores: Float[np.ndarray, " edge"], truth: Bool[np.ndarray, " edge"]) -> float:
    """Area under the curve of true against false positives: the rank sum of the true ones, midranks for ties."""
    from scipy.stats import rankdata

    n_true, n_false = int(truth.sum()), int((~truth).sum())
    if not n_true or not n_false:
        raise InterpError("an area under the curve needs edges that are in the circuit and edges that are not")
    ranks = np.asarray(rankdata(scores))
    return float((ranks[truth].sum() - n_true * (n_true + 1) / 2) / (n_true * n_false))


def method_scores(
    model: LoadedModel, pairs: PromptPairs, graph: Graph, metric: Metric, method: str, gap: float, steps: int = 5
) -> Float[Tensor, "source destination"]:
    """|score| of every edge, in units of the metric."""
    if method != "acdc":
        return edge_scores(model, pairs, graph, metric, method, steps=steps).values.abs().double()
    kept = torch.zeros(graph.possible.shape, dtype=torch.float64)
    for tau in sorted(TAUS):
        found = acdc(model, pairs, graph, metric, tau * gap, absolute=True).circuit
        kept[found.edges] = tau * gap
    return kept


def contest_row(
    scores: Float[Tensor, "source destination"], truth: Circuit, gap: float, decoys: Sequence[str] = ()
) -> dict[str, float]:
    """AUROC, precision and recall at the cut, and how far decoys stay below the circuit."""
    possible = truth.graph.possible
    found, true = scores >= CUT * gap, truth.edges
    n_hit = float((found & true).sum())
    touching = torch.zeros_like(possible)
    for name in decoys:
        touching[truth.graph.source(name)] = True
        touching[:, truth.graph.inputs(name)] = True
    touching &= possible & ~true
    least = float(scores[true].min())
    worst = float(scores[touching].max()) if decoys else float("nan")
    return {
        "auroc": auroc(scores[possible].numpy(), true[possible].numpy()),
        "precision": n_hit / max(1.0, float((found & possible).sum())),
        "recall": n_hit / float(true.sum()),
        "decoy": worst / least if least > 0 else float("nan" if not decoys else "inf"),
    }


def planted_contest(
    names: Sequence[str] = (), methods: Sequence[str] = METHODS, *, n: int = 30, seed: int = 0, steps: int = 5
) -> pd.DataFrame:
    """One row per planted circuit and method, with the faithfulness of the circuit and of all other edges."""
    rows: list[dict[str, object]] = []
    for name in track(list(names) or planted_names(), "planted circuits"):
        made = planted(name, n, seed)
        pairs, graph = planted_pairs(made), planted_graph(made)
        truth, metric = planted_circuit(made, graph), pairs.metric("logit_diff")
        ends = faithfulness(made.model, pairs, [truth, truth.complement()], metric)
        gap, (inside, outside) = float(ends.gap.mean()), ends.mean.tolist()
        for method in methods:
            scores = method_scores(made.model, pairs, graph, metric, method, gap, steps)
            found = contest_row(scores, truth, gap, made.decoys)
            rows.append({"circuit": name, "method": method, **found, "f_circuit": inside, "f_rest": outside})
    return pd.DataFrame(rows)
