"""What the library that owns a layout computes from it: the judge of a conversion that is not this package.

Only where that library is installed; None elsewhere, and for layouts that belong to nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Peer = Callable[[Float[Tensor, "n d_in"]], tuple[Float[Tensor, "n d_dict"], Float[Tensor, "n d_out"]]]
"""Activations -> dense codes and reconstructions."""
PACKAGES = {"saelens": "sae_lens", "sparsify": "sparsify", "circuit-tracer": "circuit_tracer"}


def peer(format: str, path: Path) -> Peer | None:
    """Their function of these files, in float32."""
    package = PACKAGES.get(format)
    if package is None or find_spec(package) is None:
        return None
    return {"saelens": _saelens, "sparsify": _sparsify, "circuit-tracer": _circuit_tracer}[format](path)


def version(format: str) -> str | None:
    """Which release judged."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    names = {"saelens": "sae-lens", "sparsify": "eai-sparsify", "circuit-tracer": "circuit-tracer"}
    try:
        return f"{names[format]} {installed(names[format])}" if format in names else None
    except PackageNotFoundError:
        return None


@contextmanager
def _quiet(name: str) -> Generator[None, None, None]:
    """No warnings of one logger."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _saelens(path: Path) -> Peer:
    sae: Any = import_module("sae_lens").SAE.load_from_disk(path, dtype="float32")

    @torch.no_grad()
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return sae.encode(x), sae(x)

    return run


def _sparsify(path: Path) -> Peer:
    with _quiet("simple_parsing.helpers.serialization.serializable"):  # it would print our certificate: an unknown key
        coder: Any = import_module("sparsify").SparseCoder.load_from_disk(path).float()

    @torch.no_grad()
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        found = coder.encode(x)  # decoded densely: their Triton decoder wants a GPU and widths that are multiples of 8
        codes = torch.zeros_like(found.pre_acts).scatter(1, found.top_indices, found.top_acts)
        out = codes @ coder.W_dec + coder.b_dec
        return codes, out if coder.W_skip is None else out + x @ coder.W_skip.mT

    return run


def _circuit_tracer(path: Path) -> Peer:
    module: Any = import_module("circuit_tracer.transcoder.single_layer_transcoder")
    cpu = torch.device("cpu")
    made = module.load_relu_transcoder(str(path), 0, device=cpu, lazy_encoder=False, lazy_decoder=False)

    @torch.no_grad()
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return made.encode(x), made(x)

    return run
