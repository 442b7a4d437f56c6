"""The store holds exactly what a capture sees, reads back shuffled without repeats, and refuses damage by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from interp.core.errors import ArtefactError, InterpError
from interp.instrument.capture import capture
from interp.instrument.edits import edited, zero
from interp.instrument.shards import MANIFEST
from interp.instrument.store import ActivationStore, StoreConfig
from interp.instrument.tokens import TokenRecord, from_ids, tokenize
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model

SITES = ["resid_post.1", "neurons.0", "z.1"]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def record(model: LoadedModel) -> TokenRecord:
    return tokenize(model, ["hello there, you", "a", "gated units", "mmm", "the last of five"], pad="right")


@pytest.fixture
def store(model: LoadedModel, record: TokenRecord, tmp_path: Path) -> ActivationStore:
    config = StoreConfig(dtype="float32", rows_per_forward=2, shard_tokens=10)
    return ActivationStore.write(model, record, SITES, tmp_path, config)


def test_it_holds_what_a_capture_sees_and_the_tokens_beside_it(store, model, record):
    assert len(store.sizes) > 1 and len(store) == record.n_tokens
    with capture(model, SITES) as acts:
        model(record)
    for site in SITES:
        expected = acts[site][record.mask]
        torch.testing.assert_close(torch.cat(list(store.blocks(site, 3))), expected, rtol=1e-5, atol=1e-5)
    ids, row, pos = store.tokens()
    assert torch.equal(ids, record.ids[record.mask])
    assert torch.equal(record.ids[row, pos], ids) and bool(record.mask[row, pos].all())
    assert torch.equal(store.norms("resid_post.1"), torch.cat(list(store.blocks("resid_post.1"))).norm(dim=1))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_values_are_rounded_to_the_dtype_once(model, record, tmp_path, dtype):
    config = StoreConfig(dtype=dtype, rows_per_forward=len(record))
    store = ActivationStore.write(model, record, "resid_post.1", tmp_path, config)
    with capture(model, "resid_post.1") as acts:
        model(record)
    found = torch.cat(list(store.blocks("resid_post.1")))
    assert found.dtype == getattr(torch, dtype)
    assert torch.equal(found, acts["resid_post.1"][record.mask].to(found.dtype))


def test_batches_visit_every_token_once_an_epoch_in_an_order_of_the_seed(store):
    all_rows = torch.cat(list(store.blocks("neurons.0")))
    n = len(store)
    epoch = torch.cat(list(store.batches("neurons.0", 1, seed=3, n_epochs=1)))
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, all_rows.tolist()))
    assert not torch.equal(epoch, all_rows)
    assert torch.equal(epoch, torch.cat(list(store.batches("neurons.0", 1, seed=3, n_epochs=1))))
    assert not torch.equal(epoch, torch.cat(list(store.batches("neurons.0", 1, seed=4, n_epochs=1))))
    two = torch.cat(list(store.batches("neurons.0", 7, seed=3, n_epochs=2)))
    assert len(two) == 7 * (2 * n // 7)  # what is left of one epoch opens the next
    assert torch.equal(two[:n], epoch) and not torch.equal(two[n : n + 7], epoch[:7])


def test_batches_may_be_longer_than_the_store_and_leave_tokens_out(store):
    keep = store.tokens()[2] > 0
    stream = store.batches("resid_post.1", 5 * len(store), seed=0, keep=keep)
    batch = next(stream)
    assert len(batch) == 5 * len(store)
    allowed = set(map(tuple, torch.cat(list(store.blocks("resid_post.1")))[keep].tolist()))
    assert set(map(tuple, batch.tolist())) == allowed


def test_sharding_and_forward_size_do_not_matter(model, record, tmp_path):
    one = ActivationStore.write(model, record, SITES, tmp_path / "a", StoreConfig(dtype="float32", rows_per_forward=5))
    many = ActivationStore.write(
        model, record, SITES, tmp_path / "b", StoreConfig(dtype="float32", rows_per_forward=1, shard_tokens=1)
    )
    assert one.key == many.key and len(one.sizes) == 1 and len(many.sizes) == 5
    for site in SITES:
        first, second = next(one.batches(site, 9, seed=1)), next(many.batches(site, 9, seed=1))
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_the_key_is_the_content(store, model, record, tmp_path):
    calls = []
    handle = model.module.register_forward_hook(lambda *_: calls.append(1))
    try:
        again = ActivationStore.write(model, record, list(reversed(SITES)), tmp_path, StoreConfig(dtype="float32"))
    finally:
        handle.remove()
    assert again.key == store.key and not calls  # reused: no forward
    other_ids = record.ids.clone()
    other_ids[0, 0] += 1
    changed = [
        ActivationStore.write(model, replace(record, ids=other_ids), SITES, tmp_path, StoreConfig(dtype="float32")),
        ActivationStore.write(model, record, SITES[:1], tmp_path, StoreConfig(dtype="float32")),
        ActivationStore.write(model, record, SITES, tmp_path, StoreConfig(dtype="bfloat16")),
        ActivationStore.write(tiny_model("llama", seed=1), record, SITES, tmp_path, StoreConfig(dtype="float32")),
    ]
    assert len({store.key, *(s.key for s in changed)}) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted({store.key, *(s.key for s in changed)})


def _rewrite(folder: Path, **changes: object) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | changes))


def _flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "shard-00000.safetensors").unlink(), "shard-00000.safetensors is missing"),
        (lambda f: (f / "shard-00000.safetensors").write_bytes(b"1234"), "truncated"),
        (lambda f: _flip(f / "shard-00001.safetensors"), "shard-00001.safetensors does not match its checksum"),
        (lambda f: (f / MANIFEST).unlink(), "is not an activation store"),
        (lambda f: (f / MANIFEST).write_text("{"), "damaged or foreign"),
        (lambda f: (f / MANIFEST).write_text("[1]"), "damaged or foreign"),
        (lambda f: (f / MANIFEST).write_text('{"format": 1}'), "not the manifest of an activation store"),
        (lambda f: _rewrite(f, version=2), "has version 2, this release reads 1"),
        (lambda f: _rewrite(f, tokens=1), "contradicts itself"),
        (lambda f: _rewrite(f, dtype="int8"), "contradicts itself"),
        (
            lambda f: _rewrite(f, tokens=1, shards=[{"file": "../x", "tokens": 1, "bytes": 1, "sha256": ""}]),
            "names a shard outside its folder",
        ),
    ],
)
def test_damage_is_named(store, damage, message):
    damage(store.folder)
    with pytest.raises(ArtefactError, match=message):
        ActivationStore.open(store.folder, verify=True)


def test_a_shard_with_a_foreign_header_is_named(store):
    path = store.folder / "shard-00000.safetensors"
    path.write_bytes(b"\x00" * path.stat().st_size)
    with pytest.raises(ArtefactError, match="is damaged"):
        ActivationStore.open(store.folder).norms("neurons.0")


def test_a_failed_capture_leaves_nothing(model, record, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "interp.instrument.shards.save_file", lambda *_: (_ for _ in ()).throw(OSError("No space left"))
    )
    with pytest.raises(ArtefactError, match="No space left"):
        ActivationStore.write(model, record, SITES, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_overflow_is_refused(record, tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.module.get_input_embeddings().weight.mul_(1e6)
    with pytest.raises(InterpError, match=r"resid_post\.1 does not fit float16"):
        ActivationStore.write(model, record, "resid_post.1", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_edited_activations_are_not_stored_under_the_name_of_the_untouched_model(model, record, tmp_path):
    with pytest.raises(InterpError, match="an edit of this model is open"), edited(model, zero("resid_post.0")):
        ActivationStore.write(model, record, "resid_post.1", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.batches("resid_post.2", 4, seed=0), "unknown stored site 'resid_post.2'; nearest: resid_post.1"),
        (lambda s: s.batches("neurons.0", 0, seed=0), "batch_size=0"),
        (lambda s: s.batches("neurons.0", 1000, seed=0, n_epochs=1), "exceeds the"),
        (lambda s: s.batches("neurons.0", 4, seed=0, keep=torch.zeros(len(s), dtype=torch.bool)), "no token is left"),
        (lambda s: s.batches("neurons.0", 4, seed=0, keep=torch.ones(2, dtype=torch.bool)), "keep has 2 entries"),
        (lambda s: s.take("neurons.0", torch.tensor([len(s)])), "token numbers"),
        (lambda s: StoreConfig(dtype="int8"), "unknown store dtype 'int8'"),
    ],
)
def test_bad_input_is_named(store, call, message):
    with pytest.raises(InterpError, match=message):
        call(store)


def test_sites_without_a_position_axis_are_refused(model, tmp_path):
    with pytest.raises(InterpError, match="batch, pos"):
        ActivationStore.write(model, from_ids(model, [[1, 2, 3]]), "pattern.0", tmp_path)
