"""Sampled products: out[n] = left[b] . right[columns[n]] for the pairs (b, columns[n]) of a CSR pattern.

Row b owns the entries starts[b] .. starts[b+1]; rows may have any number of entries, in any order, repeats allowed.
Each entry is one dot product over the same order of coordinates, so its value does not depend on which other entries
are asked for, on the batch or on the number of threads. A product of two matrices gives no such promise.

On a CPU `torch.sparse.sampled_addmm` does this without gathering rows, and takes twice the time of a gather of the
same bytes; `(right[columns] * left[rows]).sum(-1)`, the specification, writes and reads the gathered rows besides.
Traps: torch calls its CSR layout beta and says so once per process; the warning is swallowed on first use. It refuses
more entries than the matrix has places (torch 2.13), which repeats can give: those go through the specification.
"""

import functools
import warnings

import torch
from torch import Tensor

INT32_MAX = 2**31 - 1


def sampled_eager(left: Tensor, right: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """The specification: left [batch, d], right [m, d], starts [batch + 1], columns [n] -> [n]."""
    counts = starts.diff()
    rows = torch.repeat_interleave(torch.arange(left.shape[0], device=left.device), counts, output_size=len(columns))
    return (left[rows] * right[columns]).sum(-1)


@functools.cache
def _announce_once() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.zeros(1, 1).to_sparse_csr()


def sampled_product(left: Tensor, right: Tensor, starts: Tensor, columns: Tensor) -> Tensor:
    """`sampled_eager` at full speed on a CPU, float32 or float64. Not differentiable."""
    places = left.shape[0] * right.shape[0]
    if left.device.type != "cpu" or not 0 < columns.numel() <= places:
        return sampled_eager(left, right, starts, columns)
    _announce_once()
    if max(columns.numel(), *right.shape) <= INT32_MAX:
        starts, columns = starts.int(), columns.int()
    with torch.no_grad():
        zeros = torch.zeros(columns.numel(), dtype=left.dtype)
        pattern = torch.sparse_csr_tensor(
            starts, columns, zeros, size=(left.shape[0], right.shape[0]), check_invariants=False
        )
        return torch.sparse.sampled_addmm(pattern, left, right.t(), beta=0.0).values()
