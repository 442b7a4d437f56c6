"""What `interp bench capture` times: captures of 120 sites, of every site, of the first third, and a short prompt.

The first system of each group is the plain forward, to which the others are compared in time and, where they give
logits, in value. `bf16` adds the model in bfloat16, with the relative error of every part: the norm of the difference
to float32 over the norm, the largest over layers (and the part's median). It is an option since it changes numbers.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Systems = dict[str, Callable[[], object]]
GATED = ("resid_post", "gate_pre", "up", "neurons")
BATCH, PROMPT = (8, 128), (1, 16)


@dataclass(kw_only=True)
class Group:
    """Systems that are compared with each other; the first is the reference."""

    case: str
    systems: Systems
    scale: dict[str, float] = field(default_factory=dict[str, float])
    """Times of a system that does a part of the work are multiplied with this."""


@dataclass(kw_only=True)
class Notes:
    """What a benchmark found beside times."""

    left_out: dict[str, str] = field(default_factory=dict[str, str])
    bf16_error: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])


def capture_groups(model: Any, notes: Notes, *, bf16: bool, with_peers: bool = True) -> Iterator[Group]:
    """The groups, one after another."""
    from interp.cli.bench_peers import peers

    others, left_out = peers(model) if with_peers else ({}, {})
    notes.left_out.update(left_out)
    ids, short = _ids(model, BATCH), _ids(model, PROMPT)
    buffers = _buffers()
    third = model.n_layers // 3
    gated = _gated(model)
    n, every = len(model.resolve(gated)), len(model.sites())
    until = [pattern.replace("*", f"0-{third}") for pattern in gated]

    def theirs(ids: Any) -> Systems:
        return {name: (lambda run=run: run(ids)) for name, run in others.items()}

    yield Group(
        case=f"{BATCH[0]} x {BATCH[1]} tokens",
        systems={
            "plain forward": lambda: plain(model, ids),
            f"interp, {n} sites": lambda: captured(model, ids, gated),
            f"interp, every site ({every})": lambda: captured(model, ids, "*"),
            f"interp, every site ({every}), in buffers": lambda: captured(model, ids, "*", buffers=buffers),
            f"interp, layers 0 to {third} only": lambda: captured(model, ids, until, stop=True),
            **theirs(ids),
        },
    )
    yield Group(
        case=f"{PROMPT[0]} x {PROMPT[1]} tokens",
        systems={
            "plain forward": lambda: plain(model, short),
            f"interp, {n} sites": lambda: captured(model, short, gated),
            f"interp, every site ({every})": lambda: captured(model, short, "*"),
            **theirs(short),
        },
    )
    if bf16:
        yield _bf16(model, notes, ids, gated)


def _bf16(model: Any, notes: Notes, ids: Any, gated: list[str]) -> Group:
    import copy

    import torch

    from interp.models.model import LoadedModel

    half = LoadedModel(copy.deepcopy(model.module).to(torch.bfloat16), source=f"{model.source} in bfloat16")
    notes.bf16_error = relative_errors(model, half, ids)
    return Group(
        case="bfloat16",
        systems={
            "plain forward, float32": lambda: plain(model, ids),
            "plain forward, bfloat16": lambda: plain(half, ids),
            f"interp, {len(model.resolve(gated))} sites, bfloat16": lambda: captured(half, ids, gated),
        },
    )


def relative_errors(model: Any, half: Any, ids: Any) -> dict[str, dict[str, float]]:
    """Per part, over layers: median and largest of |half - full| / |full| (masked scores left aside)."""
    import torch

    from interp.instrument.capture import capture

    found: dict[str, list[float]] = {}
    with capture(model, "*", stop=False) as full, capture(half, "*", stop=False) as rough:
        plain(model, ids)
        plain(half, ids)
    for site in model.sites():
        x, y = full[site], rough[site].to(full[site].dtype)
        if not x.is_floating_point():
            continue
        open_ = x > torch.finfo(torch.bfloat16).min / 2
        error = ((y - x) * open_).norm() / (x * open_).norm().clamp_min(torch.finfo(x.dtype).tiny)
        found.setdefault(str(site.part), []).append(float(error))
    return {part: {"median": statistics.median(each), "max": max(each)} for part, each in found.items()}


def plain(model: Any, ids: Any) -> Any:
    """The model as it is, without the workbench."""
    import torch

    with torch.no_grad():
        return model.module(ids, use_cache=False).logits


def captured(model: Any, ids: Any, sites: Any, *, stop: bool = False, buffers: Any = None) -> Any:
    """A capture; its logits, or the mark of an early stop."""
    from interp.instrument.capture import capture

    with capture(model, sites, stop=stop, buffers=buffers):
        return model(ids)


def _gated(model: Any) -> list[str]:
    known = {str(site.part) for site in model.sites()}
    return [f"{part}.*" for part in GATED if part in known]


def _buffers() -> Any:
    from interp.instrument.capture import CaptureBuffers

    return CaptureBuffers()


def _ids(model: Any, shape: tuple[int, int]) -> Any:
    import torch

    from interp.core.seed import torch_generator

    return torch.randint(model.dims.d_vocab, shape, generator=torch_generator(0, "bench"))
