"""From what a forward gave to what is stored: real tokens only, in the store's dtype, with the error that this costs.

int8: q = round(x / s), s = max |x| / 127 of each token (float32, stored beside it; 1 for a token of zeros), x' = q s.
The relative error of a site is ||x' - x|| / ||x|| over all its tokens. A value that is not finite, or that the dtype
cannot hold (float16 ends at 65,504), is an error that names the first site and token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int8
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.sites import Site
from interp.instrument.shards import DTYPES, scale_name
from interp.instrument.statistics import BLOCK_NUMBERS, Statistics
from interp.instrument.stream import Batch
from interp.instrument.stream_pass import Observer, show
from interp.instrument.stream_rows import Tokens, run_batch
from interp.models.model import LoadedModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """The rows of one forward pass, ready to be written."""

    columns: dict[str, Tensor]
    statistics: dict[str, Statistics]
    error: dict[str, tuple[float, float]]
    """Site -> sums of squares of the error and of the values."""
    shapes: dict[str, tuple[int, ...]]

    @property
    def n_bytes(self) -> int:
        return sum(column.numel() * column.element_size() for column in self.columns.values())


def encode_batch(
    model: LoadedModel, batch: Batch, sites: Sequence[Site], dtype: str, observers: Sequence[Observer] = ()
) -> Encoded:
    """One forward pass of the model over the batch, several sites at once; observers see the same rows, unrounded."""
    rows = run_batch(model, batch, sites)
    out = Encoded(columns={}, statistics={}, error={}, shapes={})
    for site in rows:
        _encode(out, site, rows[site], dtype, rows.tokens)
    row, pos, ids = rows.tokens
    out.columns.update({"row": row, "pos": pos} if ids is None else {"ids": ids, "row": row, "pos": pos})
    show(rows, observers)
    return out


def _encode(out: Encoded, name: str, rows: Tensor, dtype: str, tokens: Tokens) -> None:
    rows = rows.detach()
    flat = rows.flatten(1) if rows.ndim > 1 else rows[:, None]
    if not flat.is_floating_point() and (
        dtype == "int8" or not torch.equal(flat.to(DTYPES[dtype]).to(flat.dtype), flat)
    ):
        raise InterpError(f"{name} holds whole numbers, which {dtype} does not keep; store it as float32")
    # A copy in any case: nobody may write into what waits to be stored.
    stored, scale = quantise(flat) if dtype == "int8" else (flat.to(DTYPES[dtype], copy=True), None)
    again = stored if scale is None else dequantise(stored, scale)
    if len(flat):
        _check_finite(name, flat, again, dtype, tokens)
    difference = again.to(flat.dtype) - flat if dtype != str(flat.dtype).removeprefix("torch.") else None
    out.error[name] = (
        0.0 if difference is None else float(torch.linalg.vector_norm(difference.float())) ** 2,
        float(torch.linalg.vector_norm(flat.float())) ** 2,
    )
    out.shapes[name] = tuple(rows.shape[1:])
    out.columns[name] = stored.cpu().reshape(rows.shape).contiguous()
    if scale is not None:
        out.columns[scale_name(name)] = scale.cpu()
    out.statistics[name] = Statistics.of(again.cpu(), tokens)


def quantise(x: Float[Tensor, "n d"]) -> tuple[Int8[Tensor, "n d"], Float[Tensor, " n"]]:
    """Whole numbers from -127 to 127 and the scale of each row."""
    q, scale = x.new_empty(x.shape, dtype=torch.int8), torch.ones(len(x), dtype=torch.float32, device=x.device)
    n_rows = max(1, BLOCK_NUMBERS // max(1, x.shape[1])) if x.device.type == "cpu" else max(1, len(x))
    for start in range(0, len(x) if x.shape[1] else 0, n_rows):  # in the processor's cache: 4 times as fast
        rows = slice(start, start + n_rows)
        block = x[rows].to(torch.float32, copy=True)
        step = block.abs().amax(dim=1) / 127
        scale[rows] = torch.where(step > 0, step, 1.0)
        q[rows] = block.div_(scale[rows, None]).round_().clamp_(-127, 127)
    return q, scale


def dequantise(q: Int8[Tensor, "n *shape"], scale: Float[Tensor, " n"]) -> Float[Tensor, "n *shape"]:
    """Float32 values; the inverse of `quantise` up to half a scale."""
    return q.float() * scale.view(-1, *[1] * (q.ndim - 1))


def _check_finite(name: str, flat: Tensor, again: Tensor, dtype: str, tokens: Tokens) -> None:
    ends = [float(end) for values in (again, flat) for end in torch.aminmax(values)]
    if all(map(math.isfinite, ends)):
        return
    good = (torch.isfinite(again) & torch.isfinite(flat)).all(dim=1)
    at = int((~good).nonzero()[0])
    row, pos, ids = tokens
    where = f"row {int(row[at])}, position {int(pos[at])}" + ("" if ids is None else f", token id {int(ids[at])}")
    if bool(torch.isfinite(flat[at]).all()):
        most = float(flat[at].abs().max())
        raise InterpError(f"{name} does not fit {dtype}: {most:.4g} at {where}; store it as bfloat16 or float32")
    raise InterpError(f"{name} is not finite at {where}; find its cause with the model in float32")
