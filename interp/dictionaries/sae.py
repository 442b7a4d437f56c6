"""The top-k sparse autoencoder: an activation as a sum of k learned directions out of d_dict.

    u = scale * x - b_dec ;  z = u W_enc + b_enc ;  f = relu(z) on the k largest z, 0 elsewhere
    x_hat = (f W_dec + b_dec) / scale

Paper: L. Gao et al., Scaling and evaluating sparse autoencoders, 2024, https://arxiv.org/abs/2406.04093.
`scale` is a number chosen once at the start of training so that inputs have norm about sqrt(d_in). It is a registered
buffer, saved with the weights, and applied here and nowhere else; `folded()` gives the same function with scale 1.
Trap: the k largest z may be negative; the ReLU then leaves fewer than k active, and those slots carry no gradient.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.dictionaries.base import check_width
from interp.dictionaries.codes import SparseCodes
from interp.kernels.sparse_autograd import (  # pyright: ignore[reportMissingImports]  # found at run time
    sparse_decode,
    sparse_encode,
)
from interp.kernels.topk_encode import preactivations, topk_encode  # pyright: ignore[reportMissingImports]


class TopKSAE(nn.Module):
    """W_enc (d_in, d_dict), b_enc (d_dict), W_dec (d_dict, d_in), b_dec (d_in); `W_enc.t()` is the contiguous one."""

    scale: Float[Tensor, ""]

    def __init__(self, d_in: int, d_dict: int, k: int, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        if d_in < 1 or d_dict < 1:
            raise InterpError(f"d_in={d_in} and d_dict={d_dict} must be at least 1")
        if not 1 <= k <= d_dict:
            raise InterpError(f"k={k} must lie in 1..d_dict={d_dict}; lower k or widen the dictionary")
        self.k = k
        self.W_enc = nn.Parameter(torch.zeros(d_dict, d_in, dtype=dtype).t())
        self.b_enc = nn.Parameter(torch.zeros(d_dict, dtype=dtype))
        self.W_dec = nn.Parameter(torch.zeros(d_dict, d_in, dtype=dtype))
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype))
        self.register_buffer("scale", torch.ones((), dtype=dtype))

    @classmethod
    def random(cls, d_in: int, d_dict: int, k: int, *, seed: int, dtype: torch.dtype = torch.float32) -> TopKSAE:
        """Random unit rows, W_enc = W_dec transposed, biases 0."""
        sae = cls(d_in, d_dict, k, dtype=dtype)
        generator = torch_generator(seed, "sae-init", d_in, d_dict)
        with torch.no_grad():
            sae.W_dec.copy_(F.normalize(torch.randn(d_dict, d_in, generator=generator, dtype=torch.float64), dim=1))
            sae.W_enc.copy_(sae.W_dec.t())
        return sae

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_dict(self) -> int:
        return self.W_dec.shape[0]

    @property
    def features(self) -> Float[Tensor, "d_dict d_out"]:
        """What one unit of each latent adds to the reconstruction."""
        return self.W_dec.detach() / self.scale

    def centred(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "batch d_in"]:
        """u = scale * x - b_dec, with one token axis."""
        check_width(x, self.d_in)
        return x.reshape(-1, self.d_in) * self.scale - self.b_dec

    def preactivations(
        self, u: Float[Tensor, "batch d_in"], buffer: Tensor | None = None
    ) -> Float[Tensor, "batch d_dict"]:
        """z = u W_enc + b_enc, without a graph; `buffer` is written where given."""
        with torch.no_grad():
            return preactivations(u, self.W_enc, self.b_enc, buffer)

    def latents(
        self, u: Float[Tensor, "batch d_in"], selected: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]
    ) -> SparseCodes:
        """relu of the selected pre-activations of u, in the graph."""
        return SparseCodes(sparse_encode(u, self.W_enc, self.b_enc, selected, indices), indices, self.d_dict)

    def encode(self, x: Float[Tensor, "*batch d_in"]) -> SparseCodes:
        """The k largest latents of each token."""
        u = self.centred(x)
        with torch.no_grad():
            selected, indices = topk_encode(u, self.W_enc, self.b_enc, self.k)
        codes = self.latents(u, selected, indices)
        shape = (*x.shape[:-1], self.k)
        return SparseCodes(codes.values.reshape(shape), indices.reshape(shape), self.d_dict)

    def combine(self, codes: SparseCodes) -> Float[Tensor, "batch d_out"]:
        """f W_dec of codes with one token axis: no bias, no scale."""
        return sparse_decode(codes.values, codes.indices, self.W_dec)

    def decode(self, codes: SparseCodes) -> Float[Tensor, "*batch d_out"]:
        """x_hat, in the units of x."""
        if codes.d_dict != self.d_dict:
            raise InterpError(f"codes over {codes.d_dict} latents do not fit a dictionary with d_dict={self.d_dict}")
        flat = codes.flat()
        x_hat = (self.combine(flat) + self.b_dec) / self.scale
        return x_hat.reshape(*codes.values.shape[:-1], self.d_out)

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        return self.decode(self.encode(x))

    @torch.no_grad()
    def folded(self) -> TopKSAE:
        """The same latents and reconstructions with scale 1: W_enc * s, W_dec / s, b_dec / s, b_enc unchanged."""
        sae = TopKSAE(self.d_in, self.d_dict, self.k, dtype=self.W_dec.dtype).to(self.W_dec.device)
        sae.W_enc.copy_(self.W_enc * self.scale)
        sae.b_enc.copy_(self.b_enc)
        sae.W_dec.copy_(self.W_dec / self.scale)
        sae.b_dec.copy_(self.b_dec / self.scale)
        return sae
