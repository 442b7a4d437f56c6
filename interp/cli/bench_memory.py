"""Peak memory of one call: the largest resident set while it ran, above what was resident before it.

Linux keeps the peak per process (VmHWM) and lets a process set it back (`/proc/self/clear_refs`, value 5). Memory the
allocator has freed but not returned would hide in the level before, so it is returned first (`malloc_trim`). What a
system holds permanently (its own copy of the model, reused buffers) is in the level before, not in the peak.
"""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes(run: Callable[[], T]) -> tuple[T, int | None]:
    """What `run` returns, and its peak above the level before; `None` where the system does not tell."""
    gc.collect()
    _trim()
    try:
        _CLEAR.write_text("5")
        before = _status("VmRSS")
    except OSError:
        return run(), None
    result = run()
    return result, max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {name}")
    return int(found[1]) * 1024


def _trim() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
