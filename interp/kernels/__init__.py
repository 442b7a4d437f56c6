"""Triton kernels, each beside its eager twin, which is its specification and its CPU path.

The files live in the top-level folder `kernels/` of the repository. A wheel has them copied in here; in a checkout
this file appends that folder to its own search path. The folder has no `__init__.py` and is never importable as
`kernels`: another distribution owns that name, and transformers imports it.
"""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).resolve().parents[2]

if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "kernels").is_dir():
    __path__.append(str(_ROOT / "kernels"))
