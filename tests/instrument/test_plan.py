"""The plan's numbers against the store that is then written, and what is refused."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from interp.core.errors import InterpError
from interp.instrument import plan as planning
from interp.instrument.packing import bucketed, pad
from interp.instrument.plan import plan_capture, size_text
from interp.instrument.store import ActivationStore, StoreConfig
from interp.instrument.stream import RecordBatches
from interp.instrument.tokens import from_ids
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


def _batches(model: LoadedModel, rows: int = 24) -> RecordBatches:
    ids = torch.randint(0, 256, (rows, 40), generator=torch.Generator().manual_seed(0))
    return RecordBatches(from_ids(model, ids), 4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_bytes_on_disk_are_those_of_the_store(model: LoadedModel, tmp_path: Path, dtype: str) -> None:
    batches, sites = _batches(model), model.resolve(["resid_post.*", "z.1", "gate.0"])
    config = StoreConfig(dtype=dtype, shard_tokens=320)
    made = plan_capture(model, batches, sites, config, tmp_path)
    store = ActivationStore.write(model, batches, sites, tmp_path, config)
    really = sum(path.stat().st_size for path in store.folder.local.iterdir())
    assert made.n_tokens == len(store) == 960
    assert made.n_shards == len(store.sizes) == 3
    assert made.disk_bytes == pytest.approx(really, rel=0.02)
    assert made.seconds == pytest.approx(960 / made.tokens_per_second)


def test_padding_is_not_counted(model: LoadedModel, tmp_path: Path) -> None:
    documents = [[1] * n for n in (3, 60, 20, 9, 41, 5)]
    batches, sites = bucketed(pad(model, documents, 50), 2), model.resolve("resid_post.1")
    made = plan_capture(model, batches, sites, StoreConfig(dtype="float32"), tmp_path)
    store = ActivationStore.write(model, batches, sites, tmp_path, StoreConfig(dtype="float32"))
    assert made.n_tokens == len(store) == 3 + 50 + 20 + 9 + 41 + 5
    really = sum(path.stat().st_size for path in store.folder.local.iterdir())
    assert made.disk_bytes == pytest.approx(really, rel=0.1)  # rows are few, the fixed part counts


def test_memory_grows_with_the_shards(model: LoadedModel) -> None:
    batches, sites = _batches(model, 200), model.resolve("resid_post.*")
    small, large = (
        plan_capture(model, batches, sites, StoreConfig(dtype="float32", shard_tokens=n, shard_bytes=1 << 40))
        for n in (160, 8000)
    )
    assert large.memory_bytes - small.memory_bytes > 2 * (8000 - 160) * 3 * 32 * 4 * 0.8


def test_a_full_disk_is_refused_with_what_fits(
    model: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, sites, config = _batches(model), model.resolve("resid_post.*"), StoreConfig(dtype="float32")
    fits = plan_capture(model, batches, sites, config, tmp_path)
    assert fits.check() is fits
    monkeypatch.setattr(planning, "disk_usage", lambda _: SimpleNamespace(free=fits.disk_bytes // 2))
    made = plan_capture(model, batches, sites, config, tmp_path / "not" / "yet")
    (reason,) = made.refusals
    assert "--tokens 43" in reason and "--store-dtype int8" in reason  # 0.45 of 960
    with pytest.raises(InterpError, match="will not fit: it needs"):
        made.check()
    assert plan_capture(model, batches, sites, config, None).disk_free is None


def test_too_little_memory_is_refused(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    made = plan_capture(model, _batches(model), model.resolve("resid_post.*"), StoreConfig())
    (reason,) = made.refusals
    assert "of memory" in reason and "--rows-per-forward" in reason


def test_processes_share_the_memory(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, sites = _batches(model, 200), model.resolve("resid_post.*")
    one = plan_capture(model, batches, sites, StoreConfig())
    assert not one.refusals
    growth = one.memory_bytes - planning.psutil.Process().memory_info().rss
    assert growth > 0
    free = int(5 * growth / planning.SPARE + one.memory_bytes * (1 / planning.SPARE - 1))
    monkeypatch.setattr(planning.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    assert not plan_capture(model, batches, sites, StoreConfig(), n_processes=2).refusals
    (reason,) = plan_capture(model, batches, sites, StoreConfig(), n_processes=20).refusals
    assert "fewer processes" in reason


def test_sizes_are_readable() -> None:
    assert [size_text(n) for n in (12, 1500, 2.5e6, 7.25e9, 3e12)] == ["12 B", "1.5 kB", "2.5 MB", "7.2 GB", "3.0 TB"]
