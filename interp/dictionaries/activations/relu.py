"""ReLU: f = max(z, 0), made sparse by a penalty on the sum of activations.

Paper: T. Bricken et al., Towards monosemanticity, 2023, https://transformer-circuits.pub/2023/monosemantic-features.
Beware: the L1 penalty shrinks every activation, and a low FVU at a small weight is not feature recovery.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from interp.dictionaries.activations.base import Activation, Inputs, Selected


class ReLU(Activation):
    """f = max(z, 0)."""

    kind = "relu"
    dense = True

    def active(self, inputs: Inputs) -> Selected:
        return inputs.above(0.0)

    def values(self, z: Float[Tensor, "batch d_dict"], b_enc: Float[Tensor, "d_dict"]) -> Float[Tensor, "batch d_dict"]:
        return z.relu()

    def homogeneous(self) -> bool:
        return True
