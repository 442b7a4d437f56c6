"""Merged and appended stores hold the rows of their parts, as links, and refuse what does not belong together."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from interp.core.errors import InterpError
from interp.instrument.store import ActivationStore, StoreConfig
from interp.instrument.store_audit import audit
from interp.instrument.store_merge import append, merge
from interp.instrument.tokens import TokenRecord, tokenize
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model

SITES = ["resid_post.1", "z.1"]
CONFIG = StoreConfig(dtype="float32", rows_per_forward=1, shard_tokens=10)
TEXTS = [["hello there, you", "gated units"], ["a", "mmm", "the last of five"], ["something else", "x"]]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def records(model: LoadedModel) -> list[TokenRecord]:
    return [tokenize(model, texts, pad="right") for texts in TEXTS]


@pytest.fixture
def stores(model, records, tmp_path) -> list[ActivationStore]:
    return [ActivationStore.write(model, record, SITES, tmp_path, CONFIG) for record in records]


def test_a_merged_store_is_its_parts_in_order(stores, records, tmp_path):
    whole = merge(stores, tmp_path)
    assert len(whole) == sum(map(len, stores)) and audit(whole.folder) == []
    for site in SITES:
        rows = torch.cat([block for store in stores for block in store.blocks(site)])
        assert torch.equal(torch.cat(list(whole.blocks(site))), rows)
        found = whole.statistics(site)
        torch.testing.assert_close(found.mean, rows.double().flatten(1).mean(0))
        torch.testing.assert_close(found.variance, rows.double().flatten(1).var(0, correction=0))
        at = int(rows.abs().flatten(1).amax(1).argmax())
        ids, row, pos = whole.tokens()
        assert found.top_token[:3] == (int(row[at]), int(pos[at]), int(ids[at]))
    before = 0
    for store, record in zip(stores, records, strict=True):
        size = len(store)
        _, row, _ = whole.tokens()
        lengths = record.lengths.tolist()
        expected = [i + sum(map(len, records[: stores.index(store)])) for i, n in enumerate(lengths) for _ in range(n)]
        assert row[before : before + size].tolist() == expected
        before += size
    assert merge(stores, tmp_path).key == whole.key


def test_shards_are_linked_not_copied_and_outlive_their_parts(stores, tmp_path):
    whole = merge(stores, tmp_path)
    first = whole.folder.local / "shard-00000.safetensors"
    assert first.stat().st_ino == (stores[0].folder.local / "shard-00000.safetensors").stat().st_ino
    for store in stores:
        shutil.rmtree(store.folder.local)
    assert audit(whole.folder) == [] and len(whole.norms("z.1")) == len(whole)


def test_merging_in_steps_is_merging_at_once(stores, tmp_path):
    once = merge(stores, tmp_path / "once")
    steps = merge([merge(stores[:2], tmp_path / "steps"), stores[2]], tmp_path / "steps")
    assert steps.key == once.key
    assert steps.manifest["shards"] == once.manifest["shards"] and steps.manifest["parts"] == once.manifest["parts"]
    for file in once.folder.names():
        if file != "statistics.safetensors":
            assert steps.folder.read(file) == once.folder.read(file), file


def test_appending_captures_only_the_new_rows(model, records, stores, tmp_path):
    calls = []
    other = tmp_path / "elsewhere"
    with model.module.register_forward_pre_hook(lambda *_: calls.append(1)):
        longer = append(stores[0], model, records[1], other, CONFIG)
    assert len(calls) == len(records[1]) and longer.key == merge(stores[:2], tmp_path).key
    assert longer.manifest["rows"] == 5 and [part["rows"] for part in longer.manifest["parts"]] == [2, 3]
    assert longer.key not in {store.key for store in stores}


def test_a_merge_that_was_killed_is_done_again(stores, tmp_path):
    whole = merge(stores, tmp_path)
    expected = {name: whole.folder.read(name) for name in whole.folder.names()}
    for name in ("manifest.json", "shard-00001.json", "shard-00002.safetensors"):
        whole.folder.remove(name)
    again = merge(stores, tmp_path)
    assert {name: again.folder.read(name) for name in again.folder.names()} == expected


def test_stores_of_a_remote_folder_merge_with_local_ones(stores, model, records, tmp_path):
    far = ActivationStore.write(model, records[2], SITES, "memory://test-merge", CONFIG)
    here, there = merge([*stores[:2], far], tmp_path), merge([*stores[:2], far], "memory://test-merge")
    assert here.key == there.key and audit(there.folder) == []
    assert all(here.folder.read(name) == there.folder.read(name) for name in here.folder.names())


def test_where_links_are_not_possible_shards_are_copied(stores, tmp_path, monkeypatch):
    monkeypatch.setattr("pathlib.Path.hardlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links here")))
    whole = merge(stores, tmp_path)
    first = whole.folder.local / "shard-00000.safetensors"
    assert first.stat().st_nlink == 1 and audit(whole.folder) == []


def test_what_does_not_belong_together_is_refused(stores, model, records, tmp_path):
    other_model = tiny_model("llama", seed=1)
    half = StoreConfig(dtype="float16", rows_per_forward=1)
    cases = [
        ([stores[0], ActivationStore.write(model, records[1], SITES[:1], tmp_path, CONFIG)], "differ in sites"),
        ([stores[0], ActivationStore.write(model, records[1], SITES, tmp_path, half)], "differ in dtype"),
        ([stores[0], ActivationStore.write(other_model, records[1], SITES, tmp_path, CONFIG)], "different models"),
        ([stores[0], stores[1], stores[0]], "comes twice"),
        ([merge(stores[:2], tmp_path), stores[1]], "comes twice"),
        ([stores[0]], "1 store given"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for listed, message in cases:
        with pytest.raises(InterpError, match=message):
            merge(listed, tmp_path)
    with pytest.raises(InterpError, match="other weights"):
        append(stores[0], other_model, records[1], tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_equal_shards_of_inputs_that_differ_are_refused(model, records, tmp_path):
    """Two inputs that begin with the same rows."""
    both = tokenize(model, [*TEXTS[0], "and more"], pad="right")
    wide = tokenize(model, [*TEXTS[0], "and other"], pad="right")
    pair = [ActivationStore.write(model, record, SITES, tmp_path, CONFIG) for record in (both, wide)]
    with pytest.raises(InterpError, match=r"shard-00000\.safetensors comes twice"):
        merge(pair, tmp_path)
    assert json.loads(pair[0].folder.read("manifest.json"))["parts"][0]["rows"] == 3
