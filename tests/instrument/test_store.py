"""The store holds exactly what a capture sees, reads back shuffled without repeats, and refuses damage by name."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch
from safetensors import safe_open
from torch import nn

from interp.core.errors import InterpError
from interp.instrument.capture import capture
from interp.instrument.edits import edited, zero
from interp.instrument.shards import shard_name
from interp.instrument.store import ActivationStore, StoreConfig
from interp.instrument.stream import Batch
from interp.instrument.tokens import TokenRecord, from_ids, tokenize
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model
from interp.tasks.corpora_inputs import load_inputs

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
    small = StoreConfig(dtype="float32", rows_per_forward=1, shard_bytes=1)
    assert len(ActivationStore.write(model, record, SITES, tmp_path / "c", small).sizes) == 5
    for site in SITES:
        first, second = next(one.batches(site, 9, seed=1)), next(many.batches(site, 9, seed=1))
        torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


def test_the_key_is_the_content(store, model, record, tmp_path):
    before = model.hub.n_forward
    again = ActivationStore.write(model, record, list(reversed(SITES)), tmp_path, StoreConfig(dtype="float32"))
    assert again.key == store.key and model.hub.n_forward == before  # reused: no forward
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


def test_half_precision_overflow_is_refused(record, tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.module.get_input_embeddings().weight.mul_(1e6)
    with pytest.raises(InterpError, match=r"resid_post\.1 does not fit float16: .* at row 0, position 0, token id \d+"):
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
        (lambda s: s.batches([], 4, seed=0), "no sites were asked for"),
        (lambda s: s.batches("neurons.0", 4, seed=0, reader=2, n_readers=2), "reader 2 of 2"),
        (lambda s: StoreConfig(dtype="int4"), "unknown store dtype 'int4'; nearest: int8"),
        (lambda s: StoreConfig(shard_bytes=0), "must be at least 1"),
    ],
)
def test_bad_input_is_named(store, call, message):
    with pytest.raises(InterpError, match=message):
        call(store)


def test_sites_without_a_position_axis_are_refused(model, tmp_path):
    with pytest.raises(InterpError, match="batch, pos"):
        ActivationStore.write(model, from_ids(model, [[1, 2, 3]]), "pattern.0", tmp_path)


def test_shards_are_plain_safetensors_with_columns_that_can_be_mapped(store):
    folder = store.folder.local
    rows = []
    for shard in range(len(store.sizes)):
        path = folder / shard_name(shard)
        n_header = int.from_bytes(path.read_bytes()[:8], "little")
        assert (8 + n_header) % 4096 == 0
        with safe_open(path, framework="pt") as file:
            rows.append(file.get_tensor("z.1"))
            assert set(file.keys()) >= {*SITES, "ids", "row", "pos"}
    assert torch.equal(torch.cat(rows), torch.cat(list(store.blocks("z.1"))))
    with safe_open(folder / "statistics.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("z.1/statistics/moments")[0], store.statistics("z.1").mean)


def test_int8_is_the_values_within_half_a_step_of_each_token(model, record, tmp_path):
    exact = ActivationStore.write(model, record, SITES, tmp_path, StoreConfig(dtype="float32", rows_per_forward=2))
    small = ActivationStore.write(model, record, SITES, tmp_path, StoreConfig(dtype="int8", rows_per_forward=2))
    assert small.dtype == torch.float32
    for site in SITES:
        x, y = (torch.cat(list(s.blocks(site, 3))).flatten(1) for s in (exact, small))
        step = x.abs().amax(1) / 127
        assert bool(((x - y).abs() <= step[:, None] * 0.5001).all()) and not torch.equal(x, y)
        index = torch.randperm(len(small), generator=torch.Generator().manual_seed(0))
        assert torch.equal(small.take(site, index).flatten(1), y[index])
        error = (np.linalg.norm((x - y).double()) / np.linalg.norm(x.double())).item()
        assert small.manifest["relative_error"][site] == pytest.approx(error, rel=1e-4)
        assert exact.manifest["relative_error"][site] == 0.0


@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_the_measured_error_is_that_of_the_dtype(model, record, tmp_path, dtype, bound):
    config = StoreConfig(dtype=dtype, rows_per_forward=len(record))
    store = ActivationStore.write(model, record, SITES, tmp_path, config)
    with capture(model, SITES) as acts:
        model(record)
    for site in SITES:
        x = acts[site][record.mask].double().numpy()
        y = torch.cat(list(store.blocks(site))).double().numpy()
        found = store.manifest["relative_error"][site]
        assert found == pytest.approx(np.linalg.norm(x - y) / np.linalg.norm(x), rel=1e-4)
        assert 0 < found < bound


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_statistics_are_those_of_what_is_read(model, record, tmp_path, dtype):
    config = StoreConfig(dtype=dtype, rows_per_forward=1, shard_tokens=12)
    store = ActivationStore.write(model, record, SITES, tmp_path, config)
    ids, row, pos = store.tokens()
    for site in SITES:
        x = torch.cat(list(store.blocks(site))).double().flatten(1).numpy()
        found = store.statistics(site)
        norms = np.linalg.norm(x, axis=1)
        assert found.count == len(store) and len(store.sizes) > 2
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.variance, x.var(0), rtol=1e-9)
        assert found.norm_mean == pytest.approx(norms.mean()) and found.norm_max == pytest.approx(norms.max())
        assert found.kurtosis == pytest.approx(scipy.stats.kurtosis(x, axis=0, fisher=False).mean())
        token, dim = np.unravel_index(np.abs(x).argmax(), x.shape)
        assert found.top == x[token, dim]
        assert found.top_token == (int(row[token]), int(pos[token]), int(ids[token]), dim)
        assert store.manifest["summary"][site]["kurtosis"] == found.kurtosis


def test_values_that_are_not_finite_are_named_by_site_and_token(record, tmp_path):
    model = tiny_model("llama")
    bad = int(record.ids[2, 3])
    with torch.no_grad():
        model.module.get_input_embeddings().weight[bad, 5] = float("nan")
    where = (record.ids[record.mask] == bad).nonzero()[0, 0]
    row, pos = (int(c[where]) for c in record.mask.nonzero(as_tuple=True))
    for dtype in ("float32", "int8"):
        with pytest.raises(InterpError, match=f"embed is not finite at row {row}, position {pos}, token id {bad}"):
            ActivationStore.write(model, record, "embed", tmp_path, StoreConfig(dtype=dtype, rows_per_forward=2))


class Pictures:
    """Inputs that are no tokens, two at a time."""

    hash, cut, n_tokens = "pictures", "2 a forward", None

    def __init__(self, inputs: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        self.inputs, self.mask = inputs, mask

    @property
    def n_batches(self) -> int:
        return -(-len(self.inputs) // 2)

    def batch(self, number: int) -> Batch:
        rows = torch.arange(number * 2, min(number * 2 + 2, len(self.inputs)))
        return Batch(
            number=number, rows=rows, inputs=self.inputs[rows], mask=None if self.mask is None else self.mask[rows]
        )


def test_images_are_stored_one_row_an_item(tmp_path):
    model = LoadedModel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)))
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    store = ActivationStore.write(
        model, Pictures(images), ["1", "3"], tmp_path, StoreConfig(dtype="float32", shard_tokens=3)
    )
    with torch.no_grad():
        expected = model.module[:2](images)
    torch.testing.assert_close(torch.cat(list(store.blocks("1"))), expected)
    ids, row, pos = store.tokens()
    assert ids is None and row.tolist() == [0, 1, 2, 3, 4] and not bool(pos.any())
    assert store.sites == {"1": (4, 6, 6), "3": (5,)} and store.sizes == [2, 2, 1]
    assert store.statistics("3").top_token[2] == -1


def test_signals_keep_their_positions_and_leave_padding_out(tmp_path):
    model = LoadedModel(nn.Sequential(nn.Linear(3, 6), nn.Tanh()))
    signal = torch.randn(4, 7, 3, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(7) < torch.tensor([7, 2, 5, 1])[:, None]
    config = StoreConfig(dtype="float32")
    store = ActivationStore.write(model, Pictures(signal, mask), "1", tmp_path / "a", config)
    _, row, pos = store.tokens()
    assert torch.equal(torch.stack([row, pos], 1), mask.nonzero())
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(list(store.blocks("1"))), model.module(signal)[mask])
    whole = ActivationStore.write(model, Pictures(signal), "1", tmp_path / "b", config)
    assert len(whole) == 28


def test_sites_with_and_without_positions_do_not_share_a_store(tmp_path):
    class Pool(nn.Module):
        def forward(self, x):
            return x.mean(1)

    model = LoadedModel(nn.Sequential(nn.Linear(3, 6), Pool()))
    with pytest.raises(InterpError, match="go into two stores"):
        ActivationStore.write(model, Pictures(torch.randn(4, 7, 3)), ["0", "1"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_values_waiting_to_be_written_are_our_own(tmp_path):
    """A module that gives its buffer away again and again."""

    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("out", torch.zeros(2, 3))

        def forward(self, x):
            return self.out.copy_(x)

    inputs = torch.arange(12.0).view(4, 3)
    model = LoadedModel(nn.Sequential(Reused(), nn.Identity()))
    store = ActivationStore.write(model, Pictures(inputs), "0", tmp_path, StoreConfig(dtype="float32"))
    assert torch.equal(torch.cat(list(store.blocks("0"))), inputs)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_values_that_lie_crosswise_in_memory(tmp_path, dtype):
    class Cross(nn.Module):
        def forward(self, x):
            return x.transpose(1, 2)

    model = LoadedModel(nn.Sequential(nn.Identity(), Cross()))
    inputs = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    store = ActivationStore.write(model, Pictures(inputs), "1", tmp_path, StoreConfig(dtype=dtype))
    found = torch.cat(list(store.blocks("1")))
    torch.testing.assert_close(found, inputs[0].T, atol=0.0 if dtype == "float32" else 0.02, rtol=0.0)


def test_a_model_that_was_changed_does_not_read_what_it_stored_before(record, tmp_path):
    """Weights written in place, and weights under another configuration."""
    model = tiny_model("llama")
    config = StoreConfig(dtype="float32", rows_per_forward=len(record))
    first = ActivationStore.write(model, record, "resid_post.2", tmp_path, config)
    assert ActivationStore.write(model, record, "resid_post.2", tmp_path, config).key == first.key
    changed_config = copy.deepcopy(model.module.config)
    changed_config.rope_parameters["rope_theta"] = 17.0
    other = LoadedModel(type(model.module)(changed_config).eval())
    other.module.load_state_dict(model.module.state_dict())
    with torch.no_grad():
        model.module.get_parameter("model.layers.0.mlp.down_proj.weight").mul_(3)
    for changed in (model, other):
        with capture(changed, "resid_post.2") as acts:
            changed(record)
        store = ActivationStore.write(changed, record, "resid_post.2", tmp_path, config)
        values = torch.cat(list(store.blocks("resid_post.2")))
        assert store.key != first.key and torch.equal(values, acts["resid_post.2"][record.mask])


def test_a_model_in_training_mode_is_not_stored(tmp_path):
    model = LoadedModel(nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 2)))
    np.save(tmp_path / "x.npy", np.zeros((6, 3), dtype=np.float32))
    batches = load_inputs(f"array:{tmp_path / 'x.npy'}", rows_per_forward=3)
    with pytest.raises(InterpError, match=r"training mode.*eval"):
        ActivationStore.write(model, batches, "2", tmp_path)
    model.module.eval()
    assert len(ActivationStore.write(model, batches, "2", tmp_path)) == 6


def test_whole_numbers_are_not_rounded(tmp_path):
    model = tiny_model("mixtral")
    record = tokenize(model, ["hello there"])
    with pytest.raises(InterpError, match=r"router_experts\.0 holds whole numbers, which int8"):
        ActivationStore.write(model, record, "router_experts.0", tmp_path, StoreConfig(dtype="int8"))
    store = ActivationStore.write(model, record, "router_experts.0", tmp_path, StoreConfig(dtype="float16"))
    with capture(model, "router_experts.0") as acts:
        model(record)
    assert torch.equal(torch.cat(list(store.blocks("router_experts.0"))).long(), acts["router_experts.0"].flatten(0, 1))
