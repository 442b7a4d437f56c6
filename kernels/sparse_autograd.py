"""The differentiable pieces of a sparse dictionary, with gradients through the active latents only.

`sparse_preactivations`: z[b, j] = x[b] . W_enc[:, i] + b_enc[i] at i = indices[b, j], whose value is known already.
`sparse_encode`: relu of it.
`sparse_decode`: x_hat[b] = sum_j values[b, j] W_dec[indices[b, j]].

Every output carries its gradient: values, pre-activations (for penalties and for auxiliary losses), reconstructions.
Gradients reach only the selected latents, and of those only the ones that the ReLU left positive: a selected slot whose
value is zero sends nothing back, as in the dense reference. (EleutherAI's fused encoder lets it through, and drops the
gradient of its pre-activations; both are easy to write and invisible in the loss.)
Indices are constants: the selection itself has no gradient. Derivatives of higher order are those of the dense
formula at fixed indices. Both gradients with d_dict rows sum over the same slots: `latent_segments`, made once and
passed to both calls, spares the second sort.
"""

from interp.kernels.ops import by_latent_op, decode_op, preactivations_op
from interp.kernels.segments import Segments
from torch import Tensor


def latent_segments(indices: Tensor, d_dict: int) -> Segments:
    """The slots of indices [batch, k] in order of their latents."""
    return Segments(*by_latent_op(indices, d_dict))


def sparse_decode(values: Tensor, indices: Tensor, W_dec: Tensor, segments: Segments | None = None) -> Tensor:
    """x_hat[b] = sum_j values[b, j] * W_dec[indices[b, j]]; differentiable in values and W_dec."""
    return decode_op(values, indices, W_dec, *(segments or (None, None)))


def sparse_preactivations(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, selected: Tensor, indices: Tensor, segments: Segments | None = None
) -> Tensor:
    """`selected`, x's pre-activations at `indices`, as a function of x, W_enc and b_enc.

    W_enc is cheapest stored column by column (`W_enc.t()` contiguous): its gradient comes that way.
    """
    return preactivations_op(x, W_enc, b_enc, selected.detach(), indices, *(segments or (None, None)))


def sparse_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, selected: Tensor, indices: Tensor, segments: Segments | None = None
) -> Tensor:
    """relu(selected), where `selected` are x's pre-activations at `indices`; differentiable in x, W_enc and b_enc."""
    return sparse_preactivations(x, W_enc, b_enc, selected, indices, segments).relu()
