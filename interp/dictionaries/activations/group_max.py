"""Group-max: the latents are cut into k consecutive groups, and the largest of each group may fire.

k latents per token as in top-k, without a global selection: cheaper, and every group is used at every token.
Source: the `groupmax` activation of EleutherAI's sparsify, https://github.com/EleutherAI/sparsify.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from interp.core.errors import InterpError
from interp.dictionaries.activations.base import Activation, Inputs, Selected


class GroupMax(Activation):
    """One latent in each of k groups of d_dict / k."""

    kind = "group_max"

    def __init__(self, k: int) -> None:
        super().__init__()
        if k < 1:
            raise InterpError(f"k={k} must be at least 1")
        self.k = k

    def active(self, inputs: Inputs) -> Selected:
        if inputs.d_dict % self.k:
            raise InterpError(f"d_dict={inputs.d_dict} is not a multiple of k={self.k}, the number of groups")
        return inputs.group_max(self.k)

    def settings(self) -> Mapping[str, Any]:
        return {"k": self.k}
