"""Whole training steps of a top-k autoencoder: ours, plain torch, and those of other libraries that can be imported.

Every step is forward, mean squared error, backward and fused Adam on float32 master weights, the same for all; nothing
else of a trainer (schedules, dead latents, norms of the decoder), so that kernels are compared and not trainers. On a
GPU all run under bfloat16 autocast. Peers keep their own modules; they are found by name, and one that fails is
reported, not hidden.
"""

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from interp.kernels.bench_parts import Rows, Shape, problem, summary
from interp.kernels.sparse_autograd import latent_segments, sparse_decode, sparse_encode
from interp.kernels.topk_encode import topk_encode
from interp.kernels.workspace import Workspace
from torch import Tensor, nn
from torch.nn import functional as F


def peer(*path: str) -> Any:
    """A module of another library, which only a benchmark may ask for."""
    return importlib.import_module(".".join(path))


class Plain(nn.Module):
    """W_enc.t(), b_enc, W_dec and b_dec as parameters; forward is given."""

    def __init__(self, rows: Tensor, mean: Tensor, k: int) -> None:
        super().__init__()
        self.k = k
        self.encoder, self.decoder = nn.Parameter(rows.clone()), nn.Parameter(rows.clone())
        self.b_enc, self.b_dec = nn.Parameter(rows.new_zeros(len(rows))), nn.Parameter(mean.clone())


class Ours(Plain):
    def __init__(self, rows: Tensor, mean: Tensor, k: int, *, fast: bool | None = None) -> None:
        super().__init__(rows, mean, k)
        self.workspace = Workspace(fast=fast)

    def forward(self, x: Tensor) -> Tensor:
        u, W_enc = x - self.b_dec, self.encoder.t()
        selected, indices = topk_encode(u, W_enc, self.b_enc, self.k, self.workspace)
        segments = latent_segments(indices, len(self.encoder))
        values = sparse_encode(u, W_enc, self.b_enc, selected, indices, segments)
        return sparse_decode(values, indices, self.decoder, segments) + self.b_dec


class Dense(Plain):
    def forward(self, x: Tensor) -> Tensor:
        z = F.linear(x - self.b_dec, self.encoder, self.b_enc)
        top = z.topk(self.k, sorted=False)
        return F.linear(torch.zeros_like(z).scatter(1, top.indices, top.values.relu()), self.decoder.t(), self.b_dec)


class Bag(Plain):
    def forward(self, x: Tensor) -> Tensor:
        top = F.linear(x - self.b_dec, self.encoder, self.b_enc).topk(self.k, sorted=False)
        weights = top.values.relu().to(self.decoder.dtype)
        return F.embedding_bag(top.indices, self.decoder, per_sample_weights=weights, mode="sum") + self.b_dec


class Sparsify(Plain):
    """EleutherAI's fused encoder and sparse decoder."""

    def forward(self, x: Tensor) -> Tensor:
        encode = peer("sparsify", "fused_encoder").fused_encoder
        utils = peer("sparsify", "utils")
        decode = utils.decoder_impl if x.is_cuda else utils.eager_decode
        out = encode(x - self.b_dec, self.encoder, self.b_enc, self.k, "topk")
        return decode(out.top_indices, out.top_acts.to(self.decoder.dtype), self.decoder.mT) + self.b_dec


class OpenAI(Plain):
    """The Triton decoder of openai/sparse_autoencoder after a dense encoder, as in its train.py."""

    def forward(self, x: Tensor) -> Tensor:
        decoder = peer("sparse_autoencoder", "kernels").TritonDecoderAutograd
        top = F.linear(x - self.b_dec, self.encoder, self.b_enc).topk(self.k, sorted=False)
        weights = top.values.relu().to(self.decoder.dtype)
        return decoder.apply(top.indices, weights, self.decoder.t()) + self.b_dec


def sae_lens(shape: Shape, device: str) -> nn.Module:
    """SAELens's top-k module; its default rescales by the decoder's norms."""
    library = peer("sae_lens")
    config = library.TopKTrainingSAEConfig(d_in=shape.d, d_sae=shape.m, k=shape.k, device=device)
    return library.TopKTrainingSAE(config)


def systems(shape: Shape, device: str) -> dict[str, Callable[[], nn.Module]]:
    """What can be built here, by name."""
    p = problem(shape, device)
    rows, mean = p.W_dec.float(), p.x.float().mean(0)
    found: dict[str, Callable[[], nn.Module]] = {"ours": lambda: Ours(rows, mean, shape.k)}
    if device == "cuda":
        found["ours, fused"] = lambda: Ours(rows, mean, shape.k, fast=True)
    else:
        found["ours, plain top-k"] = lambda: Ours(rows, mean, shape.k, fast=False)
    found["plain torch, embedding_bag"] = lambda: Bag(rows, mean, shape.k)
    found["plain torch, dense"] = lambda: Dense(rows, mean, shape.k)
    if importlib.util.find_spec("sparsify") is not None:
        found["sparsify"] = lambda: Sparsify(rows, mean, shape.k)
    if importlib.util.find_spec("sae_lens") is not None:
        found["SAELens"] = lambda: sae_lens(shape, device)
    if importlib.util.find_spec("sparse_autoencoder") is not None:
        found["OpenAI"] = lambda: OpenAI(rows, mean, shape.k)
    return found


def step_of(module: nn.Module, x: Tensor, device: str) -> Callable[[], float]:
    optimiser = torch.optim.Adam(module.parameters(), lr=1e-4, fused=True)

    def step() -> float:
        optimiser.zero_grad()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
            loss = (module(x).float() - x).square().sum(1).mean()
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return step


def steps(shape: Shape, device: str, rounds: int, limits: dict[str, float]) -> Rows:
    """Milliseconds a step and the ratio to the encoder's product alone; the loss of the first step checks that all
    compute the same (SAELens starts from weights of its own)."""
    p = problem(shape, device)
    x, z = p.x.float(), torch.empty(shape.batch, shape.m, dtype=p.x.dtype, device=device)
    calls: dict[str, tuple[Callable[[], Any], float, float]] = {
        "product": (lambda: torch.addmm(p.b_enc, p.x, p.W_enc, out=z), 2 * shape.batch * shape.d * shape.m, 0)
    }
    losses, failed, peaks = {}, [], {}
    for name, build in systems(shape, device).items():
        try:
            held = torch.cuda.memory_allocated() if device == "cuda" else 0
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            calls[name] = (step_of(build().to(device), x, device), 0, 0)
            losses[name] = calls[name][0]()
            peaks[name] = (torch.cuda.max_memory_allocated() - held) / 2**30 if device == "cuda" else None
        except Exception as error:  # noqa: BLE001  # a peer that does not run here is a finding
            calls.pop(name, None)
            failed.append({"system": name, "failed": f"{type(error).__name__}: {str(error)[:200]}"})
    rows = summary(calls, rounds, device, limits, "product", f"{shape.dtype} TFLOP/s")
    for row in rows:
        for unused in ("TFLOP/s", "of GEMM", "GB/s", "of copy"):
            row.pop(unused)
        row |= {"tokens/s": shape.batch / row["ms"] * 1e3, "first loss": losses.get(row["system"])}
        row |= {"x ours": None, "peak GiB": peaks.get(row["system"]), "failed": None}
    ours = next((row["ms"] for row in rows if row["system"] == "ours"), None)
    for row in rows:
        row["x ours"] = row["ms"] / ours if ours and row["system"] != "product" else None
    empty = dict.fromkeys(rows[0]) if rows else {}
    return rows + [empty | failure for failure in failed]
