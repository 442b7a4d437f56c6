"""Top-k encode: the k largest pre-activations of z = x @ W_enc + b_enc, for each token.

The selection is exact: what `torch.topk` finds in the whole row, unsorted. Ties are broken as the path at hand breaks
them, so tests compare values, not indices. Selected pre-activations may be negative; the ReLU comes after, in
`interp.kernels.sparse_autograd`, and so does the gradient: what is returned here is a constant.

Paths: `topk_encode_eager` is the specification, 2*B*d*m FLOP in the inputs' own precision and B*m numbers written and
read once. On a CPU with bfloat16 instructions, `interp.kernels.certified` selects float32 inputs by certified
bounds. On a GPU `interp.kernels.fused_encode` never writes them, if asked for. Under `torch.compile` all are one
opaque operator, without a buffer.
`buffer` keeps memory between calls: a `Workspace`, or a plain tensor for the dense pre-activations, which then are all
written there. Freshly allocated memory has to be paged in, at a fraction of the speed of a copy.
"""

import torch
from interp.kernels.certified import certified_topk, suits
from interp.kernels.dispatch import one_type, plain
from interp.kernels.fused_encode import fused_topk, suits_fused
from interp.kernels.workspace import Workspace
from torch import Tensor
from torch.library import custom_op


def preactivations(x: Tensor, W_enc: Tensor, b_enc: Tensor, buffer: Tensor | Workspace | None = None) -> Tensor:
    """z = x @ W_enc + b_enc, [batch, d_dict], written into the first rows of `buffer` where it fits."""
    x, W_enc, b_enc = one_type(x, W_enc, b_enc)
    shape = (x.shape[0], W_enc.shape[1])
    if buffer is None:
        with plain(x.device):
            return torch.addmm(b_enc, x, W_enc)
    if isinstance(buffer, Workspace):
        buffer = buffer.take("dense", *shape, x.dtype, x.device)
    if buffer.shape[0] < shape[0] or buffer.shape[1:] != shape[1:] or buffer.dtype != x.dtype:
        raise ValueError(f"buffer {tuple(buffer.shape)} {buffer.dtype} does not hold {shape} {x.dtype}")
    return torch.addmm(b_enc, x, W_enc, out=buffer[: shape[0]])


def check_k(k: int, W_enc: Tensor) -> None:
    if not 1 <= k <= W_enc.shape[1]:
        raise ValueError(f"k={k} is not in 1..d_dict={W_enc.shape[1]}")


def topk_encode_eager(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, buffer: Tensor | Workspace | None = None
) -> tuple[Tensor, Tensor]:
    """The specification: every pre-activation, then `torch.topk`."""
    check_k(k, W_enc)
    z = preactivations(x, W_enc, b_enc, buffer)
    if k == z.shape[1]:  # nothing to select; topk would sort for nothing
        return z.clone(), torch.arange(k, device=z.device).expand(z.shape[0], k).contiguous()
    values, indices = z.topk(k, dim=-1, sorted=False)
    return values, indices


@torch.no_grad()
def topk_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, buffer: Tensor | Workspace | None = None
) -> tuple[Tensor, Tensor]:
    """x [batch, d_in], W_enc [d_in, d_dict], b_enc [d_dict] -> pre-activations and indices, both [batch, k]."""
    check_k(k, W_enc)
    if torch.compiler.is_compiling():
        return topk_encode_op(*one_type(x, W_enc, b_enc), k)
    x, W_enc, b_enc = one_type(x, W_enc, b_enc)
    if not isinstance(buffer, Tensor):
        workspace = buffer or Workspace()
        if suits(x, W_enc, b_enc, k, workspace):
            with plain(x.device):
                return certified_topk(x, W_enc, b_enc, k, workspace)
        if suits_fused(x, W_enc, b_enc, k, workspace):
            return fused_topk(x, W_enc, b_enc, k, workspace)
        workspace.counters.plain += x.shape[0]
    return topk_encode_eager(x, W_enc, b_enc, k, buffer)


@custom_op("interp::topk_encode", mutates_args=())
def topk_encode_op(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return topk_encode(x, W_enc, b_enc, k)


@topk_encode_op.register_fake
def _(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k), x.new_empty(x.shape[0], k, dtype=torch.int64)
