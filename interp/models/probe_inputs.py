"""What the probe shows a model: random tokens or images, the same in every run."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel

N_PROBE_TOKENS = 12
"""Tokens of the probe's random input: two rows, long enough that a pattern is not trivial."""


def probe_tokens(model: LoadedModel, n_rows: int = 2) -> Int[Tensor, "batch pos"]:
    """Random tokens from the vocabulary; the same for every run."""
    size = model.dims.d_vocab
    if size is None:
        raise InterpError(f"{model.source} has no vocabulary; pass the probe an input of your own")
    return torch.randint(size, (n_rows, N_PROBE_TOKENS), generator=torch_generator(0, "probe")).to(model.device)


def probe_pixels(model: LoadedModel, n_rows: int = 2) -> Float[Tensor, "batch channel height width"]:
    """Random images of the size that the model takes; the same for every run."""
    config: Any = getattr(model.module, "config", None)
    size = getattr(config, "image_size", getattr(model.module, "input_image_size", None))
    if size is None:
        raise InterpError(f"{model.source} takes images of any size; pass the probe an input of your own")
    height, width = (size, size) if isinstance(size, int) else size
    shape = (n_rows, getattr(config, "num_channels", 3), height, width)
    return torch.randn(shape, generator=torch_generator(0, "probe")).to(model.device, model.dtype)


def probe_inputs(model: LoadedModel) -> Tensor:
    """Tokens or images, as the network takes them; an error for one that says neither."""
    images = model.takes_pixels or hasattr(model.module, "input_image_size")
    return probe_pixels(model) if images else probe_tokens(model)
