"""Exact top-k on a CPU without the float32 product: candidates by bfloat16 upper bounds, rescored exactly.

For each row, with U[j] >= z[j] the bounds of `interp.kernels.bounds`:
    1. guess a threshold t: the k-th largest maximum over groups of U, less the typical width of the bound;
    2. candidates are all j with U[j] >= t; compute their z[j] exactly, in float32;
    3. the k largest of them are certified if the smallest, L, satisfies L - e >= t (e: error of float32 sums):
       every other j has z[j] <= U[j] < t <= L - e.
A row that fails is done again with t = L - e, where the same argument holds by construction; a row that then still has
no k candidates, or too many, is done densely. So the result is exact top-k or comes from the dense product.
"Exact" is what float32 can say: two latents closer than the rounding of a float32 sum may change places, as they may
between two float32 products. A returned value depends on its own row and latent alone, whichever path found it.

Cost per row: 2*d*m bfloat16 FLOP, m stored bounds written once and read twice, and one dot product a candidate.
A few candidates more than k suffice because U is off by about 0.3 % of |x| |w|, and only the tail within that is kept.
Trap: comparisons are done on bfloat16 bits as int16, whose order is that of positive numbers only; a row whose
threshold is not positive goes the dense way.
"""

import functools

import torch
from interp.kernels.bounds import lower_encoder, upper_bounds
from interp.kernels.sampled import sampled_product
from interp.kernels.workspace import Lowered, Workspace
from torch import Tensor
from torch.nn import functional as F

CHUNK_BYTES = 2**25
"""Bounds are made for as many rows as fill this."""
GROUPS_PER_K = 4
"""Groups whose maxima give the threshold, per active latent."""
MOST_CANDIDATES = 24
"""A row with more candidates than this per active latent, and 64 on top, is done densely."""
WORTH, FEWEST_ROWS = 2**28, 96
"""Products batch * d_in * d_dict, and rows, from which the fast path pays: lowering the encoder is paid once a call."""


@functools.cache
def fast_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 natively, in torch's own words."""
    found = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def suits(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, workspace: Workspace) -> bool:
    """Whether to take the fast path: same answer for the same shapes on the same machine."""
    tensors = (x, W_enc, b_enc)
    able = all(t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors) and x.shape[0] > 0
    if not able or workspace.fast is False or W_enc.shape[1] < 2 * GROUPS_PER_K * k or x.shape[1] == 0:
        return False
    if workspace.fast is True:
        return True
    rows = x.shape[0]
    return rows * W_enc.numel() >= WORTH and (rows >= FEWEST_ROWS or workspace.frozen) and fast_bfloat16()


def guess(bounds: Tensor, k: int) -> Tensor:
    """Per row, a number that at least k bounds reach: the k-th largest maximum over strided groups."""
    batch, width = bounds.shape
    n_groups = GROUPS_PER_K * k
    size = width // n_groups
    maxima = bounds.view(torch.int16)[:, : size * n_groups].view(batch, size, n_groups).amax(1)
    return maxima.float().topk(k, sorted=False).values.amin(1).to(torch.int16).view(torch.bfloat16)


def candidates(
    bounds: Tensor, threshold: Tensor, limit: int, workspace: Workspace, *, whole: bool = False
) -> tuple[Tensor, Tensor] | None:
    """CSR of all (row, latent) with bounds >= threshold, threshold bfloat16 and positive; rows over `limit` are left
    empty, unless `whole` is asked for. None if there are more than `limit` a row on average."""
    batch, width = bounds.shape
    mask = workspace.take("mask", batch, width, torch.bool, "cpu")
    torch.ge(bounds.view(torch.int16), threshold.view(torch.int16)[:, None], out=mask)
    words = mask.view(-1).view(torch.int64)  # eight at a time: nearly all are zero
    hits = words.nonzero().view(-1)
    if hits.numel() > limit * batch:
        return None
    inside = words[hits].view(torch.bool).view(-1, 8).nonzero()
    flat = hits[inside[:, 0]] * 8 + inside[:, 1]
    rows = flat // width
    counts = torch.bincount(rows, minlength=batch)
    if not whole and int(counts.max()) > limit:
        flat = flat[(counts <= limit)[rows]]
        counts = torch.where(counts <= limit, counts, 0)
    starts = F.pad(counts.cumsum(0), (1, 0))
    return starts, flat % width


def best(values: Tensor, columns: Tensor, starts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row of a CSR matrix, unsorted; -inf and index 0 where a row has fewer."""
    counts = starts.diff()
    batch, most = len(counts), max(int(counts.max()), k)
    rows = torch.repeat_interleave(torch.arange(batch), counts, output_size=len(values))
    padded = values.new_full((batch * most,), -torch.inf)
    padded[torch.arange(len(values)) + (torch.arange(batch) * most - starts[:-1])[rows]] = values
    top = padded.view(batch, most).topk(k, sorted=False)
    source = (top.indices + starts[:-1, None]).clamp_(max=max(len(columns) - 1, 0))
    found = columns[source] if len(columns) else torch.zeros_like(source)
    return top.values, found.where(top.values > -torch.inf, 0)


def attempt(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, bounds: Tensor, threshold: Tensor, workspace: Workspace
) -> tuple[Tensor, Tensor, int] | None:
    """The k best candidates of each row at this threshold, and how many were rescored."""
    limit = MOST_CANDIDATES * k + 64
    found = candidates(bounds, threshold, limit, workspace)
    if found is None:
        return None
    starts, columns = found
    exact = sampled_product(x, W_enc.t(), starts, columns).add_(b_enc[columns])
    return *best(exact, columns, starts, k), len(columns)


def certified_rows(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, lowered: Lowered, workspace: Workspace
) -> tuple[Tensor, Tensor, Tensor]:
    """Values and indices [batch, k] of one chunk, and which rows are certified."""
    bounds, typical, error = upper_bounds(x, lowered, workspace)
    start = guess(bounds, k).float()
    threshold = (start - 1.1 * typical - 2.0**-8 * start.abs()).bfloat16()
    threshold = torch.where(threshold > 0, threshold, torch.inf)
    found = attempt(x, W_enc, b_enc, k, bounds, threshold, workspace)
    if found is None:
        nothing = torch.zeros(len(x), k)
        return nothing, nothing.long(), torch.zeros(len(x), dtype=torch.bool)
    values, indices, rescored = found
    certain = values.amin(1) - 2 * error
    sure = certain >= threshold
    workspace.counters.candidates += rescored
    again = (~sure & (certain > 0)).nonzero().view(-1)
    if len(again):
        # rounding down, so that a bound below the threshold is below `certain`
        lower = (certain[again] * (1 - 2.0**-7)).bfloat16()
        second = attempt(x[again], W_enc, b_enc, k, bounds[again], lower, workspace)
        if second is not None:
            better = second[0].amin(1) - 2 * error[again] >= lower
            values[again], indices[again], sure[again] = second[0], second[1], better
            workspace.counters.lowered += int(better.sum())
            workspace.counters.candidates += second[2]
    return values, indices, sure


def dense_rows(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """The plain way, with values as the fast path computes them."""
    z = workspace.take("dense", len(x), W_enc.shape[1], torch.float32, "cpu")
    top = torch.addmm(b_enc, x, W_enc, out=z).topk(k, dim=-1, sorted=False)
    starts = torch.arange(0, len(x) * k + 1, k)
    exact = sampled_product(x, W_enc.t(), starts, top.indices.view(-1)).add_(b_enc[top.indices.view(-1)])
    return exact.view(len(x), k), top.indices


def certified_topk(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, workspace: Workspace) -> tuple[Tensor, Tensor]:
    """Exact top-k of x @ W_enc + b_enc, values and indices [batch, k], by bounds; the caller asked `suits`."""
    lowered = lower_encoder(W_enc, b_enc, workspace)
    batch = x.shape[0]
    step = max(1, CHUNK_BYTES // (2 * lowered.rows.shape[0]))
    step = -(-batch // -(-batch // step))  # chunks of equal size
    values, indices = torch.empty(batch, k), torch.empty(batch, k, dtype=torch.long)
    for start in range(0, batch, step):
        rows = slice(start, min(start + step, batch))
        values[rows], indices[rows], sure = certified_rows(x[rows], W_enc, b_enc, k, lowered, workspace)
        left = (~sure).nonzero().view(-1)
        workspace.counters.dense += len(left)
        if len(left):
            values[start + left], indices[start + left] = dense_rows(x[start + left], W_enc, b_enc, k, workspace)
    workspace.counters.fast += batch
    return values, indices
