"""EfficientNet-Lite0: an ImageNet network with its trained weights, from two Python packages, for work on images.

The weights come as a torch file. It is read once, by torch's restricted reader, which builds tensors and nothing else,
and kept as safetensors in the cache under the hash of its bytes. The network's code is the package's own. Its blocks
are module paths (`_blocks.3`); images are (batch, 3, 224, 224), scaled as `normalized` does it. The Lite networks have
no squeeze-and-excitation. (Tan and Le 2019, arxiv.org/abs/1905.11946)
"""

from __future__ import annotations

import importlib
import os
import pickle  # noqa: TID251 - for the name of the error that the restricted reader raises
import uuid
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interp.core.errors import ArtefactError, MissingPackageError
from interp.core.hash import hash_bytes, hash_tensors
from interp.models.bundled import BUNDLED, cache_dir

NAME = "efficientnet-lite0"
SIZE = 224
MEAN, SCALE = 127.0, 128.0
"""Pixels from 0 to 255 become (pixel - 127) / 128, as in the training of the Lite networks."""


def normalized(pixels: Float[Tensor, "batch 3 height width"]) -> Float[Tensor, "batch 3 height width"]:
    """Pixels between 0 and 1 as the network takes them."""
    return (pixels * 255 - MEAN) / SCALE


def open_efficientnet(*, device: Any = "cpu", dtype: torch.dtype = torch.float32) -> tuple[nn.Module, str]:
    """The network with its ImageNet weights, and the hash of the weights as they were stored."""
    state = _weights(BUNDLED[NAME].paths()[0])
    known = hash_tensors(state)
    try:
        code: Any = importlib.import_module("efficientnet_lite_pytorch")  # optional, so types are not looked for
    except ImportError as error:
        raise MissingPackageError(f"the network's code is missing; run: {BUNDLED[NAME].install}") from error
    with torch.device("meta"):
        module: Any = code.EfficientNet.from_name(NAME)
    module.load_state_dict(state, assign=True)
    return module.to(device=device, dtype=dtype).eval(), known


def _weights(source: Path) -> dict[str, Tensor]:
    try:
        target = cache_dir() / "models" / f"{NAME}-{hash_bytes(source.read_bytes())}.safetensors"
        if not target.is_file():
            _convert(source, target)
        return load_file(target)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(
            f"could not read or convert the weights of {NAME} ({error}); delete {cache_dir() / 'models'} and free "
            "space, or point INTERP_CACHE at another folder"
        ) from error


def _convert(source: Path, target: Path) -> None:
    try:
        # The restricted reader: no code in the file can run. The only pickle that is opened, and only once.
        state: dict[str, Tensor] = torch.load(source, weights_only=True, map_location="cpu")  # noqa: TID251
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ArtefactError(f"{source} is damaged; reinstall it: {BUNDLED[NAME].install} --force-reinstall") from error
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    try:
        save_file({name: value.contiguous() for name, value in state.items()}, draft)
        os.replace(draft, target)
    finally:
        draft.unlink(missing_ok=True)
