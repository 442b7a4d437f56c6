"""Logit lens of a decoder row: which next tokens does a latent promote, if nothing after it acts?

    logits_i = P(d_i) @ (gamma * W_U),   then minus their mean over the vocabulary

gamma is the weight of the final norm, P takes out the mean where that norm does (LayerNorm), and the norm's division
is left out: the numbers are right up to one positive factor per token. The vocabulary mean is taken out because a
shift of all logits changes no probability. Rows of neuron space go through W_down first, those of head outputs through
W_O. Source: nostalgebraist, interpreting GPT: the logit lens, 2020,
https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru ; folding as in SAEDashboard.
Trap: far from the end the layers in between do act on what the latent writes; then this is a weak guess, and said so.
Trap: some norms (Gemma's) keep 1 + weight. gamma is therefore measured at the module, not read from a parameter.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.dictionaries.pages.values import Histogram
from interp.models.model import LoadedModel

FAR = 5
"""Below layer n_layers - 5 the lens is called unreliable."""
COLUMNS = 8192
"""Tokens of the vocabulary at once: W_U is never copied whole."""
STREAM = (
    Part.EMBED, Part.RESID_PRE, Part.RESID_MID, Part.RESID_POST, Part.ATTN_OUT, Part.MLP_OUT, Part.ROUTED_OUT,
    Part.SHARED_OUT,
)  # fmt: skip
"""Parts that are the residual stream or are added to it."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Logits:
    """The lens of a few latents."""

    values: Float[Tensor, "n d_vocab"]
    """On the cpu, with the mean over the vocabulary taken out."""

    def ends(self, n: int) -> tuple[Int[np.ndarray, "n listed"], Int[np.ndarray, "n listed"]]:
        """Ids of the largest (falling) and the smallest (rising) logits."""
        n = min(n, self.values.shape[1])
        return self.values.topk(n).indices.numpy(), self.values.topk(n, largest=False).indices.numpy()

    def shape(self) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """Skewness and excess kurtosis over the vocabulary (population moments); 0 where nothing varies."""
        wide = self.values.double()
        wide = wide - wide.mean(1, keepdim=True)
        variance = wide.square().mean(1)
        safe = torch.where(variance > 0, variance, 1.0)
        skew = torch.where(variance > 0, wide.pow(3).mean(1) / safe**1.5, 0.0)
        kurtosis = torch.where(variance > 0, wide.pow(4).mean(1) / safe**2 - 3, 0.0)
        return skew.numpy(), kurtosis.numpy()

    def histogram(self, i: int, n_bins: int) -> Histogram:
        counts, edges = np.histogram(self.values[i].double().numpy(), bins=n_bins)
        return Histogram(edges=tuple(edges.tolist()), counts=tuple(counts.tolist()))


class Lens:
    """The way from a site's space to the logits; `Lens.of` says None and why where there is none."""

    def __init__(self, model: LoadedModel, site: Site) -> None:
        self.unembed = model.weight("W_U")
        self.through = _to_stream(model, site)
        self.gamma, self.centres = norm_weight(model)
        d_model = self.unembed.shape[0]
        if len(self.gamma) != d_model:
            raise InterpError(f"the final norm has width {len(self.gamma)}, the unembedding {d_model}")

    @classmethod
    def of(cls, model: LoadedModel, site: Site, d_out: int) -> tuple[Lens | None, str | None]:
        """The lens where there is one, and what to doubt about it or why there is none."""
        try:
            lens = cls(model, site)
        except InterpError as error:
            return None, f"There is no logit lens here: {error}"
        width = lens.unembed.shape[0] if lens.through is None else lens.through.shape[0]
        if width != d_out:
            return None, f"There is no logit lens here: rows have width {d_out}, {site} has {width}"
        return lens, far_from_the_end(model, site)

    @torch.no_grad()
    def logits(self, rows: Float[Tensor, "n d_out"]) -> Logits:
        x = rows.to(self.gamma.device, torch.float32)
        if self.through is not None:
            x = x @ self.through.float()
        if self.centres:
            x = x - x.mean(-1, keepdim=True)
        x = x * self.gamma
        parts = [(x @ part.float()).cpu() for part in self.unembed.split(COLUMNS, dim=1)]
        found = torch.cat(parts, dim=1)
        return Logits(values=found - found.mean(1, keepdim=True))


def far_from_the_end(model: LoadedModel, site: Site) -> str | None:
    """What a reader of the lens should know at this layer."""
    if site.layer is None or site.layer >= model.n_layers - FAR:
        return None
    after = model.n_layers - 1 - site.layer
    return (
        f"The logit lens is unreliable here: {after} more blocks act on what layer {site.layer} writes. "
        "Read the promoted tokens as a guess, and look at their null."
    )


def _to_stream(model: LoadedModel, site: Site) -> Tensor | None:
    """What takes the site's space to the stream; None for a part of the stream itself."""
    if site.path is not None:
        raise InterpError(f"{site} is a module of its own; what it adds to the stream is not known")
    if site.part in STREAM:
        return None
    if site.part is Part.NEURONS:
        return model.weight("W_down", site.layer)
    if site.part is Part.Z:
        return model.weight("W_O", site.layer).flatten(0, 1)
    raise InterpError(f"{site} does not write to the residual stream")


@torch.no_grad()
def norm_weight(model: LoadedModel) -> tuple[Float[Tensor, " d"], bool]:
    """gamma of the final norm, and whether it takes out the mean: measured with vectors of mean 0 and equal sizes.

    norm(v) = gamma * v / rms(v) + beta for such v, and norm(0) = beta. All ones times (rms 1) tell the two kinds apart.
    """
    norm = model.module.get_submodule(model.table.reach(Site(Part.FINAL_NORM)).path)
    d = model.weight("W_U").shape[0]
    signs = torch.ones(d)
    signs[1::2] = -1
    if d % 2:
        signs[-1] = 0  # the mean must be 0
    probes = 1024 * torch.stack([signs, 2 * signs, signs.roll(1), torch.ones(d), torch.zeros(d)])
    out = norm(probes[:, None].to(model.device, model.dtype))[:, 0].float()
    size = float(signs.square().mean()) ** -0.5
    first, double, second, ones = (out[i] - out[4] for i in range(4))
    if not torch.allclose(first, double, rtol=0.02, atol=1e-3):
        raise InterpError("the final norm is not one: twice the input gives another output")
    signs = signs.to(first)
    gamma = torch.where(signs != 0, first * signs, second * signs.roll(1)) / size
    return gamma, bool(ones.abs().max() < 0.01 * gamma.abs().max())
