"""Freed memory is kept: counted in page faults, in a process of its own, since the setting holds for a process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = """
import resource, sys
import torch
from interp.kernels.memory import keep_freed_memory

keep = sys.argv[1] == "keep"
keep = keep and keep_freed_memory()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for round in range(8):
    if round == 4:
        before = faults()
    torch.ones(2**24)  # 64 MiB, 16384 pages of 4 KiB
print(faults() - before, int(keep))
"""


def test_large_allocations_are_paged_in_once():
    found = {}
    for how in ("keep", "give back"):
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, how],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        faults, kept = map(int, done.stdout.split())
        found[how] = faults if kept or how == "give back" else 0  # nothing to set: another C library
    assert found["keep"] < 1000
    # with huge pages everywhere there would have been nothing to gain
    assert found["give back"] < 1000 or found["give back"] > 20 * found["keep"]
