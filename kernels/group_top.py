"""The t largest pre-activations of every group of consecutive latents, without writing the pre-activations.

z = x @ W_enc + b_enc is formed tile by tile; before a tile leaves the registers, each group of `group` latents in it is
reduced to its t largest values and their places. t * m / group values and as many bytes leave the chip instead of m
values: with t = 3 and groups of 64, a twelfth of what bfloat16 pre-activations would cost.

    kept[b, s, g]    the s-th largest of group g, float32, s < t
    places[b, s, g]  where in the group it was, uint8
A group with a NaN has NaN as its last kept value, so that whoever compares with it finds the row unfit. Groups that
overlap the end of the dictionary are filled up with -inf.

Cost: 2*B*d*m FLOP, sums in float32, and t passes over each tile in registers. Float32 inputs are multiplied as
float32 (no TF32), so the result is that of the specification up to the order of sums.
"""

import torch
from interp.kernels.dispatch import HAS_TRITON
from torch import Tensor

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _store_top(
        z, rows, there, first_group, kept, places, n_groups,
        BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr,
    ):  # fmt: skip
        """z [BM, BN]: the top T of each GROUP columns."""
        inside: tl.constexpr = BN // GROUP
        grouped = tl.reshape(z, (BM, inside, GROUP))
        bad = tl.sum((grouped != grouped).to(tl.int32), axis=2) > 0
        groups = first_group + tl.arange(0, inside)
        ok = there[:, None] & (groups[None, :] < n_groups)
        place = tl.arange(0, GROUP)
        for s in tl.static_range(T):
            best, at = tl.max(grouped, axis=2, return_indices=True)
            if s == T - 1:
                best = tl.where(bad, float("nan"), best)
            target = (rows[:, None] * T + s) * n_groups + groups[None, :]
            tl.store(kept + target, best, mask=ok)
            tl.store(places + target, at.to(tl.uint8), mask=ok)
            grouped = tl.where(place[None, None, :] == at[:, :, None], float("-inf"), grouped)

    @triton.jit
    def _encode_kernel(
        x, W, b, kept, places, dense,
        batch, d, m, n_groups,
        stride_xb, stride_xd, stride_wd, stride_wm, stride_b,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr,
        EVEN: tl.constexpr, WIDEN: tl.constexpr, BAND: tl.constexpr,
    ):  # fmt: skip
        """One [BM, BN] tile of z. T = 0 stores it whole, in `dense`."""
        # bands of BAND tiles of rows share the tiles of W while they are in the second-level cache
        tiles_m, tiles_n = tl.cdiv(batch, BM), tl.cdiv(m, BN)
        program = tl.program_id(0)
        band = program // (BAND * tiles_n)
        height = tl.minimum(tiles_m - band * BAND, BAND)
        within = program % (BAND * tiles_n)
        tile_m, tile_n = band * BAND + within % height, within // height
        rows = (tile_m * BM + tl.arange(0, BM)).to(tl.int64)
        columns = (tile_n * BN + tl.arange(0, BN)).to(tl.int64)
        there, inside = rows < batch, columns < m
        # past the end, tiles read row or column 0 again instead of a mask in the loop; nothing of it is stored
        x_rows, w_columns = tl.where(there, rows, 0), tl.where(inside, columns, 0)
        steps = tl.arange(0, BK)
        x_at = x + x_rows[:, None] * stride_xb + steps[None, :] * stride_xd
        w_at = W + steps[:, None] * stride_wd + w_columns[None, :] * stride_wm
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for start in range(0, d, BK):
            if EVEN:
                left, right = tl.load(x_at), tl.load(w_at)
            else:
                left = tl.load(x_at, mask=(start + steps)[None, :] < d, other=0.0)
                right = tl.load(w_at, mask=(start + steps)[:, None] < d, other=0.0)
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision="ieee")
            x_at += BK * stride_xd
            w_at += BK * stride_wd
        bias = tl.load(b + columns * stride_b, mask=inside, other=0.0).to(tl.float32)
        z = tl.where(inside[None, :], total + bias[None, :], float("-inf"))
        if T == 0:
            tl.store(dense + rows[:, None] * m + columns[None, :], z, mask=there[:, None] & inside[None, :])
        else:
            _store_top(z, rows, there, tile_n * (BN // GROUP), kept, places, n_groups, BM, BN, GROUP, T)

    @triton.jit
    def _select_kernel(
        z, kept, places,
        batch, m, n_groups, stride_zb, stride_zm,
        BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, T: tl.constexpr,
    ):  # fmt: skip
        """The same of pre-activations that are there already: one pass over them."""
        rows = (tl.program_id(0) * BM + tl.arange(0, BM)).to(tl.int64)
        columns = (tl.program_id(1) * BN + tl.arange(0, BN)).to(tl.int64)
        there, inside = rows < batch, columns < m
        tile = tl.load(
            z + rows[:, None] * stride_zb + columns[None, :] * stride_zm,
            mask=there[:, None] & inside[None, :], other=float("-inf"),
        ).to(tl.float32)  # fmt: skip
        _store_top(tile, rows, there, tl.program_id(1) * (BN // GROUP), kept, places, n_groups, BM, BN, GROUP, T)


TILES = {
    torch.float32: {"BM": 64, "BN": 64, "BK": 32, "num_warps": 4, "num_stages": 2},
    torch.bfloat16: {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
    torch.float16: {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 3},
}
"""Sizes of the tiles. Chosen by the registers and shared memory that the compiler reports, not tuned on a device."""


def group_top_eager(z: Tensor, t: int, group: int) -> tuple[Tensor, Tensor]:
    """The specification, of pre-activations [batch, m]: kept and places, both [batch, t, ceil(m / group)]."""
    n_groups = -(-z.shape[1] // group)
    filled = z.new_full((z.shape[0], n_groups * group), -torch.inf, dtype=torch.float32)
    filled[:, : z.shape[1]] = z
    grouped = filled.view(z.shape[0], n_groups, group)
    top = grouped.topk(t, dim=2)
    kept = top.values.transpose(1, 2).contiguous()
    kept[:, -1][grouped.isnan().any(2)] = torch.nan
    return kept, top.indices.transpose(1, 2).to(torch.uint8).contiguous()


def interpreted(kernel: object) -> bool:
    """Whether TRITON_INTERPRET runs it; the interpreter's product takes bfloat16 for integers (triton 3.9)."""
    return not isinstance(kernel, triton.runtime.JITFunction)


def _launch(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, kept: Tensor, places: Tensor, dense: Tensor, t: int, group: int,
    tile: dict[str, int] | None,
) -> None:  # fmt: skip
    (batch, d), m = x.shape, W_enc.shape[1]
    sizes = tile or TILES[x.dtype]
    grid = (triton.cdiv(batch, sizes["BM"]) * triton.cdiv(m, sizes["BN"]),)
    _encode_kernel[grid](
        x, W_enc, b_enc, kept, places, dense, batch, d, m, kept.shape[2],
        *x.stride(), *W_enc.stride(), *b_enc.stride(),
        GROUP=group, T=t, EVEN=d % sizes["BK"] == 0, WIDEN=interpreted(_encode_kernel), BAND=8, **sizes,
    )  # fmt: skip


def group_top_triton(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, t: int, group: int, tile: dict[str, int] | None = None
) -> tuple[Tensor, Tensor]:
    """kept and places of z = x @ W_enc + b_enc, [batch, t, ceil(m / group)]; x and W_enc of one type."""
    shape = (x.shape[0], t, -(-W_enc.shape[1] // group))
    kept = torch.empty(shape, dtype=torch.float32, device=x.device)
    places = torch.empty(shape, dtype=torch.uint8, device=x.device)
    if kept.numel():
        _launch(x, W_enc, b_enc, kept, places, kept, t, group, tile)
    return kept, places


def dense_triton(x: Tensor, W_enc: Tensor, b_enc: Tensor, tile: dict[str, int] | None = None) -> Tensor:
    """z itself in float32, summed in the same order as in `group_top_triton`: for the rows that it left open."""
    z = torch.empty(x.shape[0], W_enc.shape[1], dtype=torch.float32, device=x.device)
    if z.numel():
        _launch(x, W_enc, b_enc, z[:, None], z, z, 0, 1, tile)
    return z


def select_triton(z: Tensor, t: int, group: int) -> tuple[Tensor, Tensor]:
    """kept and places of pre-activations that are there already."""
    batch, m = z.shape
    shape = (batch, t, -(-m // group))
    kept = torch.empty(shape, dtype=torch.float32, device=z.device)
    places = torch.empty(shape, dtype=torch.uint8, device=z.device)
    if kept.numel():
        rows, columns = 8, max(256, group)
        _select_kernel[(triton.cdiv(batch, rows), triton.cdiv(m, columns))](
            z, kept, places, batch, m, shape[2], *z.stride(), BM=rows, BN=columns, GROUP=group, T=t
        )
    return kept, places
