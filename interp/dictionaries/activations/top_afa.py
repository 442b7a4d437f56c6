"""top-AFA: as many latents per token as make the norm of the code meet the norm of the input.

    s_i = (relu(z_i) |d_i|)^2, sorted downwards ;  k* = argmin_n | sqrt(s_1 + ... + s_n) - |u| | ;  keep the k* largest
Nearly orthogonal features would make the two norms equal ("approximate feature activation"), hence no k to choose.
Paper: S. Lee et al., Evaluating and designing sparse autoencoders by approximating quasi-orthogonality, 2025,
https://arxiv.org/abs/2503.24277. Beware: k* is often above a thousand; compare with top-k at the same L0.
"""

from __future__ import annotations

import torch

from interp.dictionaries.activations.base import Activation, Inputs, Selected


class TopAFA(Activation):
    """k chosen for each token."""

    kind = "top_afa"

    @torch.no_grad()
    def active(self, inputs: Inputs) -> Selected:
        z = inputs.z()
        sizes = (z.relu() * inputs.W_dec.norm(dim=1)).square()
        largest, order = sizes.sort(dim=-1, descending=True)
        gap = (largest.cumsum(-1).sqrt() - inputs.u.norm(dim=-1, keepdim=True)).abs()
        n_kept = gap.argmin(-1, keepdim=True) + 1
        slots = int(n_kept.max()) if len(z) else 0
        order = order[:, :slots].contiguous()
        kept = torch.arange(slots, device=z.device) < n_kept
        return torch.where(kept, z.gather(1, order), 0), order
