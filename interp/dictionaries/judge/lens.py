"""Which next tokens does a direction in the stream promote? Logit lens: (d * g) W_U, g the gain of the final norm.

The gain is measured, not read: families store it as w or as 1 + w. With x alternating between +1 and -1 (mean 0, root
mean square 1) a norm gives g x + b, so g = x (norm(x) - norm(-x)) / 2. Layer norms also remove the mean of d.
Source: nostalgebraist 2020, interpreting GPT: the logit lens. Beware: the scale of the norm is left out, which does
not change which tokens come first; what later layers do with the direction is left out too.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.models.model import LoadedModel

TOP = 10


@torch.no_grad()
def lens_logits(model: LoadedModel, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d_vocab"] | None:
    """Logits of directions, up to the scale of the norm; None without an unembedding and a final norm of this width."""
    try:
        W_U = model.weight("W_U")
        norm = model.module.get_submodule(model.table.reach(Site(Part.FINAL_NORM)).path)
    except (InterpError, AttributeError):
        return None
    d = rows.shape[1]
    if W_U.shape[0] != d or d % 2:
        return None
    x = torch.ones(1, d, device=W_U.device, dtype=W_U.dtype)
    centres = torch.allclose(norm(x), norm(-x))
    x[:, ::2] = -1.0
    gain = x * (norm(x) - norm(-x)) / 2
    wide = rows.to(W_U)
    if centres:
        wide = wide - wide.mean(1, keepdim=True)
    return ((wide * gain) @ W_U).float()


@torch.no_grad()
def promoted_tokens(
    model: LoadedModel, rows: Float[Tensor, "n d"], *, k: int = TOP, block: int = 256
) -> Int[Tensor, "n k"] | None:
    """The k tokens that each direction promotes most; None where there is no lens."""
    parts: list[Tensor] = []
    for some in rows.split(block):
        logits = lens_logits(model, some)
        if logits is None:
            return None
        parts.append(logits.topk(min(k, logits.shape[1])).indices.cpu())
    return torch.cat(parts) if parts else None
