"""How do codes learn, and what gradient passes them? The quantiser of `vector-quantize-pytorch`, made to sum k codes.

    q      = mean of the k chosen codes C_i            (C: the table, in the graph)
    output = q + (a - sg a)                            straight through: dL/da = dL/dq, dL/dC_i = dL/dq / k
    output = R(a) + (q - sg q)                         rotation trick: R turns and scales a into q, held constant
    loss   = 1/2 mean (q - sg a)^2   to the codes;     commitment = mean (a - sg q)^2   to the network below

Codes move by one of
    gradient  of these losses. `affine` keeps mean and variance of the table at those of the inputs.
    ema       C_i = moving sum of the inputs that chose i / moving count.
    simvq     C = Z W with Z fixed and W learned: every code moves at every step (Y. Zhu et al. 2024,
              https://arxiv.org/abs/2411.02038).
    cvq       gradient, and u_i <- d u_i + (1 - d) usage_i,  C_i <- C_i + alpha_i (anchor_i - C_i) with
              alpha_i = exp(-10 K u_i / (1 - d) - .001), d = .99, anchors random inputs (C. Zheng and A. Vedaldi 2023,
              https://arxiv.org/abs/2307.15139).
and, besides, codes idle for long are drawn anew from the inputs. Rotation: C. Fifty et al. 2024,
https://arxiv.org/abs/2410.06424. Affine: M. Huh et al. 2023, https://arxiv.org/abs/2305.08842.
The library keeps the codes, their averages, k-means, replacement, SimVQ and the rotation; the choice of k codes is
`nearest_codes`, because the library's multiplies a (tokens, k, codes) one-hot, and its codes get no task gradient.
Traps: simvq and the rotation trick are about the network below learning too; where that is frozen, simvq fits badly and
the rotation changes nothing. The library's averages and replacement do nothing with more than one code per token, its
affine statistics move in evaluation too, and none of its randomness takes a generator: it is drawn from a forked global
one here.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from interp.core.errors import InterpError, MissingPackageError
from interp.core.seed import torch_generator
from interp.dictionaries.base import check_width
from interp.dictionaries.codebook import Codebook, mean_of_codes, nearest_codes
from interp.dictionaries.codebook_config import CodebookConfig

ANCHOR_DECAY, ANCHOR_RATE = 0.99, 10.0
"""d and the factor 10 of cvq."""
SAMPLE = 8192
"""Inputs that k-means looks at, at most."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantised:
    """One batch through a quantiser."""

    output: Float[Tensor, "batch d_in"]
    """In the units of the activation; the gradient goes to the codes and to the input."""
    a: Float[Tensor, "batch group d"]
    indices: Int[Tensor, "batch group k"]
    autoencoder: Float[Tensor, ""]
    commitment: Float[Tensor, ""]

    @property
    def fvu(self) -> float:
        """Squared error over the variance of this batch."""
        error = float(self.autoencoder.detach()) * 2 * self.a.numel()
        return error / max(float((self.a - self.a.mean(0)).double().square().sum()), 1e-300)


@contextmanager
def drawn_from(generator: torch.Generator, device: torch.device) -> Generator[None, None, None]:
    """Global random numbers inside come from a generator's state; the global generators are put back."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(generator.get_state())
        if devices:
            seeded = torch.Generator(device=device).manual_seed(generator.initial_seed())
            torch.cuda.set_rng_state(seeded.get_state(), device)
        yield


def library() -> Any:
    """`vector_quantize_pytorch`, imported when the first quantiser is made: it takes a second."""
    try:
        import vector_quantize_pytorch
    except ImportError as error:
        raise MissingPackageError("codebooks learn by a library: pip install vector-quantize-pytorch") from error
    return vector_quantize_pytorch


class Quantiser(nn.Module):
    """Codes that learn. `sample` (n, d_in) sets mean, scale and the first codes; `groups` is the number of heads."""

    mean: Tensor
    scale: Tensor
    usage: Tensor

    def __init__(
        self,
        sample: Float[Tensor, "n d_in"],
        cfg: CodebookConfig,
        *,
        groups: int = 1,
        codes: Float[Tensor, "group code d"] | None = None,
    ) -> None:
        """`codes`, normalised, start the table in place of what the config names."""
        super().__init__()
        d_in = sample.shape[1]
        if d_in % groups or len(sample) < 2:
            raise InterpError(
                f"{len(sample)} inputs of width {d_in} do not make {groups} groups; give 2 or more inputs"
            )
        self.cfg, self.groups, self.n_observed = cfg, groups, 0
        self.register_buffer("mean", sample.mean(0))
        rms = float((sample - self.mean).double().square().mean().sqrt())
        if rms == 0:
            raise InterpError(f"the {len(sample)} inputs do not vary; there is nothing to quantise")
        self.register_buffer("scale", torch.tensor(1 / rms, dtype=sample.dtype, device=sample.device))
        self.register_buffer("usage", torch.zeros(groups, cfg.n_codes, device=sample.device))
        with drawn_from(self._generator("start"), sample.device), torch.no_grad():
            self.inner = self._simvq(d_in // groups) if cfg.update == "simvq" else self._vq(d_in, sample)
            if codes is not None:
                self._set(codes)
            if cfg.affine:
                self._follow(self.normalised(sample))
        self.to(sample)

    def _generator(self, *labels: str | int) -> torch.Generator:
        return torch_generator(self.cfg.seed, "codebook", *labels)

    def _simvq(self, d: int) -> nn.ModuleList:
        """One SimVQ per group; the matrix starts as sqrt(d) times the identity, so that codes have unit variance."""
        made = nn.ModuleList()
        for _ in range(self.groups):
            linear = nn.Linear(d, d, bias=False)
            linear.weight.copy_(torch.eye(d) * d**0.5)
            made.append(library().SimVQ(dim=d, codebook_size=self.cfg.n_codes, codebook_transform=linear))
        return made

    def _vq(self, d_in: int, sample: Tensor) -> nn.Module:
        cfg = self.cfg
        made = library().VectorQuantize(
            dim=d_in, codebook_size=cfg.n_codes, heads=self.groups, codebook_dim=d_in // self.groups,
            separate_codebook_per_head=True, decay=cfg.decay, threshold_ema_dead_code=cfg.dead_share,
            ema_update=cfg.update == "ema", learnable_codebook=cfg.update != "ema", kmeans_init=cfg.start == "kmeans",
            affine_param=cfg.affine, rotation_trick=False,
        )  # fmt: skip
        made.to(sample)
        made._codebook.reset_cluster_size = 1.0  # a fresh code counts as one of average use, and has time to be found
        a = self.normalised(sample)
        order = torch.randperm(len(a), device=sample.device)
        if cfg.start == "kmeans":
            made._codebook.init_embed_(a[order[:SAMPLE]].transpose(0, 1).contiguous())
            made._codebook.cluster_size.fill_(1.0)
            made._codebook.embed_avg.copy_(made._codebook.embed)
        else:
            index = order.repeat(-(-cfg.n_codes // len(order)))[: cfg.n_codes]
            made.codebook = a[index].transpose(0, 1)
            made._codebook.embed_avg.copy_(made.codebook)
        return made

    def _each(self) -> list[Any]:
        """The SimVQ of each group."""
        assert isinstance(self.inner, nn.ModuleList)
        return list(self.inner)

    def _set(self, codes: Tensor) -> None:
        shape = (self.groups, self.cfg.n_codes, len(self.mean) // self.groups)
        if codes.shape != shape:
            raise InterpError(f"codes {tuple(codes.shape)} do not fit a table {shape}")
        if isinstance(self.inner, nn.ModuleList):
            for each, table in zip(self._each(), codes, strict=True):
                each.frozen_codebook.copy_(table / table.shape[1] ** 0.5)  # the matrix is sqrt(d) times the identity
            return
        vq: Any = self.inner
        vq.codebook = codes
        vq._codebook.embed_avg.copy_(codes)

    def table(self) -> Float[Tensor, "group code d"]:
        """The codes as they are chosen and used, in the graph where they learn by gradient."""
        if isinstance(self.inner, nn.ModuleList):
            return torch.stack([each.codebook for each in self._each()])
        vq: Any = self.inner
        codes = vq.codebook
        if not self.cfg.affine:
            return codes
        shift, factor = self._affine()
        return (codes - vq._codebook.codebook_mean) * factor + shift

    def _follow(self, a: Tensor) -> None:
        """Affine: running mean and variance of the inputs and of the raw codes."""
        inner: Any = self.inner._codebook
        inner.update_affine(a.detach().transpose(0, 1), inner.embed.detach())

    def _affine(self) -> tuple[Tensor, Tensor]:
        """Mean of the inputs, and standard deviation of the inputs over that of the raw codes."""
        inner: Any = self.inner._codebook
        ratio = inner.batch_variance.clamp_min(1e-5) / inner.codebook_variance.clamp_min(1e-5)
        return inner.batch_mean, ratio.sqrt()

    def normalised(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch group d"]:
        check_width(x, self.mean.shape[0])
        return ((x - self.mean) * self.scale).unflatten(1, (self.groups, -1))

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Quantised:
        """Quantise a batch; with `self.training`, affine statistics follow it."""
        a = self.normalised(x)
        if self.cfg.affine and self.training:
            self._follow(a)
        table = self.table()
        indices = nearest_codes(a.detach(), table.detach(), self.cfg.k, self.cfg.similarity)
        q = mean_of_codes(indices, table)
        if self.cfg.rotation:
            from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

            passed = rotate_to(a, q.detach()) + (q - q.detach())
        else:
            passed = q + (a - a.detach())
        return Quantised(
            output=passed.reshape(len(x), -1) / self.scale + self.mean,
            a=a.detach(),
            indices=indices,
            autoencoder=(q - a.detach()).square().mean() / 2,
            commitment=(a - q.detach()).square().mean(),
        )

    @torch.no_grad()
    def observe(self, found: Quantised) -> None:
        """After the optimiser's step: moving averages, and new places for idle codes."""
        self.n_observed += 1
        flat = found.indices.transpose(0, 1).flatten(1)
        counts = torch.zeros_like(self.usage).scatter_add(1, flat, torch.ones_like(flat, dtype=self.usage.dtype))
        with drawn_from(self._generator(self.n_observed), found.a.device):
            if self.cfg.update == "cvq":
                self._to_anchors(counts / flat.shape[1], found.a)
            elif not isinstance(self.inner, nn.ModuleList):
                self._average(counts * (self.cfg.n_codes / flat.shape[1]), found, flat)

    def _average(self, counts: Tensor, found: Quantised, flat: Tensor) -> None:
        """The library's averages, without its (tokens, codes) one-hot. Counts have mean 1, so that thresholds are
        shares of the average use; sums of inputs are in the same unit."""
        vq: Any = self.inner
        inner, weight = vq._codebook, 1 - self.cfg.decay
        inner.cluster_size.lerp_(counts.to(inner.cluster_size), weight)
        if self.cfg.update == "ema":
            inputs = found.a.transpose(0, 1).repeat_interleave(self.cfg.k, dim=1)
            sums = torch.zeros_like(inner.embed_avg)
            for total, chosen, each in zip(sums, flat, inputs, strict=True):
                total.index_add_(0, chosen, each)
            inner.embed_avg.lerp_(sums * (self.cfg.n_codes / flat.shape[1]), weight)
            inner.update_ema()
        if self.cfg.dead_share and self.training:
            a = found.a
            if self.cfg.affine:
                shift, factor = self._affine()
                a = ((a.transpose(0, 1) - shift) / factor + inner.codebook_mean).transpose(0, 1)
            vq.expire_codes_(a.flatten(1)[None])

    def _to_anchors(self, share: Tensor, a: Tensor) -> None:
        """cvq: codes move towards random inputs, the idle ones nearly all the way."""
        vq: Any = self.inner
        self.usage.lerp_(share, 1 - ANCHOR_DECAY)
        alpha = pull(self.usage, self.cfg.n_codes)[..., None]
        inputs = a.transpose(0, 1)
        if self.cfg.affine:
            shift, factor = self._affine()
            inputs = (inputs - shift) / factor + vq._codebook.codebook_mean
        order = torch.randperm(len(a), device=a.device).repeat(-(-self.cfg.n_codes // len(a)))[: self.cfg.n_codes]
        vq._codebook.embed.lerp_(inputs[:, order], alpha.to(inputs))

    @torch.no_grad()
    def frozen(self) -> Codebook:
        """The codes as they are now, without the library."""
        return Codebook(
            self.table(), self.cfg.k, mean=self.mean, scale=self.scale, similarity=self.cfg.similarity
        )  # fmt: skip


def pull(usage: Float[Tensor, "*codes"], n_codes: int) -> Float[Tensor, "*codes"]:
    """alpha of cvq: .999 for a code that is never used, 0 for one of average use."""
    return torch.exp(-ANCHOR_RATE * n_codes * usage / (1 - ANCHOR_DECAY) - 1e-3)
