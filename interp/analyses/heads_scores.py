"""Where attention heads look: one number per head and kind of head (a helper of `heads`).

With A[i, j] the attention of query i to key j and t the tokens, each score is a mean over the queries of some mass:
    prefix     sum over j <= i with t[j-1] = t[i]: what came after this token before (Olsson et al. 2022)
    prefix_max the largest of these instead of the sum: with several copies the sum is near 1 where the largest is not
    previous   A[i, i-1]
    duplicate  sum over j < i with t[j] = t[i]
    sink       A[i, 0]
    distance   A[i, i-S+1]: the place of the prefix match in repeated rows of period S, whatever the tokens are
Queries are those of the second copy; in text, those that have a match. `previous` and `sink` take all but the first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.sites import Part
from interp.instrument.capture import capture
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel

ROWS = 4
"""Rows per forward: bounds memory, and changes no number beyond rounding."""
NAMES = ("prefix", "prefix_max", "previous", "duplicate", "sink")
DISTANCE = "distance"

Pattern = Float[Tensor, "row head query key"]
Keys = Bool[Tensor, "row query key"]


def after_match(ids: Int[Tensor, "row pos"]) -> Keys:
    """Keys that come right after an earlier occurrence of the query's token."""
    same = ids[:, :, None] == ids[:, None, :]
    shifted = torch.nn.functional.pad(same[:, :, :-1], (1, 0), value=False)
    return shifted & _not_later(ids.shape[1])


def same_token(ids: Int[Tensor, "row pos"]) -> Keys:
    """Earlier keys with the query's own token."""
    same = ids[:, :, None] == ids[:, None, :]
    return same & _not_later(ids.shape[1]) & ~torch.eye(ids.shape[1], dtype=torch.bool)


def at_distance(ids: Int[Tensor, "row pos"], distance: int) -> Keys:
    """The key so many positions before the query."""
    n_rows, n_pos = ids.shape
    line = torch.ones(n_pos, dtype=torch.bool).diag()
    shifted = torch.nn.functional.pad(line, (0, 0, distance, 0))[:n_pos]
    return shifted.expand(n_rows, -1, -1)


def _not_later(n_pos: int) -> Bool[Tensor, "query key"]:
    return torch.ones(n_pos, n_pos, dtype=torch.bool).tril()


def mass(pattern: Pattern, keys: Keys, queries: Bool[Tensor, "row query"], *, largest: bool = False) -> Tensor:
    """Attention from each chosen query to its keys, per head, summed over the chosen queries: (head,)."""
    chosen = pattern * keys[:, None].to(pattern)
    found = chosen.amax(-1) if largest else chosen.sum(-1)
    return (found * queries[:, None].to(found)).sum((0, 2))


def scores(
    model: LoadedModel, record: TokenRecord, *, period: int | None = None
) -> dict[str, Float[Tensor, "layer head"]]:
    """All scores of every head on some rows, float64.

    period: of repeated rows (or rows made like them): queries of the prefix and duplicate scores are the last `period`
    tokens. Without it, every query with a match.
    """
    sites = [site for site in model.sites() if site.part is Part.PATTERN]
    if not sites:
        raise InterpError(f"{model.source} has no attention patterns (sites pattern.*); heads cannot be scored")
    plan = list(_plan(record.ids, period))
    n_layers, n_heads = len(sites), model.dims.n_heads or 0
    sums = {name: torch.zeros(n_layers, n_heads, dtype=torch.float64) for name, *_ in plan}
    for start in range(0, len(record), ROWS):
        rows = slice(start, start + ROWS)
        with capture(model, sites) as acts:
            model(record.rows(rows))
        for layer, site in enumerate(sites):
            pattern = acts[site].double().cpu()
            for name, keys, queries in plan:
                sums[name][layer] += mass(pattern, keys[rows], queries[rows], largest=name == "prefix_max")
    return {name: sums[name] / max(1, int(queries.sum())) for name, _, queries in plan}


def _plan(ids: Tensor, period: int | None) -> Iterator[tuple[str, Keys, Bool[Tensor, "row query"]]]:
    """Each score's keys and queries."""
    n_pos = ids.shape[1]
    late = torch.arange(n_pos).expand(len(ids), -1)
    matched, twins = after_match(ids), same_token(ids)
    second = late >= n_pos - (period or 0)
    yield "prefix", matched, second if period else matched.any(-1)
    yield "prefix_max", matched, second if period else matched.any(-1)
    yield "previous", at_distance(ids, 1), late >= 1
    yield "duplicate", twins, second if period else twins.any(-1)
    first = torch.zeros(len(ids), n_pos, n_pos, dtype=torch.bool)
    first[..., 0] = True
    yield "sink", first, late >= 1
    if period:
        yield DISTANCE, at_distance(ids, period - 1), second


def layers_of(model: LoadedModel) -> list[int]:
    """The layers that have patterns, in the order of the scores."""
    return [site.layer for site in model.sites() if site.part is Part.PATTERN and site.layer is not None]
