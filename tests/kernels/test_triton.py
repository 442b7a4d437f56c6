"""Runs `triton_cases.py`: on the GPU where there is one, interpreted on the CPU otherwise."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent


def test_triton_kernels_equal_their_twins():
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "triton_cases.py")]
    done = subprocess.run(
        command, cwd=HERE.parents[1], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


def test_kernels_import_where_triton_is_absent():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from interp.kernels import dispatch, sparse_autograd, sparse_decode, topk_encode\n"
        "assert not dispatch.HAS_TRITON\n"
        "out = sparse_decode.decode(torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long), torch.ones(2, 3))\n"
        "assert out.tolist() == [[1.0, 1.0, 1.0]]\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=HERE.parents[1], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
