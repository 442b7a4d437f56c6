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
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from interp.analyses.massive_scan import Place, Spot, chunks, largest, scan
from interp.analyses.massive_views import (
    ELSEWHERE,
    MEAN,
    ORDINARY,
    PANELS,
    UNTOUCHED,
    ZEROED,
    Loss,
    control_rows,
    layer_table,
    loss_table,
    only,
    ordinary_changes,
    spot_table,
    summary_table,
)  # fmt: skip
from interp.core.errors import InterpError
from interp.core.manifest import Manifest
from interp.core.progress import track
from interp.core.result import LabelledTensor, Result
from interp.core.seed import torch_generator
from interp.core.spec import Spec, Tolerance
from interp.instrument.capture import capture
from interp.instrument.edits import Edit, edited, set_to, zero
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel
from interp.tasks.corpora import load_corpus


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
    if data.text.ids.shape[1] < 2:
        raise InterpError("sequences of one token predict nothing; use length of at least 2")
    if data.text.hash == data.calibration.hash:
        raise InterpError("the calibration text is the scored text; take another corpus or skip further")
    spots = scan(model, data.text, cfg.ratio, cfg.floor)
    place = largest(spots)
    trace = _trace(model, data.text, place)
    losses = _interventions(model, data, place, _ordinary_dims(model, spots, place, cfg))
    return _result(model, data, cfg, spots, trace, losses, time.perf_counter() - started)


def _trace(model: LoadedModel, text: TokenRecord, place: Place) -> pd.DataFrame:
    """The value at the place, layer by layer: mean and range over sequences."""
    found: list[Tensor] = []
    for _, chunk in chunks(text, "following it through the layers"):
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


def _ordinary_dims(model: LoadedModel, spots: Sequence[Spot], place: Place, cfg: MassiveConfig) -> list[int]:
    """Dims that are among the largest nowhere."""
    ordinary = sorted(set(range(model.weight("W_E").shape[1])) - {spot.dim for spot in spots})
    generator = torch_generator(cfg.seed, "massive", str(place.site))
    order = torch.randperm(len(ordinary), generator=generator)[: cfg.n_draws].tolist()
    if not order:
        raise InterpError("every dim is among the largest somewhere; there is no ordinary one for the control")
    return [ordinary[i] for i in order]


def losses_of(model: LoadedModel, text: TokenRecord, edit: Edit | None) -> Float[Tensor, " sequence"]:
    """Mean next-token cross-entropy of each sequence, in nats, under an edit."""
    found: list[Tensor] = []
    for _, chunk in chunks(text):
        if edit is None:
            logits = model(chunk)
        else:
            with edited(model, edit):
                logits = model(chunk)
        target, real = chunk.ids[:, 1:].to(logits.device), chunk.mask[:, 1:].to(logits.device)
        nll = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2).float(), target, reduction="none")
        found.append(((nll * real).sum(1) / real.sum(1)).cpu())
    return torch.cat(found)


def _interventions(model: LoadedModel, data: MassiveData, place: Place, dims: Sequence[int]) -> list[Loss]:
    """Loss of every sequence under every intervention."""
    site, pos, dim = place.site, place.pos, place.dim
    with capture(model, site, positions=pos) as acts:
        model(data.calibration)
    average = float(acts[site][:, 0, dim].float().mean())
    middle = data.text.ids.shape[1] // 2
    elsewhere = middle if middle != pos else 0
    plan: list[tuple[str, int, int, Edit | None]] = [
        (UNTOUCHED, dim, pos, None),
        (ZEROED, dim, pos, zero(site, at=pos, dims=dim)),
        (MEAN, dim, pos, set_to(site, average, at=pos, dims=dim)),
        (ELSEWHERE, dim, elsewhere, zero(site, at=elsewhere, dims=dim)),
        *((ORDINARY, d, pos, zero(site, at=pos, dims=d)) for d in dims),
    ]
    return [
        Loss(kind=kind, dim=d, pos=p, values=tuple(losses_of(model, data.text, edit).tolist()))
        for kind, d, p, edit in track(plan, "massive: interventions")
    ]


def _result(
    model: LoadedModel, data: MassiveData, cfg: MassiveConfig, spots: Sequence[Spot], trace: pd.DataFrame,
    losses: Sequence[Loss], seconds: float,
) -> Result:  # fmt: skip
    place, base = largest(spots), only(losses, UNTOUCHED)
    changes = ordinary_changes(losses)
    return Result(
        headline={
            "site": str(place.site),
            "pos": place.pos,
            "dim": place.dim,
            "value": place.value,
            "ratio": place.ratio,
            "share_of_sequences": place.share,
            "loss_base": base,
            "loss_zeroed": only(losses, ZEROED),
            "loss_mean": only(losses, MEAN),
            "loss_control": base + float(changes[np.abs(changes).argmax()]),
        },
        tables={
            "spots": spot_table(spots),
            "layers": layer_table(spots, model.n_layers),
            "trace": trace,
            "losses": loss_table(losses),
            "summary": summary_table(losses, cfg.seed),
        },
        panels=PANELS,
        controls=control_rows(losses, place.share),
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
