"""Sources give the same stream from any position, aligned sites, and only the tokens that masks let through."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries.train_config import TrainConfig
from interp.dictionaries.training.job import Job, gradient_key
from interp.dictionaries.training.sources import Masks, Source, StoreSource, allowed, first_of_rows
from interp.dictionaries.training.streaming import ModelSource, gradient_sites
from interp.instrument.capture import capture
from interp.instrument.packing import bucketed
from interp.instrument.store import ActivationStore, StoreConfig
from interp.instrument.stream import RecordBatches
from interp.instrument.tokens import from_ids, from_rows
from interp.models.tiny import tiny_model

SITES = ("resid_post.1", "mlp_out.0")
KEEP_ALL = Masks(drop_special=False, drop_first=False, drop_norm=0)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


@pytest.fixture(scope="module")
def record(model):
    ids = torch.randint(0, 259, (40, 12), generator=torch.Generator().manual_seed(0))
    return from_ids(model, ids)


@pytest.fixture(scope="module")
def store(model, record, tmp_path_factory):
    config = StoreConfig(dtype="float32", rows_per_forward=4, shard_tokens=100)
    return ActivationStore.write(model, record, SITES, tmp_path_factory.mktemp("store"), config)


def streamed(model, record, **options) -> ModelSource:
    given = {"seed": 1, "n_buffer": 96, "masks": KEEP_ALL} | options
    return ModelSource(model, RecordBatches(record, 4), SITES, given.pop("batch_size", 30), **given)


def collect(source: Source, n: int) -> dict[str, torch.Tensor]:
    batches = [source.next() for _ in range(n)]
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def farthest(x: torch.Tensor, table: torch.Tensor) -> float:
    """Largest distance of a row to the nearest row of a table."""
    apart = torch.cdist(x.double(), table.double(), compute_mode="donot_use_mm_for_euclid_dist")
    return float(apart.min(dim=1).values.max())


def rows_of(x: torch.Tensor) -> list[tuple[float, ...]]:
    return sorted(map(tuple, x.tolist()))


def test_a_store_gives_what_its_own_shuffled_reader_gives(store):
    """Over several epochs, whose leftovers open the next one, with and without a mask."""
    for masks in (KEEP_ALL, Masks()):
        source = StoreSource(store, SITES, 70, seed=5, masks=masks, special_ids=(0, 1, 2))
        keep = allowed(store, SITES, masks, (0, 1, 2))
        for theirs in itertools.islice(store.batches(SITES, 70, seed=5, keep=keep), 25):
            ours = source.next()
            assert all(torch.equal(ours[site], theirs[site]) for site in SITES)


@pytest.mark.parametrize("kind", ["store", "model", "buckets"])
def test_any_position_is_found_again(kind, store, model, record):
    def make() -> Source:
        if kind == "store":
            return StoreSource(store, SITES, 70, seed=5)
        if kind == "model":
            return streamed(model, record, masks=Masks(drop_norm=3.0))
        uneven = from_rows(model, [record.ids[i, : 3 + i % 9].tolist() for i in range(len(record))])
        return ModelSource(model, bucketed(uneven, 4), SITES, 30, seed=1, n_buffer=60)

    source, seen = make(), list[tuple[dict, dict]]()
    for _ in range(40):
        state = source.state()
        seen.append((state, source.next()))
    rng = random.Random(0)
    for state, batch in rng.sample(seen, 12):
        again = make()
        again.restore(state)
        first = again.next()
        assert all(torch.equal(first[site], batch[site]) for site in SITES), state
    assert make().described() == source.described()


def test_parts_of_a_store_are_one_batch(store):
    whole = StoreSource(store, SITES, 60, seed=2)
    parts = [StoreSource(store, SITES, 60, seed=2, part=(r, 3)) for r in range(3)]
    for _ in range(15):
        batch, found = whole.next(), [part.next() for part in parts]
        for site in SITES:
            assert torch.equal(torch.cat([f[site] for f in found]), batch[site])
    assert all(torch.equal(part.sample(50)["mlp_out.0"], whole.sample(50)["mlp_out.0"]) for part in parts)


def test_an_epoch_of_the_model_is_every_token_once(model, record, store):
    """4 rows of 12 tokens a forward, 2 forwards a chunk, 5 chunks an epoch; what waits comes with the next block."""
    source = streamed(model, record, batch_size=48)
    x = collect(source, 9)  # 432 = 48 + 4 x 96 tokens: blocks 0 to 4, all but the late half of chunk 4
    assert source.state()["block"] == 5 and source.state()["offset"] == 0
    late = source._halves(4)[1]
    for site in SITES:
        every = store.take(site, torch.arange(len(store)))
        torch.testing.assert_close(
            torch.tensor(rows_of(torch.cat([x[site], late[site]]))), torch.tensor(rows_of(every))
        )


def test_sites_stay_aligned(model, record, store):
    x = collect(streamed(model, record), 8)
    table = torch.cat([store.take(site, torch.arange(len(store))) for site in SITES], dim=1)
    assert farthest(torch.cat([x[site] for site in SITES], dim=1), table) < 1e-5


def test_lanes_share_the_sequences(model, record):
    """The blocks of two processes hold different sequences, and an epoch of both is every token once."""
    lanes = [streamed(model, record, part=(r, 2), batch_size=96, n_buffer=48) for r in range(2)]
    halves = [[lane._halves(c) for c in range(5)] for lane in lanes]
    mine = [torch.cat([part["mlp_out.0"] for pair in found for part in pair]) for found in halves]
    assert len(mine[0]) == len(mine[1]) == 240 and not set(rows_of(mine[0])) & set(rows_of(mine[1]))
    assert all(torch.equal(a["mlp_out.0"], lanes[1].sample(64)["mlp_out.0"]) for a in [lanes[0].sample(64)])


def test_masks_leave_out_what_they_say(model, record, store):
    ids, row, pos = store.tokens()
    special = torch.tensor(sorted(model.tokenizer.all_special_ids))
    norms = store.norms("resid_post.1")
    assert bool(torch.isin(ids, special).any())
    kept = allowed(store, SITES, Masks(drop_norm=0), special.tolist())
    assert torch.equal(kept, ~torch.isin(ids, special) & (pos != 0))
    assert torch.equal(allowed(store, SITES, KEEP_ALL), torch.ones(len(store), dtype=torch.bool))
    high = Masks(drop_special=False, drop_first=False, drop_norm=1.2)
    kept = allowed(store, SITES[:1], high)
    assert torch.equal(kept, norms <= 1.2 * norms.median()) and not bool(kept.all())
    both = allowed(store, SITES, high)
    assert torch.equal(both, kept & allowed(store, SITES[1:], high))


@pytest.mark.parametrize("masks", [Masks(drop_norm=0), Masks(drop_norm=1.5), KEEP_ALL])
def test_store_and_model_let_the_same_tokens_through(model, record, store, masks):
    source = streamed(model, record, masks=masks, n_buffer=480)
    ids = tuple(model.tokenizer.all_special_ids)
    pool = StoreSource(store, SITES, 10, seed=0, masks=masks, special_ids=ids).pool
    theirs = torch.cat([half["mlp_out.0"] for half in source._halves(0)])  # one epoch
    assert len(theirs) == len(pool)
    ours = store.take("mlp_out.0", pool)
    assert farthest(theirs, ours) < 1e-5 and farthest(ours, theirs) < 1e-5


def test_first_tokens_of_rows_in_any_order():
    row, pos = torch.tensor([4, 4, 1, 4, 1, 9]), torch.tensor([3, 2, 0, 5, 1, 7])
    assert first_of_rows(row, pos).tolist() == [False, True, True, False, False, True]


def test_gradients_are_those_of_the_models_loss(model, record):
    """Against the loss that the model itself computes from labels, summed over sequences one by one."""
    jobs = [Job(name="g", config=TrainConfig(kind="gradient_topk", d_dict=64, k=4), reads=(SITES[0],))]
    assert gradient_sites(jobs) == (SITES[0],)
    source = streamed(model, record, gradients=gradient_sites(jobs), n_buffer=480, batch_size=100)
    found = source.sample(480)
    order = source._order(0)
    expected = []
    for number in order.tolist():
        part = record.rows(slice(4 * number, 4 * number + 4))
        for i in range(len(part)):
            one = part.rows(slice(i, i + 1))
            with capture(model, SITES[0], grad=True) as acts:
                logits = model(one)
                logp = logits[0, :-1].double().log_softmax(-1)
                (-logp[torch.arange(11), one.ids[0, 1:]].sum()).backward()
            expected.append(acts.grad(SITES[0])[0, 1:-1])  # neither first nor last
    expected = torch.cat(expected)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found[gradient_key(SITES[0])], expected, rtol=1e-3, atol=1e-5)


def test_what_cannot_work_is_named(model, record, store):
    with pytest.raises(InterpError, match="batch_size=70 does not divide among 3"):
        StoreSource(store, SITES, 70, seed=0, part=(0, 3))
    with pytest.raises(InterpError, match="part 3 of 3"):
        StoreSource(store, SITES, 60, seed=0, part=(3, 3))
    with pytest.raises(InterpError, match="no token of the store is left"):
        StoreSource(store, SITES, 60, seed=0, special_ids=range(259))
    with pytest.raises(InterpError, match="drop_norm=-1"):
        Masks(drop_norm=-1)
    with pytest.raises(InterpError, match="n_buffer=10 must hold at least a batch of 30"):
        streamed(model, record, n_buffer=10)
    with pytest.raises(InterpError, match="gradients at"):
        streamed(model, record, gradients=["resid_post.0"])
    short = from_ids(model, record.ids[:, :1])
    with pytest.raises(InterpError, match="the masks leave no token"):
        ModelSource(model, RecordBatches(short, 4), SITES, 8, seed=0, n_buffer=64, masks=Masks(drop_norm=0)).next()
