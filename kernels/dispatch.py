"""Which implementation runs: the Triton kernel on a GPU, the eager twin everywhere else.

The eager twin is the specification. It is also what runs for float64 (the kernels accumulate in float32) and for
widths and dtypes that no kernel covers, so that a caller never has to ask.
"""

import torch
from torch import Tensor

try:
    import triton  # noqa: F401

    HAS_TRITON = True
except ModuleNotFoundError:  # Windows, macOS, or a CPU-only install
    HAS_TRITON = False

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_triton(*tensors: Tensor) -> bool:
    """Whether every tensor lives on a GPU in a dtype that the kernels take."""
    return HAS_TRITON and all(t.is_cuda and t.dtype in KERNEL_DTYPES for t in tensors)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which sums are formed: float64 stays, everything else is summed in float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_codes(values: Tensor, indices: Tensor, d_dict: int) -> None:
    """Shapes only: values and indices are both [batch, k]. Reading the indices would stall a GPU."""
    if values.ndim != 2 or values.shape != indices.shape:
        raise ValueError(f"values {tuple(values.shape)} and indices {tuple(indices.shape)} must both be [batch, k]")
    if indices.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"indices are {indices.dtype}, expected int32 or int64")
    if values.shape[1] > 0 and d_dict == 0:
        raise ValueError("codes with k > 0 need a dictionary with at least one row")


def plain(device: torch.device) -> torch.autocast:
    """Autocast off: what is inside chooses its own types."""
    return torch.autocast(device.type, enabled=False)


def one_type(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """The operands of a product in one dtype: autocast's on an accelerator, otherwise the widest of theirs.

    On a CPU autocast changes nothing: float32 selection runs on bfloat16 products there anyway, and stays exact.
    """
    device, dtype = x.device.type, x.dtype
    if device != "cpu" and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    else:
        for weight in weights:
            dtype = torch.promote_types(dtype, weight.dtype)
    return tuple(t.to(dtype) for t in (x, *weights))
