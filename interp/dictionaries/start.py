"""Where training starts: scales, biases and directions, from a sample of the activations.

    scale_in = sqrt(d_in) / mean |x| ; scale_out = sqrt(d_out) / mean |y|     (per block, for crosscoders)
    b_dec = geometric median of the scaled targets ; b_enc = 0
    autoencoder   W_dec random unit rows, W_enc = W_dec^T
    transcoder    W_enc random unit columns; row i of W_dec is the direction sum_b f_bi (y_b - b_dec) that the target
                  takes when latent i fires, at norm 1; b_enc = -mean(u) W_enc, so that no latent fires at every token
    kinds that select no k start with the encoder shrunk by the gain that fits their first output best
Data-dependent decoders: EleutherAI's sparsify starts transcoders from zero decoders instead. Tied start and geometric
median: L. Gao et al. 2024, https://arxiv.org/abs/2406.04093, appendix A.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.activity import observe
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.kinds import make_activation
from interp.dictionaries.train_config import TrainConfig

MEDIAN_SAMPLE = 32_768
"""Rows the geometric median is taken over, at most."""
DIRECTION_SAMPLE = 4096
"""Rows that first directions and gains are fitted on, at most."""


@torch.no_grad()
def initial(
    sample: Float[Tensor, "n d_in"],
    cfg: TrainConfig,
    *,
    targets: Float[Tensor, "n d_out"] | None = None,
    blocks: Sequence[int] = (),
) -> SparseDictionary:
    """A dictionary ready to train. `targets` makes a transcoder; `blocks` are the widths of stacked sites.

    Raises InterpError for an empty, constant-zero or non-finite sample.
    """
    scale_in = _scale(sample, blocks)
    if targets is not None and len(targets) != len(sample):
        raise InterpError(f"{len(sample)} inputs and {len(targets)} targets; they must be the same tokens")
    if targets is None and cfg.skip:
        raise InterpError("a skip path from the input to itself would learn the identity; skip is for transcoders")
    if targets is not None and cfg.kind == "top_afa":
        raise InterpError(
            "top_afa compares the norms of code and input, which a transcoder has in two spaces; use topk"
        )
    y, scale_out = (sample, scale_in) if targets is None else (targets, _scale(targets, ()))
    activation = make_activation(cfg)
    if targets is None:
        made = SparseDictionary.random(sample.shape[1], cfg.d_dict, activation, seed=cfg.seed).to(sample.device)
        made.subtract_b_dec = not blocks  # a crosscoder reads every block as it is
    else:
        made = SparseDictionary(sample.shape[1], cfg.d_dict, activation, d_out=targets.shape[1], skip=cfg.skip)
        made = made.to(sample.device)
        generator = torch_generator(cfg.seed, "transcoder-init", *made.W_enc.shape)
        directions = torch.randn(cfg.d_dict, made.d_in, generator=generator, dtype=torch.float64)
        made.W_enc.copy_(F.normalize(directions, dim=1).t())
    made.scale_in, made.scale_out = scale_in, scale_out
    made.b_dec.copy_(geometric_median(y[:MEDIAN_SAMPLE].float() * scale_out))
    first = sample[:DIRECTION_SAMPLE].float()
    if targets is not None:
        made.b_enc.copy_(-(first * scale_in).mean(0) @ made.W_enc)
        _point_decoder(made, first, targets[:DIRECTION_SAMPLE].float(), cfg)
    if isinstance(made.activation, JumpReLU) and not cfg.threshold:
        made.activation.log_threshold.fill_(_cut(made, first, cfg.k).log())
    if made.activation.dense or targets is not None:
        _fit_gain(made, first, None if targets is None else targets[:DIRECTION_SAMPLE].float())
    return made


def _scale(sample: Tensor, blocks: Sequence[int]) -> Tensor:
    if len(sample) == 0:
        raise InterpError("no activations to train on; raise the number of sequences")
    if not bool(torch.isfinite(sample).all()):
        raise InterpError("the activations hold NaN or infinity; check the model's dtype and the site")
    widths = list(blocks) or [sample.shape[1]]
    if sum(widths) != sample.shape[1]:
        raise InterpError(f"blocks {tuple(widths)} sum to {sum(widths)}, the activations have width {sample.shape[1]}")
    scales: list[Tensor] = []
    for part in sample.float().split(widths, dim=1):
        norm = float(part.norm(dim=1).mean())
        if norm == 0:
            raise InterpError("the activations are all zero; check the site")
        scales.append(torch.tensor(math.sqrt(part.shape[1]) / norm, device=sample.device))
    if len(scales) == 1:
        return scales[0]
    return torch.cat([scale.expand(width) for scale, width in zip(scales, widths, strict=True)])


@torch.no_grad()
def geometric_median(x: Float[Tensor, "n d"], n_iterations: int = 100) -> Float[Tensor, "d"]:
    """Point of least summed distance (Weiszfeld); a point that meets a sample is kept off the division by zero."""
    median = x.mean(0)
    for _ in range(n_iterations):
        weights = 1 / (x - median).norm(dim=1).clamp_min(1e-12)
        following = (weights / weights.sum()) @ x
        if float((following - median).norm()) < 1e-5 * (1 + float(median.norm())):
            return following
        median = following
    return median


def _cut(made: SparseDictionary, x: Tensor, k: int) -> Tensor:
    """The threshold that k pre-activations per token pass, on average."""
    z = made.inputs(made.centred(x)).z().flatten()
    return z.kthvalue(max(z.numel() - k * len(x), 1)).values.clamp_min(1e-6)


def _point_decoder(made: SparseDictionary, x: Tensor, y: Tensor, cfg: TrainConfig) -> None:
    generator = torch_generator(cfg.seed, "transcoder-decoder", *made.W_dec.shape)
    directions = torch.randn(made.d_dict, made.d_out, generator=generator, dtype=torch.float64).to(x)
    at = observe(made, x, y)
    codes = at.codes.dense() if at.codes is not None else at.f
    assert codes is not None
    seen = codes.T @ (at.target - made.b_dec)
    fires = (seen.norm(dim=1, keepdim=True) > 0).to(seen.dtype)
    made.W_dec.copy_(F.normalize(seen * fires + directions * (1 - fires), dim=1))


def _fit_gain(made: SparseDictionary, x: Tensor, y: Tensor | None) -> None:
    at = observe(made, x, y)
    features = at.output - at.straight
    power = float(features.square().sum())
    along = float((features * (at.target - at.straight)).sum())
    if power > 0 and along > 0:
        gain = along / power
        made.W_enc.mul_(gain)
        made.b_enc.mul_(gain)
        made.activation.rescale(torch.full_like(made.b_enc, gain))
