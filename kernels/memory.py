"""Keeping freed memory in the process, so that it need not be paged in again.

torch's CPU allocations of more than 32 MiB come straight from the system (glibc's mmap) and go back to it when they
are freed; every step of a wide dictionary then pays a page fault for each 4 KiB of its gradients. glibc can be told to
keep such memory instead. It is one setting for the whole process, so nothing here calls it: a program that trains does,
once, at its start. Buffers that one can hold on to are better held (`interp.kernels.workspace`); gradients, which
autograd allocates anew in every step, cannot be.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
MOST = 2**31 - 1
"""Bytes of free memory at the end of the heap that glibc keeps before it gives some back; its largest setting."""


def keep_freed_memory() -> bool:
    """From now on, reuse freed memory of any size. False where the C library has no such setting."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, MOST))
