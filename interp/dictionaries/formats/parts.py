"""The neutral form between file layouts: plain tensors in `x @ W` orientation, and what they mean.

`assemble` makes a `SparseDictionary` of them, `take_apart` the reverse with both scales folded in. A batch top-k
dictionary has at inference the thresholds of a JumpReLU, which is how every other library stores it. Trap: thresholds
are kept in float64, since exp(log(t)) in the precision of a half-precision file would move them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from interp.core.errors import ArtefactError, InterpError
from interp.dictionaries.activations.base import Activation
from interp.dictionaries.activations.batch_topk import BatchTopK
from interp.dictionaries.activations.gated import Gated
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.dictionary import SparseDictionary, TokenNorm


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """Tensors and settings of one dictionary, with scales folded in."""

    W_enc: Float[Tensor, "d_in d_dict"]
    b_enc: Float[Tensor, "d_dict"]
    """The gate's bias where the activation is gated."""
    W_dec: Float[Tensor, "d_dict d_out"]
    b_dec: Float[Tensor, "d_out"]
    activation: Activation
    threshold: Float[Tensor, "d_dict"] | None = None
    """JumpReLU and batch top-k: a latent fires above it."""
    r_mag: Float[Tensor, "d_dict"] | None = None
    b_mag: Float[Tensor, "d_dict"] | None = None
    W_skip: Float[Tensor, "d_in d_out"] | None = None
    subtract_b_dec: bool = True
    token_norm: TokenNorm = "none"


@torch.no_grad()
def assemble(parts: Parts, path: Path) -> SparseDictionary:
    """The dictionary of these tensors, frozen. `path` is for the error messages."""
    d_in, d_dict = parts.W_enc.shape
    try:
        made = SparseDictionary(
            d_in, d_dict, parts.activation, d_out=parts.W_dec.shape[1], subtract_b_dec=parts.subtract_b_dec,
            skip=parts.W_skip is not None, token_norm=parts.token_norm, dtype=parts.W_dec.dtype,
        )  # fmt: skip
    except InterpError as error:
        raise ArtefactError(f"{path}: {error}") from error
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        getattr(made, name).copy_(getattr(parts, name))
    if made.W_skip is not None and parts.W_skip is not None:
        made.W_skip.copy_(parts.W_skip)
    activation = made.activation
    if isinstance(activation, JumpReLU) and parts.threshold is not None:
        activation.log_threshold = nn.Parameter(parts.threshold.double().clamp_min(0).log())
    if isinstance(activation, Gated) and parts.r_mag is not None and parts.b_mag is not None:
        activation.r_mag.copy_(parts.r_mag)
        activation.b_mag.copy_(parts.b_mag)
    return made.requires_grad_(False)


@torch.no_grad()
def take_apart(dictionary: SparseDictionary, *, subtract: bool | None = None) -> Parts:
    """Its tensors with both scales folded in, as new tensors on the CPU.

    `subtract` False moves the subtraction of b_dec into b_enc, for layouts that have none. Half precision becomes
    float32 where anything has to be folded. Raises InterpError where a move, or a threshold, is not possible.
    """
    moves = subtract is False and dictionary.subtract_b_dec
    scaled = bool((dictionary.scale_in != 1).any() | (dictionary.scale_out != 1).any())
    if (scaled or moves) and not_half(dictionary.W_dec.dtype) != dictionary.W_dec.dtype:
        dictionary = dictionary.like().float()
    plain = dictionary.folded()
    activation, b_enc = plain.activation, plain.b_enc
    if moves:
        if activation.kind in ("gated", "top_afa") or plain.token_norm != "none":
            raise InterpError(
                f"a {activation.kind} dictionary with token_norm={plain.token_norm!r} needs b_dec subtracted from its "
                "input, which this format does not do"
            )
        moved = b_enc.double() - plain.b_dec.double() @ plain.W_enc.double()
        b_enc = moved.to(b_enc.dtype)
    gated = isinstance(activation, Gated)
    return Parts(
        W_enc=_cpu(plain.W_enc), b_enc=_cpu(b_enc), W_dec=_cpu(plain.W_dec), b_dec=_cpu(plain.b_dec),
        activation=activation, threshold=thresholds(plain),
        r_mag=_cpu(activation.r_mag) if gated else None, b_mag=_cpu(activation.b_mag) if gated else None,
        W_skip=None if plain.W_skip is None else _cpu(plain.W_skip),
        subtract_b_dec=plain.subtract_b_dec and not moves, token_norm=plain.token_norm,
    )  # fmt: skip


def thresholds(dictionary: SparseDictionary) -> Float[Tensor, "d_dict"] | None:
    """What each latent's pre-activation must exceed at inference, in the dtype of the weights; None without one."""
    activation, weights = dictionary.activation, dictionary.W_dec
    if isinstance(activation, JumpReLU):
        return activation.threshold.detach().to("cpu", weights.dtype)
    if isinstance(activation, BatchTopK):
        if float(activation.threshold) < 0:
            raise InterpError("this batch top-k dictionary has no threshold yet; train it first")
        return activation.threshold.to("cpu", weights.dtype).expand(dictionary.d_dict).contiguous()
    return None


def not_half(dtype: torch.dtype) -> torch.dtype:
    """The dtype to fold in: float32 for half precision."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def check_tensors(
    tensors: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]], path: Path, *, what: str, says: str = ""
) -> None:
    """Exactly these names and shapes, floating point, without NaN; else an ArtefactError."""
    if set(tensors) != set(shapes):
        raise ArtefactError(f"{path} holds {sorted(tensors)}, {what} has {sorted(shapes)}")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != tuple(shape):
            turned = ": it lies transposed" if tuple(tensor.shape) == tuple(shape)[::-1] else ""
            raise ArtefactError(
                f"{name} in {path} is {tuple(tensor.shape)}, {says or what} says {tuple(shape)}{turned}"
            )
        if not tensor.is_floating_point():
            raise ArtefactError(f"{name} in {path} is {tensor.dtype}, expected a floating-point tensor")
        if bool(tensor.isnan().any()):
            raise ArtefactError(f"{name} in {path} holds NaN; the file is damaged or the training diverged")


def positive_int(value: object, name: str, path: Path) -> int:
    """A whole number above 0 from a config file."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ArtefactError(f"{name}={value!r} in {path} is not a positive whole number")
    return value


def dtype_of(name: object, path: Path) -> torch.dtype:
    """float32, torch.bfloat16, ... by name."""
    text = str(name).removeprefix("torch.")
    if text not in ("float32", "float64", "float16", "bfloat16"):
        raise ArtefactError(f"dtype={name!r} in {path}; known are float32, float64, float16 and bfloat16")
    return getattr(torch, text)
