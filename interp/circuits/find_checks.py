"""Controls and notes of a found circuit: what could have refuted it, and what to doubt (a helper of `find`)."""

from __future__ import annotations

import numpy as np

from interp.circuits.controls import STABLE, draw_controls
from interp.circuits.find_steps import N_NULL, n_evidence
from interp.circuits.find_views import Found
from interp.core.controls import rank_test
from interp.core.result import Control
from interp.core.seed import numpy_generator

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
    if found.missed:
        made.append(
            f"{found.missed[0]} of {len(found.tail)} random edges outside the circuit have an effect as large as the "
            "smallest score inside"
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
    if found.n_unvisited:
        made.append(f"the time was up: ACDC left the edges into {found.n_unvisited} destinations as they were")
    if found.work.n_random < 99:
        made.append(f"{found.work.n_random} control circuits cannot give p below {1 / (1 + found.work.n_random):.2g}")
    return tuple(made)
