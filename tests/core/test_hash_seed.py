"""Content hashes see every byte, and seeds separate what is named differently."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from interp.core.hash import DIGITS, hash_bytes, hash_file, hash_json, hash_tensors
from interp.core.progress import listening, track
from interp.core.seed import derive, numpy_generator, torch_generator

DTYPES = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensor_hash_sees_every_value(dtype: torch.dtype) -> None:
    base = {"w": torch.zeros(3, 4, dtype=dtype), "b": torch.zeros(4, dtype=dtype)}
    seen = {hash_tensors(base)}
    for index in range(12):
        changed = {name: tensor.clone() for name, tensor in base.items()}
        changed["w"].view(-1)[index] = 1
        seen.add(hash_tensors(changed))
    assert len(seen) == 13


def test_tensor_hash_sees_name_dtype_and_shape() -> None:
    zeros = torch.zeros(4)
    variants = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.int()},
        {"a": zeros.view(2, 2)},
        {"a": zeros, "b": zeros},
        {"a": zeros[:0]},
        {"a": -zeros},  # minus zero is another number to the bits
    ]
    assert len({hash_tensors(v) for v in variants}) == len(variants)


def test_tensor_hash_ignores_order_strides_grad_and_views() -> None:
    x, y = torch.randn(4, 6), torch.randn(3)
    assert hash_tensors({"x": x, "y": y}) == hash_tensors([("y", y), ("x", x)])
    assert hash_tensors({"x": x.T.contiguous().T}) == hash_tensors({"x": x})
    assert hash_tensors({"x": x[1:3]}) == hash_tensors({"x": x[1:3].clone()})
    assert hash_tensors({"x": x.clone().requires_grad_()}) == hash_tensors({"x": x})
    assert hash_tensors({"s": torch.tensor(2.0)}) != hash_tensors({"s": torch.tensor(3.0)})


def test_bytes_files_and_json(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc" * 100_000)
    assert hash_file(tmp_path / "f") == hash_bytes(b"abc" * 100_000) == hash_bytes(b"abc" * 50_000, b"abc" * 50_000)
    assert hash_bytes() == hash_bytes(b"")
    assert hash_json({"a": 1, "b": [2, 3]}) == hash_json({"b": [2, 3], "a": 1})
    assert hash_json({"a": 1}) != hash_json({"a": "1"})
    # SHA-256 of nothing, from the standard
    assert hash_bytes() == "e3b0c44298fc1c14"[:DIGITS]


def test_seeds_are_stable_and_separate() -> None:
    seeds = {derive(seed, *labels) for seed in range(20) for labels in ((), ("a",), ("b",), ("a", 1), ("a", 2))}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert derive(0, "a") == derive(0, "a")


def test_generators_draw_alike_and_leave_the_global_state_alone() -> None:
    before_torch, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    assert torch.equal(
        torch.randn(5, generator=torch_generator(3, "x")), torch.randn(5, generator=torch_generator(3, "x"))
    )
    assert (numpy_generator(3, "x").normal(size=5) == numpy_generator(3, "x").normal(size=5)).all()
    assert not torch.equal(
        torch.randn(5, generator=torch_generator(3, "x")), torch.randn(5, generator=torch_generator(3, "y"))
    )
    assert torch.equal(before_torch, torch.get_rng_state())
    assert (np.random.get_state()[1] == before_numpy).all()


def test_neighbouring_seeds_are_not_correlated() -> None:
    draws = np.stack([numpy_generator(seed, "x").normal(size=2000) for seed in range(8)])
    correlation = np.corrcoef(draws) - np.eye(8)
    assert np.abs(correlation).max() < 0.1


def test_progress_tells_each_step_and_stops_listening() -> None:
    heard: list[tuple[str, int, int]] = []
    with listening(lambda *step: heard.append(step)):
        assert list(track("ab", "letters")) == ["a", "b"]
        assert list(track([], "nothing")) == []
    assert heard == [("letters", 0, 2), ("letters", 1, 2), ("letters", 2, 2), ("nothing", 0, 0)]
    assert list(track("ab", "letters")) == ["a", "b"]
    assert len(heard) == 4
    with pytest.raises(RuntimeError), listening(lambda *step: heard.append(step)):
        raise RuntimeError
    list(track("ab", "letters"))
    assert len(heard) == 4
