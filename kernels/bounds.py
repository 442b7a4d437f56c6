"""Rigorous upper bounds on pre-activations, for the price of one bfloat16 product.

With x~, w~ the bfloat16 roundings of a row x and a column w of the encoder, Cauchy-Schwarz gives
    z = x.w + b = x~.w~ + (x - x~).w + x~.(w - w~) + b  <=  x~.w~ + |x - x~| |w| + |x~| |w - w~| + b,
with the norms of the errors actually made. The bound is itself a product, of rows with four coordinates more:
    x' = [x~, |x - x~| + g |x~|, |x~|, 1, 1]        w' = [w~, |w|, |w - w~|, b_high, b_low]
where b = b_high + b_low, every added number is rounded up, and g covers the rounding of float32 sums of the product's
length in any order. The product is stored in bfloat16, and rounding to nearest is monotone: for t in bfloat16,
    stored < t  implies  bound < t  implies  z < t.
So whoever is not above t in the stored product is below t in exact arithmetic; no width of a margin is guessed.

Source: error analysis of sums and products, N. Higham, Accuracy and Stability of Numerical Algorithms, 2002, ch. 3.
"""

import torch
from interp.kernels.workspace import Lowered, Workspace
from torch import Tensor

EXTRA = 4
"""Coordinates that the bound adds to the product."""
PAD = 64
"""Latents are padded to a multiple of this, with bounds that nothing selects."""
ROWS_AT_ONCE = 512
"""Rows of the encoder per block while it is lowered: their float32 errors stay in the cache."""
HUGE, TINY = 1e5, 1e-28
"""Norms that reach HUGE are not certified: below it nothing overflows, and flushed subnormals add up to under TINY."""


def gamma(length: int) -> float:
    """Relative error of a float32 sum of `length` products in any order, with slack for the norms' own rounding."""
    return 1.01 * (length + 16) * 2.0**-24


def rounded_up(values: Tensor) -> Tensor:
    """bfloat16 numbers that are not below `values`: half a unit in the last place is at most 2^-8 of the value."""
    return (values + values.abs() * 2.0**-7).bfloat16()


def _identity(tensor: Tensor) -> tuple[float, ...]:
    if tensor.numel() == 1:
        return (float(tensor),)
    return (tensor.data_ptr(), tensor._version, *tensor.shape, *tensor.stride())


def lower_encoder(W_enc: Tensor, b_enc: Tensor, workspace: Workspace, theta: Tensor | None = None) -> Lowered:
    """w' of every latent, and the figures that a threshold is guessed from; bounds are on z - theta where given."""
    key = (*_identity(W_enc), *_identity(b_enc), *(() if theta is None else _identity(theta)))
    cached = workspace.cached(key)
    if cached is not None:
        return cached
    if theta is not None:
        b_enc = b_enc - theta
    d, m = W_enc.shape
    width, length = -(-m // PAD) * PAD, -(-(d + EXTRA) // 8) * 8
    rows = workspace.take("encoder", width, length, torch.bfloat16, "cpu")
    norms, errors = torch.empty(m), torch.empty(m)
    block = workspace.take("errors", ROWS_AT_ONCE, d, torch.float32, "cpu")
    for start in range(0, m, ROWS_AT_ONCE):
        stop = min(start + ROWS_AT_ONCE, m)
        exact, rounded, error = W_enc[:, start:stop].t(), rows[start:stop, :d], block[: stop - start]
        rounded.copy_(exact)
        error.copy_(rounded).sub_(exact)
        torch.linalg.vector_norm(exact, dim=1, out=norms[start:stop])
        torch.linalg.vector_norm(error, dim=1, out=errors[start:stop])
    slack = 1 + gamma(d)
    high = b_enc.bfloat16()
    rows[:, d:].zero_()
    rows[:m, d] = rounded_up(norms * slack)
    rows[:m, d + 1] = rounded_up(errors * slack)
    rows[:m, d + 2] = high
    rows[:m, d + 3] = rounded_up(b_enc - high + 2 * gamma(length) * b_enc.abs() + TINY)
    rows[m:].zero_()
    rows[m:, d + 2] = -1e38
    lowered = Lowered(
        rows=rows,
        norm=float(norms.mean()),
        rounding=float(errors.mean()),
        largest_norm=float(norms.max()),
        largest_bias=float(b_enc.abs().max()),
    )
    workspace.keep(key, lowered)
    return lowered


def upper_bounds(x: Tensor, lowered: Lowered, workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Bounds [batch, padded m] in bfloat16; per row, the typical width of the bound and the error of an exact float32
    product. Rows where the argument does not hold have an infinite error."""
    batch, d = x.shape
    width, length = lowered.rows.shape
    rounded = workspace.take("x", batch, length, torch.bfloat16, "cpu")
    rounded[:, :d].copy_(x)
    error = rounded[:, :d].float()
    norm = torch.linalg.vector_norm(error, dim=1) * (1 + gamma(d))
    error = torch.linalg.vector_norm(error.sub_(x), dim=1) * (1 + gamma(d))
    # float32 sums are off by at most gamma * (|x~| |w~| + the added terms), and |w~| <= (1 + 2^-8) |w|
    rounded[:, d:].zero_()
    rounded[:, d] = rounded_up(error + 3 * gamma(length) * (norm + error))
    rounded[:, d + 1] = rounded_up(norm)
    rounded[:, d + 2 : d + 4] = 1.0
    bounds = workspace.take("bounds", batch, width, torch.bfloat16, "cpu")
    torch.mm(rounded, lowered.rows.t(), out=bounds)
    typical = error * lowered.norm + norm * lowered.rounding
    exact = gamma(length) * ((norm + error) * lowered.largest_norm + lowered.largest_bias)
    if not lowered.largest_norm < HUGE:  # also where it is not a number
        return bounds, typical, torch.full_like(exact, torch.inf)
    return bounds, typical, torch.where((norm < HUGE) & (exact < HUGE), exact, torch.inf)
