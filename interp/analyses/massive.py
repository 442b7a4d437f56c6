"""Massive activations: which residual coordinates dwarf the rest, at which tokens, and does the model need them?

A coordinate h[t, c] of the stream after a block is massive if |h| > floor and |h| >= ratio * median |h| of that layer,
the median being over all tokens and dims of the sequence (Sun et al.). The headline is the largest one, at the first
layer where it has reached half of its greatest size. There it is set to zero, and to its mean over other text: a loss
that explodes under the first and stays under the second says that it works as a constant bias.
Paper: M. Sun, X. Chen, J. Z. Kolter, Z. Liu, Massive activations in large language models, 2024,
https://arxiv.org/abs/2402.17762.
Beware: the first position dominates in most models, and a start token changes the picture; small models can miss the
ratio, so the three largest values over the median are reported for every layer; half precision may overflow.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.core.controls import bootstrap_interval, rank_test
from interp.core.errors import InterpError
from interp.core.manifest import Manifest
from interp.core.progress import track
from interp.core.result import Control, LabelledTensor, Panel, Result
from interp.core.seed import torch_generator
from interp.core.sites import Part, Site
from interp.core.spec import Spec, Tolerance
from interp.instrument.capture import capture
from interp.instrument.edits import Edit, edited, set_to, zero
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel
from interp.tasks.corpora import load_corpus

ROWS = 8
"""Sequences per forward: bounds memory, and changes no number beyond rounding."""
TOP = 3
"""Places kept per layer and sequence."""


@dataclass(frozen=True, kw_only=True)
class MassiveConfig:
    """What counts as massive, and on which text."""

    corpus: str = "docs:assignment"
    """Text that is scanned and scored."""
    n_sequences: int = 6
    """Sequences of it."""
    length: int = 128
    """Tokens per sequence."""
    calibration: str = "docs"
    """Text whose mean replaces the value; taken from `calibration_skip` on, so that it is other text."""
    calibration_skip: int = 60
    """Sequences of the calibration text left out at its start."""
    ratio: float = 1000.0
    """Multiple of the layer's median magnitude (Sun et al., section 2)."""
    floor: float = 100.0
    """Magnitude it must also exceed (Sun et al., section 2)."""
    n_draws: int = 6
    """Ordinary dims zeroed at the same place, one at a time, as the control."""
    seed: int = 0
    """Which ordinary dims."""


@dataclass(frozen=True, kw_only=True, eq=False)
class MassiveData:
    """Text to scan, and other text for the mean."""

    text: TokenRecord
    calibration: TokenRecord


def load(model: LoadedModel, cfg: MassiveConfig) -> MassiveData:
    """The two corpora that the config names."""
    size = {"n_sequences": cfg.n_sequences, "length": cfg.length}
    return MassiveData(
        text=load_corpus(model, cfg.corpus, **size),
        calibration=load_corpus(model, cfg.calibration, **size, skip=cfg.calibration_skip),
    )


def run(model: LoadedModel, data: MassiveData, cfg: MassiveConfig) -> Result:
    """Scan every layer, then intervene on the largest activation, beside ordinary ones."""
    started = time.perf_counter()
    if cfg.n_draws < 1 or cfg.ratio <= 0 or cfg.floor < 0:
        raise InterpError(f"n_draws={cfg.n_draws}, ratio={cfg.ratio}, floor={cfg.floor} must be positive")
    if data.text.hash == data.calibration.hash:
        raise InterpError("the calibration text is the scored text; take another corpus or skip further")
    places = scan(model, data.text, cfg)
    place = largest(places)
    trace = _trace(model, data.text, place)
    losses = _interventions(model, data, place, _other_dims(model, places, place, cfg))
    return _result(model, data, cfg, places, trace, losses, time.perf_counter() - started)


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the largest activation first stands."""

    site: Site
    pos: int
    dim: int
    value: float
    """Mean over sequences, signed."""
    ratio: float
    """Largest magnitude over the median of its layer and sequence."""
    massive: bool
    share: float
    """Share of sequences whose largest activation of that layer is at this position and dim."""


def scan(model: LoadedModel, text: TokenRecord, cfg: MassiveConfig) -> pd.DataFrame:
    """The largest places of every layer and sequence: layer, sequence, rank, pos, token, dim, value, median, ratio."""
    rows: list[tuple[object, ...]] = []
    for start, chunk in _chunks(text, "scanning the layers"):
        with capture(model, "resid_post.*") as acts:
            model(chunk)
        for site, value in acts.items():
            real = value.float().masked_fill(~chunk.mask[..., None].to(value.device), float("nan"))
            for row, h in enumerate(real):
                median = float(h.abs().nanmedian())
                magnitude, index = torch.nan_to_num(h.abs().flatten(), nan=-1.0).topk(TOP)
                for rank, (size, flat) in enumerate(zip(magnitude.tolist(), index.tolist(), strict=True), 1):
                    pos, dim = divmod(flat, h.shape[1])
                    ratio = size / median if median > 0 else float("inf")
                    massive = size > cfg.floor and ratio >= cfg.ratio
                    token = chunk.strings[row][pos]
                    rows.append(
                        (site.layer, start + row, rank, pos, token, dim, float(h[pos, dim]), median, ratio, massive)
                    )
    names = ["layer", "sequence", "rank", "pos", "token", "dim", "value", "median", "ratio", "massive"]
    return pd.DataFrame(rows, columns=names)


def largest(places: pd.DataFrame) -> Place:
    """The place of the largest activation, at the first layer where it has half of its greatest size."""
    first = places[places["rank"] == 1]
    peak = first.loc[first["value"].abs().idxmax()]
    same = first[(first["pos"] == peak["pos"]) & (first["dim"] == peak["dim"])]
    sizes = same.assign(size=same["value"].abs()).groupby("layer")["size"].mean()
    layer = int(sizes.index[np.asarray(sizes >= 0.5 * sizes.max())].min())
    there, every = same[same["layer"] == layer], first[first["layer"] == layer]
    return Place(
        site=Site(Part.RESID_POST, layer),
        pos=int(peak["pos"]),
        dim=int(peak["dim"]),
        value=float(there["value"].mean()),
        ratio=float(there["ratio"].max()),
        massive=bool(there["massive"].any()),
        share=len(there) / len(every),
    )


def _chunks(text: TokenRecord, label: str) -> Iterator[tuple[int, TokenRecord]]:
    for start in track(range(0, len(text), ROWS), label):
        yield start, text.rows(slice(start, start + ROWS))


def _trace(model: LoadedModel, text: TokenRecord, place: Place) -> pd.DataFrame:
    """The value at the place, layer by layer: mean and range over sequences."""
    found: list[Tensor] = []
    for _, chunk in _chunks(text, "following it through the layers"):
        with capture(model, "resid_post.*", positions=place.pos) as acts:
            model(chunk)
        found.append(acts.stack("resid_post.*")[:, :, 0, place.dim].cpu())
    values = torch.cat(found, dim=1)
    return pd.DataFrame(
        {
            "layer": range(len(values)),
            "mean": values.mean(1).tolist(),
            "low": values.amin(1).tolist(),
            "high": values.amax(1).tolist(),
        }
    )


def _other_dims(model: LoadedModel, places: pd.DataFrame, place: Place, cfg: MassiveConfig) -> list[int]:
    """Dims that are among the largest nowhere."""
    assert model.dims.d_model is not None
    ordinary = sorted(set(range(model.dims.d_model)) - set(places["dim"]))
    generator = torch_generator(cfg.seed, "massive", str(place.site))
    order = torch.randperm(len(ordinary), generator=generator)[: cfg.n_draws].tolist()
    if not order:
        raise InterpError("every dim is among the largest somewhere; there is no ordinary one for the control")
    return [ordinary[i] for i in order]


def losses_of(model: LoadedModel, text: TokenRecord, edit: Edit | None, label: str) -> Float[Tensor, " sequence"]:
    """Mean next-token cross-entropy of each sequence, in nats, under an edit."""
    found: list[Tensor] = []
    for _, chunk in _chunks(text, label):
        if edit is None:
            logits = model(chunk)
        else:
            with edited(model, edit):
                logits = model(chunk)
        target, real = chunk.ids[:, 1:].to(logits.device), chunk.mask[:, 1:].to(logits.device)
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), target, reduction="none")
        found.append(((nll * real).sum(1) / real.sum(1)).cpu())
    return torch.cat(found)


def _interventions(model: LoadedModel, data: MassiveData, place: Place, dims: Sequence[int]) -> pd.DataFrame:
    """Loss of every sequence under every intervention: kind, dim, pos, sequence, loss."""
    site, pos, dim = place.site, place.pos, place.dim
    with capture(model, site, positions=pos) as acts:
        model(data.calibration)
    average = float(acts[site][:, 0, dim].float().mean())
    elsewhere = data.text.ids.shape[1] // 2 if pos != data.text.ids.shape[1] // 2 else 0
    plan: list[tuple[str, int, int, Edit | None]] = [
        ("untouched", dim, pos, None),
        ("set to zero", dim, pos, zero(site, at=pos, dims=dim)),
        ("set to its mean over other text", dim, pos, set_to(site, average, at=pos, dims=dim)),
        ("same dim zeroed at another position", dim, elsewhere, zero(site, at=elsewhere, dims=dim)),
    ]
    plan += [("ordinary dim zeroed at the same place", d, pos, zero(site, at=pos, dims=d)) for d in dims]
    tables: list[pd.DataFrame] = []
    for kind, d, p, edit in plan:
        loss = losses_of(model, data.text, edit, f"massive: {kind}")
        columns = {"kind": kind, "dim": d, "pos": p, "sequence": range(len(loss)), "loss": loss.tolist()}
        tables.append(pd.DataFrame(columns))
    return pd.concat(tables, ignore_index=True)


def _summary(losses: pd.DataFrame, seed: int) -> pd.DataFrame:
    """One row per intervention, with a bootstrap interval over sequences."""
    rows: list[dict[str, object]] = []
    for (kind, dim, pos), group in losses.groupby(["kind", "dim", "pos"], sort=False):  # pyright: ignore[reportAssignmentType]
        interval = bootstrap_interval(group["loss"].to_numpy(), seed=seed)
        place = f"{kind} (dim {dim}, position {pos})"
        estimate = {"loss": interval.estimate, "low": interval.low, "high": interval.high}
        rows.append({"intervention": place, "kind": kind, "dim": dim, "pos": pos, **estimate})
    return pd.DataFrame(rows)


def _result(
    model: LoadedModel, data: MassiveData, cfg: MassiveConfig, places: pd.DataFrame, trace: pd.DataFrame,
    losses: pd.DataFrame, seconds: float,
) -> Result:  # fmt: skip
    place = largest(places)
    summary = _summary(losses, cfg.seed)
    loss = {str(kind): float(group["loss"].iloc[0]) for kind, group in summary.groupby("kind")}
    ordinary = summary.loc[summary["kind"] == "ordinary dim zeroed at the same place", "loss"].to_numpy()
    base = loss["untouched"]
    worst = float(ordinary[np.abs(ordinary - base).argmax()])
    return Result(
        headline={
            "site": str(place.site),
            "pos": place.pos,
            "dim": place.dim,
            "value": place.value,
            "ratio": place.ratio,
            "share_of_sequences": place.share,
            "loss_base": base,
            "loss_zeroed": loss["set to zero"],
            "loss_mean": loss["set to its mean over other text"],
            "loss_control": worst,
        },
        tables={"places": places, "layers": _layers(places), "trace": trace, "losses": losses, "summary": summary},
        panels=PANELS,
        controls=_controls(loss, ordinary, place),
        manifest=Manifest(
            method="massive",
            model=model.record(),
            config=dataclasses.asdict(cfg),
            data={
                "name": cfg.corpus,
                "hash": data.text.hash,
                "hash_calibration": data.calibration.hash,
                "n_tokens": data.text.n_tokens,
            },
            sites=tuple(map(str, model.resolve("resid_post.*"))),
            seeds=(cfg.seed,),
            metrics=METRICS,
            seconds=seconds,
        ),
        tensors={"value": LabelledTensor(values=torch.tensor(trace["mean"].to_numpy()), axes=("layer",))},
        notes=_notes(place, cfg, data),
    )


def _layers(places: pd.DataFrame) -> pd.DataFrame:
    """For every layer the largest magnitudes and the median, averaged over sequences; tidy for one line each."""
    sized = places.assign(size=places["value"].abs())
    tables = [
        sized[sized["rank"] == rank].groupby("layer")["size"].mean().rename("magnitude").reset_index().assign(of=name)
        for rank, name in ((1, "largest"), (2, "second"), (TOP, "third"))
    ]
    median = sized.groupby("layer")["median"].mean().rename("magnitude").reset_index().assign(of="median")
    return pd.concat([*tables, median], ignore_index=True)


def _controls(loss: dict[str, float], ordinary: np.ndarray, place: Place) -> tuple[Control, ...]:
    base, zeroed = loss["untouched"], abs(loss["set to zero"] - loss["untouched"])
    shift = abs(loss["set to its mean over other text"] - base)
    elsewhere = abs(loss["same dim zeroed at another position"] - base)
    changes = np.abs(ordinary - base)
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
            observed=place.share,
            control=0.9,
            passed=place.share >= 0.9,
        ),
    )


def _notes(place: Place, cfg: MassiveConfig, data: MassiveData) -> tuple[str, ...]:
    notes = [f"{len(data.text)} sequences of {data.text.ids.shape[1]} tokens; nothing was prepended to them"]
    if not place.massive:
        notes.append(
            f"no massive activation: the largest is {place.ratio:.0f} times the median (criterion {cfg.ratio:g}, and "
            f"magnitude above {cfg.floor:g}); the numbers are for that largest one"
        )
    return tuple(notes)


METRICS = {
    "loss": "v1: mean next-token cross-entropy in nats over the sequences, each the mean of its own tokens",
    "ratio": "v1: |h| over the median |h| of the same layer and sequence, all tokens and dims",
}

PANELS = (
    Panel(
        title="Size of the residual stream's largest coordinates",
        kind="line", table="layers", x="layer", y="magnitude", group="of", log_y=True,
        x_label="layer", y_label="|h|, mean over sequences",
        reading="A line far above the others is one coordinate that dwarfs the rest; the median is the ordinary size.",
    ),
    Panel(
        title="The largest activation through the layers",
        kind="line", table="trace", x="layer", y="mean", low="low", high="high",
        x_label="layer", y_label="value (band: range over sequences)",
        reading="Where it jumps up a layer writes it, where it falls one erases it; a thin band means that the input "
        "hardly matters.",
    ),
    Panel(
        title="What the model loses without it",
        kind="bar", table="summary", x="intervention", y="loss", low="low", high="high",
        y_label="loss, nats per token (95 % interval over sequences)",
        reading="Zeroing it should cost far more than zeroing ordinary dims at the same place; its mean over other text "
        "should cost almost nothing.",
    ),
)  # fmt: skip


def example(model: LoadedModel) -> tuple[MassiveData, MassiveConfig]:
    """Three short sequences."""
    cfg = MassiveConfig(n_sequences=3, length=16, calibration_skip=900, n_draws=2)
    return load(model, cfg), cfg


SPEC = Spec(
    name="massive",
    question="Which residual coordinates dwarf the rest, at which tokens, and does the model need them?",
    paper="Sun et al. 2024, https://arxiv.org/abs/2402.17762",
    config=MassiveConfig,
    load=load,
    run=run,
    example=example,
    metrics=METRICS,
    tolerances={"loss_zeroed": Tolerance(relative=1e-2), "ratio": Tolerance(relative=1e-2)},
)
