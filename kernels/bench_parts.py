"""What `bench.py` measures: correctness, ceilings, single kernels, tile sizes."""

import datetime
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from interp.kernels.batch_encode import batch_topk_encode, groupmax_encode, threshold_encode
from interp.kernels.dispatch import HAS_TRITON
from interp.kernels.fused_encode import choose_groups, fused_groupmax, fused_topk, two_pass_topk
from interp.kernels.segments import by_latent
from interp.kernels.sparse_autograd import sparse_decode, sparse_encode
from interp.kernels.sparse_decode import decode
from interp.kernels.sparse_grad import rows_grad, values_grad
from interp.kernels.topk_encode import topk_encode, topk_encode_eager
from interp.kernels.workspace import Workspace
from torch import Tensor

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Shape:
    name: str
    device: str
    batch: int
    d: int
    m: int
    k: int
    dtype: str


SHAPES = (
    Shape("cpu-8192", "cpu", 2048, 576, 8192, 32, "float32"),
    Shape("cpu-32768", "cpu", 2048, 576, 32768, 32, "float32"),
    Shape("gpu-small", "cuda", 4096, 576, 32768, 32, "float32"),
    Shape("gpu-medium", "cuda", 8192, 2304, 65536, 64, "bfloat16"),
    Shape("gpu-large", "cuda", 8192, 4096, 131072, 64, "bfloat16"),
    Shape("tiny", "any", 256, 64, 1024, 8, "float32"),
)


@dataclass(frozen=True)
class Problem:
    """Inputs with the spectrum of real activations: a few strong directions, a long tail, mean norm sqrt(d)."""

    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor


def problem(shape: Shape, device: str, seed: int = 0) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    strength = torch.arange(1, shape.d + 1).float().rsqrt()
    x = torch.randn(shape.batch, shape.d, generator=generator) * strength
    x = x * shape.d**0.5 / x.norm(dim=1).mean()
    x = x[:, torch.randperm(shape.d, generator=generator)]
    on_device = torch.Generator(device).manual_seed(seed)
    rows = torch.randn(shape.m, shape.d, generator=on_device, device=device)
    rows = torch.nn.functional.normalize(rows, dim=1).to(getattr(torch, shape.dtype))
    b_enc = torch.zeros(shape.m, device=device, dtype=rows.dtype)
    return Problem(x.to(rows), rows.t(), b_enc, rows.clone())


def machine(device: str) -> dict[str, Any]:
    """What a figure must stand beside."""
    on_gpu = device == "cuda"
    triton = __import__("triton").__version__ if HAS_TRITON else "none"
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if on_gpu else torch.cpu.get_capabilities().get("cpu_name", "CPU"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": triton,
        "python": platform.python_version(),
    }


def timed(systems: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, list[float]]:
    """Milliseconds of each, in turn, after one warm-up round."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in systems}
    for turn in range(rounds + 1):
        for name, call in systems.items():
            wait()
            start = time.perf_counter()
            call()
            wait()
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def check(device: str) -> Rows:
    """Every public function against float64, in every type, on an awkward shape."""
    found: Rows = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32,):
        shape = Shape("check", device, 67, 40, 1100, 6, str(dtype).removeprefix("torch."))
        p = problem(shape, device)
        z = p.x.double() @ p.W_enc.double() + p.b_enc.double()
        best = z.topk(shape.k).values
        step = 1e-5 if dtype == torch.float32 else 2e-2
        encoders: dict[str, Callable[[], tuple[Tensor, ...]]] = {
            "topk plain": lambda p=p: topk_encode_eager(p.x, p.W_enc, p.b_enc, 6),
            "topk fast": lambda p=p: topk_encode(p.x, p.W_enc, p.b_enc, 6, Workspace(fast=True)),
        }
        if device == "cuda":
            encoders["topk two-pass"] = lambda p=p: two_pass_topk(p.x @ p.W_enc + p.b_enc, 6, Workspace())
        for name, encode in encoders.items():
            values, indices = encode()
            error = (values.double().sort(1, descending=True).values - best).abs().max()
            error = torch.maximum(error, (z.gather(1, indices) - values.double()).abs().max())
            found.append(_verdict(f"{name} {shape.dtype}", error / z.abs().max(), step))
        values, indices = encoders["topk plain"]()
        found += _check_sparse(p, values, indices, step, shape.dtype)
        k_total, level = 400, float(z.flatten().topk(401).values[-2:].mean())  # between two values, not on one
        for name, (selected, chosen) in {
            "batch top-k": batch_topk_encode(p.x, p.W_enc, p.b_enc, k_total, Workspace(fast=True))[:2],
            "threshold": threshold_encode(p.x, p.W_enc, p.b_enc, level, Workspace(fast=True)),
        }.items():
            error = (selected.double().sum() - z[z >= level].sum()).abs() / z[z >= level].sum()
            error = torch.maximum(error, (z.gather(1, chosen) * (selected != 0) - selected.double()).abs().max())
            found.append(_verdict(f"{name} {shape.dtype}", error, step * 4))
        selected, _ = groupmax_encode(p.x, p.W_enc, p.b_enc, 11)
        found.append(_verdict(f"group-max {shape.dtype}", (selected - z.view(67, 11, 100).amax(2)).abs().max(), step))
    return found


def _check_sparse(p: Problem, values: Tensor, indices: Tensor, step: float, name: str) -> Rows:
    """Decode and every gradient of sum(x_hat * g) against dense float64 autograd."""
    x, W_enc, b_enc, W_dec = (t.detach().clone().requires_grad_() for t in (p.x, p.W_enc, p.b_enc, p.W_dec))
    X, E, B, D = (t.detach().double().requires_grad_() for t in (p.x, p.W_enc, p.b_enc, p.W_dec))
    mask = torch.zeros(len(x), p.W_enc.shape[1], dtype=torch.float64, device=x.device).scatter_(1, indices, 1.0)
    expected = ((X @ E + B) * mask).relu() @ D
    out = sparse_decode(sparse_encode(x, W_enc, b_enc, values, indices), indices, W_dec)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    ours = torch.autograd.grad((out * weight).sum(), (x, W_enc, b_enc, W_dec))
    theirs = torch.autograd.grad((expected * weight.double()).sum(), (X, E, B, D))
    pairs = {"decode": (out, expected)} | dict(
        zip(("to x", "to W_enc", "to b_enc", "to W_dec"), zip(ours, theirs, strict=True), strict=True)
    )
    return [_verdict(f"{n} {name}", (a - b).abs().max() / b.abs().max(), step) for n, (a, b) in pairs.items()]


def _verdict(name: str, error: Tensor, allowed: float) -> dict[str, Any]:
    error = error.detach()
    return {"check": name, "error": float(error), "allowed": allowed, "ok": bool(float(error) <= allowed)}


def ceilings(device: str, rounds: int) -> dict[str, float]:
    """GB/s of a copy (read and written), TFLOP/s of square products."""
    side = 8192 if device == "cuda" else 2048
    source = torch.empty(2**28 if device == "cuda" else 2**26, device=device).fill_(1.0)
    target = torch.empty_like(source)
    square = {t: torch.randn(side, side, device=device).to(t) for t in (torch.float32, torch.bfloat16)}
    out = {t: torch.empty_like(s) for t, s in square.items()}
    systems = {"copy GB/s": lambda: target.copy_(source)}
    for dtype in square:
        systems[f"{dtype} TFLOP/s".removeprefix("torch.")] = lambda t=dtype: torch.mm(square[t], square[t], out=out[t])
    times = timed(systems, rounds, device)
    best = {name: statistics.median(found) for name, found in times.items()}
    return {
        name: 2 * source.numel() * 4 / ms / 1e6 if "GB" in name else 2 * side**3 / ms / 1e9 for name, ms in best.items()
    }


def kernels(shape: Shape, device: str, rounds: int, limits: dict[str, float]) -> Rows:
    """Every kernel beside its alternatives; ratios are to the plain product in the dtype of the inputs."""
    p, s = problem(shape, device), getattr(torch, shape.dtype).itemsize
    batch, d, m, k = shape.batch, shape.d, shape.m, shape.k
    fast, plain = Workspace(fast=True if device == "cuda" else None), Workspace(fast=False)
    z = torch.empty(batch, m, dtype=p.x.dtype, device=device)
    values, indices = topk_encode(p.x, p.W_enc, p.b_enc, k, plain)
    values, grad, segments = values.relu(), torch.randn_like(p.x), by_latent(indices, m)
    level = float(values.amin(1).mean())
    product, gather = 2 * batch * d * m, batch * k * d * s
    systems: dict[str, tuple[Callable[[], Any], float, float]] = {
        "product": (lambda: torch.addmm(p.b_enc, p.x, p.W_enc, out=z), product, 0),
        "top-k plain": (lambda: topk_encode(p.x, p.W_enc, p.b_enc, k, plain), product, 0),
        "batch top-k plain": (lambda: batch_topk_encode(p.x, p.W_enc, p.b_enc, k * batch, plain), product, 0),
        "threshold plain": (lambda: threshold_encode(p.x, p.W_enc, p.b_enc, level, plain), product, 0),
        "group-max plain": (lambda: groupmax_encode(p.x, p.W_enc, p.b_enc, k, plain), product, 0),
        "decode": (lambda: decode(values, indices, p.W_dec), 2 * batch * k * d, gather + batch * d * s),
        "gradient to values": (lambda: values_grad(grad, indices, p.W_dec), 2 * batch * k * d, gather + batch * d * s),
        "order by latent": (lambda: by_latent(indices, m), 0, batch * k * 16),
        "gradient to rows": (
            lambda: rows_grad(values, indices, grad, m, segments), 2 * batch * k * d, gather + m * d * 4,
        ),
    }  # fmt: skip
    if device == "cpu":
        for name, call in (
            ("top-k certified", lambda: topk_encode(p.x, p.W_enc, p.b_enc, k, fast)),
            ("batch top-k certified", lambda: batch_topk_encode(p.x, p.W_enc, p.b_enc, k * batch, fast)),
            ("threshold certified", lambda: threshold_encode(p.x, p.W_enc, p.b_enc, level, fast)),
        ):
            systems[name] = (call, product, 0)
    elif choose_groups(k, m):
        systems["top-k fused"] = (lambda: fused_topk(p.x, p.W_enc, p.b_enc, k, fast), product, 0)
        systems["top-k two-pass"] = (
            lambda: two_pass_topk(torch.addmm(p.b_enc, p.x, p.W_enc, out=z), k, fast), product, 0,
        )  # fmt: skip
        systems["group-max fused"] = (lambda: fused_groupmax(p.x, p.W_enc, p.b_enc, k), product, 0)
    rows = summary(systems, rounds, device, limits, "product", f"{shape.dtype} TFLOP/s")
    for row in rows:
        row["fallback"] = fast.counters.fallback_rate if row["system"] in ("top-k certified", "top-k fused") else None
    return rows


def summary(
    systems: dict[str, tuple[Callable[[], Any], float, float]],
    rounds: int, device: str, limits: dict[str, float], base: str, ceiling: str,
) -> Rows:  # fmt: skip
    """Median, least and greatest milliseconds, the ratio to one of them, and achieved rates beside the ceilings."""
    times = timed({name: call for name, (call, _, _) in systems.items()}, rounds, device)
    unit = statistics.median(times[base])
    rows: Rows = []
    for name, (_, flop, traffic) in systems.items():
        ms = statistics.median(times[name])
        rows.append({
            "system": name, "ms": ms, "min": min(times[name]), "max": max(times[name]), "ratio": ms / unit,
            "TFLOP/s": flop / ms / 1e9 if flop else None,
            "of GEMM": flop / ms / 1e9 / limits[ceiling] if flop and not traffic else None,
            "GB/s": traffic / ms / 1e6 if traffic else None,
            "of copy": traffic / ms / 1e6 / limits["copy GB/s"] if traffic else None,
        })  # fmt: skip
    return rows


TILES = tuple(
    {"BM": bm, "BN": bn, "BK": 64, "num_warps": warps, "num_stages": stages}
    for bm, bn, warps, stages in (
        (128, 128, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (128, 256, 8, 3), (128, 256, 8, 4), (256, 128, 8, 3),
    )
)  # fmt: skip


def tiles(shape: Shape, device: str, rounds: int, limits: dict[str, float]) -> Rows:
    """The fused encoder with other tile sizes, for whoever tunes it; on a GPU in half precision only."""
    if device != "cuda" or shape.dtype == "float32":
        return []
    p = problem(shape, device)
    z = torch.empty(shape.batch, shape.m, dtype=p.x.dtype, device=device)
    product = 2 * shape.batch * shape.d * shape.m
    systems: dict[str, tuple[Callable[[], Any], float, float]] = {
        "product": (lambda: torch.addmm(p.b_enc, p.x, p.W_enc, out=z), product, 0)
    }
    for tile in TILES:
        call = lambda tile=tile: fused_topk(p.x, p.W_enc, p.b_enc, shape.k, Workspace(), tile)  # noqa: E731
        try:
            call()
        except Exception as error:  # noqa: BLE001  # a tile that this device cannot hold is left out
            systems[f"{tile} failed: {type(error).__name__}"] = (lambda: None, 0, 0)
        else:
            systems[" ".join(f"{n}={v}" for n, v in tile.items())] = (call, product, 0)
    return summary(systems, rounds, device, limits, "product", f"{shape.dtype} TFLOP/s")
