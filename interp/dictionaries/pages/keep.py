"""The best examples of many groups from a stream, in bounded memory and exactly.

A group holds at most n examples, those of largest score; of several with equal `key` (the same window of tokens) the
best one. Ties fall to the earlier row, then the earlier position. Exact: an example is only forgotten once n others
of other windows beat it, and they can only improve, so the result equals that of sorting everything at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int, Shaped

MIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True, kw_only=True, eq=False)
class Kept:
    """Examples, by group and then from the best on."""

    group: Int[np.ndarray, " n"]
    score: Float[np.ndarray, " n"]
    row: Int[np.ndarray, " n"]
    pos: Int[np.ndarray, " n"]
    key: Shaped[np.ndarray, " n"]

    def __len__(self) -> int:
        return len(self.group)

    def take(self, index: Shaped[np.ndarray, " m"]) -> Kept:
        names = Kept.__dataclass_fields__
        return Kept(**{name: getattr(self, name)[index] for name in names})


class Best:
    """The n best examples of each of `n_groups` groups."""

    def __init__(self, n_groups: int, n: int) -> None:
        self.n = n
        self.kept = Kept(
            group=np.zeros(0, np.int64),
            score=np.zeros(0),
            row=np.zeros(0, np.int64),
            pos=np.zeros(0, np.int64),
            key=np.zeros(0, np.uint64),
        )
        self._least = np.full(n_groups, -np.inf)

    def hopeful(self, group: Int[np.ndarray, " n"], score: Float[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
        """Which examples could still enter: those not beaten by the last one of a full group."""
        return (score >= self._least[group]).nonzero()[0]

    def update(self, new: Kept) -> None:
        if not len(new):
            return
        names = Kept.__dataclass_fields__
        both = Kept(**{name: np.concatenate([getattr(self.kept, name), getattr(new, name)]) for name in names})
        both = both.take(np.lexsort((both.pos, both.row, -both.score, both.group)))
        both = both.take(_first_of_equals(both.group, both.key))
        rank = _rank(both.group)
        self.kept = both.take(rank < self.n)
        full = rank == self.n - 1
        self._least[both.group[full]] = both.score[full]


def _first_of_equals(group: Int[np.ndarray, " n"], key: Shaped[np.ndarray, " n"]) -> Int[np.ndarray, " m"]:
    """Places of the first of each (group, key), in order."""
    order = np.lexsort((np.arange(len(key)), key, group))
    new = np.ones(len(key), dtype=bool)
    new[1:] = (group[order][1:] != group[order][:-1]) | (key[order][1:] != key[order][:-1])
    return np.sort(order[new])


def _rank(group: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Place of each within its group; the groups are in order."""
    starts = np.searchsorted(group, group, side="left")
    return np.arange(len(group)) - starts


def mixed(*parts: Int[np.ndarray, " n"]) -> Shaped[np.ndarray, " n"]:
    """A 64-bit number per place that depends on all parts.

    splitmix64: Steele et al. 2014, https://doi.org/10.1145/2714064.2660195.
    """
    state = np.zeros(len(parts[0]), dtype=np.uint64)
    for part in parts:
        state = state ^ part.astype(np.uint64)
        state = state + np.uint64(MIX[0])
        state = (state ^ (state >> np.uint64(30))) * np.uint64(MIX[1])
        state = (state ^ (state >> np.uint64(27))) * np.uint64(MIX[2])
        state = state ^ (state >> np.uint64(31))
    return state


def lottery(seed: int, *parts: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """A number in [0, 1) per place, as if drawn at random, the same whatever else is drawn."""
    first = np.full(len(parts[0]), seed, dtype=np.int64)
    return (mixed(first, *parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def window_keys(windows: Int[np.ndarray, "n width"]) -> Shaped[np.ndarray, " n"]:
    """Equal for equal windows of ids."""
    return mixed(*windows.T) if windows.shape[1] else np.zeros(len(windows), np.uint64)
