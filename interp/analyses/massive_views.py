"""Tables, controls and figures of the `massive` method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd

from interp.analyses.massive_scan import Spot
from interp.core.controls import bootstrap_interval, rank_test
from interp.core.result import Control, Panel

UNTOUCHED, ZEROED, MEAN = "untouched", "set to zero", "set to its mean over other text"
ELSEWHERE, ORDINARY = "same dim zeroed at another position", "ordinary dim zeroed at the same place"


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Loss of every sequence under one intervention."""

    kind: str
    dim: int
    pos: int
    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def label(self) -> str:
        """Short name for an axis."""
        texts = {
            UNTOUCHED: "untouched",
            ZEROED: f"zero {self.dim}",
            MEAN: f"mean for {self.dim}",
            ELSEWHERE: f"control: {self.dim} at {self.pos}",
        }
        return texts.get(self.kind, f"control: zero {self.dim}")


def spot_table(spots: Sequence[Spot]) -> pd.DataFrame:
    return pd.DataFrame([asdict(spot) for spot in spots])


def layer_table(spots: Sequence[Spot], n_layers: int) -> pd.DataFrame:
    """For every layer the largest magnitudes and the median, averaged over sequences: tidy, one line each."""
    lines = {
        "largest": [s for s in spots if s.start and s.rank == 1],
        "second": [s for s in spots if s.start and s.rank == 2],
        "third": [s for s in spots if s.start and s.rank == 3],
        "largest, no first token": [s for s in spots if not s.start and s.rank == 1],
    }
    rows = [
        {"layer": layer, "of": name, "magnitude": _mean(abs(s.value) for s in chosen if s.layer == layer)}
        for name, chosen in lines.items()
        for layer in range(n_layers)
    ]
    medians = [
        {"layer": layer, "of": "median", "magnitude": _mean(s.median for s in lines["largest"] if s.layer == layer)}
        for layer in range(n_layers)
    ]
    return pd.DataFrame(rows + medians)


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def loss_table(losses: Sequence[Loss]) -> pd.DataFrame:
    """One row per intervention and sequence."""
    return pd.DataFrame(
        [
            {"kind": loss.kind, "dim": loss.dim, "pos": loss.pos, "sequence": sequence, "loss": value}
            for loss in losses
            for sequence, value in enumerate(loss.values)
        ]
    )


def summary_table(losses: Sequence[Loss], seed: int) -> pd.DataFrame:
    """One row per intervention, with a 95 % bootstrap interval over sequences (none for a single sequence)."""
    rows: list[dict[str, object]] = []
    for loss in losses:
        found = bootstrap_interval(np.array(loss.values), seed=seed) if len(loss.values) > 1 else None
        ends = {"low": found.low, "high": found.high} if found else {"low": loss.mean, "high": loss.mean}
        rows.append({"intervention": loss.label, "kind": loss.kind, "dim": loss.dim, "loss": loss.mean, **ends})
    return pd.DataFrame(rows)


def only(losses: Sequence[Loss], kind: str) -> float:
    """Mean loss of the one intervention of a kind."""
    return next(loss.mean for loss in losses if loss.kind == kind)


def ordinary_changes(losses: Sequence[Loss]) -> np.ndarray:
    """Signed changes of the loss when ordinary dims are zeroed."""
    base = only(losses, UNTOUCHED)
    return np.array([loss.mean - base for loss in losses if loss.kind == ORDINARY])


def control_rows(losses: Sequence[Loss], share: float) -> tuple[Control, ...]:
    """What could refute that the activation matters, and that it works as a constant."""
    base = only(losses, UNTOUCHED)
    zeroed, shift = abs(only(losses, ZEROED) - base), abs(only(losses, MEAN) - base)
    elsewhere, changes = abs(only(losses, ELSEWHERE) - base), np.abs(ordinary_changes(losses))
    return (
        Control(
            name=f"{len(changes)} ordinary dims zeroed at the same place, one at a time",
            statistic="change of the loss (nats); the control is the largest of them",
            observed=zeroed,
            control=float(changes.max()),
            p_value=rank_test(zeroed, changes),
            passed=bool(zeroed > changes.max()),
        ),
        Control(
            name="the same dim zeroed at another position",
            statistic="change of the loss (nats)",
            observed=zeroed,
            control=elsewhere,
            passed=zeroed > elsewhere,
        ),
        Control(
            name="its mean over other text in its place (a constant would do)",
            statistic="change of the loss (nats), zeroed against replaced; passes below a tenth",
            observed=zeroed,
            control=shift,
            passed=shift < 0.1 * zeroed,
        ),
        Control(
            name="other inputs",
            statistic="share of sequences with their largest activation at this place; passes at 0.9",
            observed=share,
            control=0.9,
            passed=share >= 0.9,
        ),
    )


PANELS = (
    Panel(
        title="Size of the residual stream's largest coordinates",
        kind="line", table="layers", x="layer", y="magnitude", group="of", log_y=True,
        x_label="layer", y_label="|h|, mean over sequences",
        reading="A line far above the others is one coordinate that dwarfs the rest; the median is the ordinary size. "
        "The line without the first token says whether anything massive is left elsewhere.",
    ),
    Panel(
        title="The largest activation through the layers",
        kind="line", table="trace", x="layer", y="mean", low="low", high="high",
        x_label="layer", y_label="value (band: range over sequences)",
        reading="Where it jumps up a layer writes it, where it falls one erases it; a thin band over the sequences "
        "means that the input hardly matters.",
    ),
    Panel(
        title="What the model loses without it",
        kind="bar", table="summary", x="intervention", y="loss", low="low", high="high",
        y_label="loss, nats per token",
        reading="Zeroing it should cost far more than zeroing ordinary dims there, or it at another position (grey); "
        "its mean over other text should cost almost nothing. Ends: 95 % interval over sequences.",
    ),
)  # fmt: skip
