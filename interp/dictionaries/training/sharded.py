"""A dictionary too wide for one device: process r of R holds d_dict / R consecutive latents, and all tokens.

    local     z = u W_enc[:, mine] + b_enc[mine], its k largest per token
    narrow    the k largest of the k R candidates of all processes; one all-gather of (batch, k) values
    join      y_hat = sum over processes of f[mine] W_dec[mine] + b_dec; one all-reduce, gradient unchanged
    spread    du = sum over processes of the gradients that came through their latents; one all-reduce

Weights of latents and their moments never leave their process; b_dec and a skip path are held by all and get the same
gradient everywhere. The result is that of one process up to the rounding of sums. Checkpoints see one DTensor per
tensor, latents as rows, so a run may go on with another number of processes.
Only kind="topk" is supported: the other kinds choose or penalise latents by something that one process does not see.
So are neither clip_norm (the norm of all gradients) nor resample_every. k must not exceed d_dict / R.
At the start each process builds the whole dictionary once in the memory of the host, one after the other.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from interp.core.errors import InterpError
from interp.dictionaries.activations.base import Selected
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.training.job import Batch, Job
from interp.dictionaries.training.parallel import Several, summed

BY_LATENT = ("W_enc", "b_enc", "W_dec", "silent")
"""Tensors with an axis of latents."""


class WidthSharded(Several):
    """Parts of the latents, all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.mesh: DeviceMesh = init_device_mesh(self.device.type, (self.ranks.world,))

    def whole(self, x: Tensor) -> Tensor:
        return summed(x)

    def spread(self, u: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        return _Spread.apply(u)  # pyright: ignore[reportReturnType]

    def join(self, output: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        return _Join.apply(output)  # pyright: ignore[reportReturnType]

    @torch.no_grad()
    def narrow(self, selected: Selected, k: int) -> Selected:
        values, indices = selected
        rank, world = self.ranks.rank, self.ranks.world
        candidates = values.new_full((len(values), k), -torch.inf)
        candidates[:, : values.shape[1]] = values
        everywhere = candidates.new_empty(world, *candidates.shape)
        dist.all_gather(list(everywhere.unbind()), candidates)
        best = everywhere.transpose(0, 1).reshape(len(values), world * k).topk(k, dim=1).indices
        kept = torch.zeros(len(values), world * k, dtype=torch.bool, device=values.device).scatter_(1, best, True)
        mine = kept[:, rank * k :][:, : values.shape[1]]
        n_slots = int(mine.sum(1).max()) if mine.numel() else 0
        order = mine.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :n_slots]
        return torch.where(mine, values, 0).gather(1, order), indices.gather(1, order)

    def check(self, job: Job) -> None:
        cfg, world = job.config, self.ranks.world
        if cfg.kind != "topk":
            raise InterpError(f"width is shared among processes for kind='topk' alone, not {cfg.kind!r}; share data")
        if cfg.clip_norm or cfg.resample_every:
            raise InterpError("clip_norm and resample_every need all latents in one process; drop them, or share data")
        if cfg.d_dict % world or max(cfg.k, cfg.k_start) > cfg.d_dict // world:
            raise InterpError(
                f"d_dict={cfg.d_dict} among {world} processes must divide evenly and leave each at least "
                f"k={max(cfg.k, cfg.k_start)} latents"
            )

    def start(self, job: Job, sample: Batch, device: torch.device) -> SparseDictionary:
        made: SparseDictionary | None = None
        for turn in range(self.ranks.world):
            if turn == self.ranks.rank:
                made = shard(job.start({key: value.cpu() for key, value in sample.items()}), turn, self.ranks.world)
                made = made.to(device)
            self.barrier()
        assert made is not None
        for name, tensor in made.state_dict().items():
            if name not in BY_LATENT:
                dist.broadcast(tensor, 0)
        return made

    def stored(self, name: str, tensor: Tensor) -> Any:
        return DTensor.from_local(tensor, self.mesh, [Shard(0)]) if _by_latent(name, tensor.ndim) else tensor

    def local_shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] // self.ranks.world, *shape[1:]) if _by_latent(name, len(shape)) else shape

    def gathered(self, dictionary: SparseDictionary) -> SparseDictionary:
        def complete(tensor: Tensor) -> Tensor:
            return DTensor.from_local(tensor.contiguous(), self.mesh, [Shard(0)]).full_tensor()

        made = _empty_like(dictionary, dictionary.d_dict * self.ranks.world).cpu()
        with torch.no_grad():
            made.W_enc.copy_(complete(dictionary.W_enc.detach().t()).t())
            made.b_enc.copy_(complete(dictionary.b_enc.detach()))
            made.W_dec.copy_(complete(dictionary.W_dec.detach()))
        return made


def _by_latent(name: str, ndim: int) -> bool:
    """Whether a tensor of a checkpoint has an axis of latents; a moment has those of its weight."""
    return ndim > 0 and any(part in BY_LATENT for part in name.split("/"))


def shard(dictionary: SparseDictionary, rank: int, world: int) -> SparseDictionary:
    """Consecutive latents of a dictionary, as one; biases and scales of the output are those of the whole."""
    n = dictionary.d_dict // world
    mine, made = slice(rank * n, (rank + 1) * n), _empty_like(dictionary, n)
    with torch.no_grad():
        made.W_enc.copy_(dictionary.W_enc[:, mine])
        made.b_enc.copy_(dictionary.b_enc[mine])
        made.W_dec.copy_(dictionary.W_dec[mine])
    return made


@torch.no_grad()
def _empty_like(dictionary: SparseDictionary, d_dict: int) -> SparseDictionary:
    """Another width; what has no axis of latents is copied."""
    made = SparseDictionary(
        dictionary.d_in, d_dict, deepcopy(dictionary.activation), d_out=dictionary.d_out,
        subtract_b_dec=dictionary.subtract_b_dec, skip=dictionary.W_skip is not None,
        token_norm=dictionary.token_norm, dtype=dictionary.W_dec.dtype,
    ).to(dictionary.W_dec.device)  # fmt: skip
    made.b_dec.copy_(dictionary.b_dec)
    if made.W_skip is not None and dictionary.W_skip is not None:
        made.W_skip.copy_(dictionary.W_skip)
    made.scale_in, made.scale_out = dictionary.scale_in.clone(), dictionary.scale_out.clone()
    return made


class _Join(torch.autograd.Function):
    """Sum over processes; each needs the gradient of the sum, which all of them compute alike."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return summed(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


class _Spread(torch.autograd.Function):
    """The same value everywhere; its gradient is the sum of what came back in each process."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return summed(grad)
