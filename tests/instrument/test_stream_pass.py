"""Observers of a stream against sorting everything; the same however it is cut, merged, resumed or shared out."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, load_file, save, save_file

from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.instrument.packing import bucketed, pad
from interp.instrument.store import ActivationStore, StoreConfig
from interp.instrument.store_ranks import Ranks
from interp.instrument.stream import Batch, Batches, RecordBatches
from interp.instrument.stream_observers import MassiveActivations, SiteStatistics
from interp.instrument.stream_pass import Observer, observe
from interp.instrument.stream_rows import Rows
from interp.instrument.stream_top import TopExamples
from interp.instrument.tokens import TokenRecord, from_rows
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model

SITES = ["resid_post.1", "z.0", "neurons.1"]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def record(model: LoadedModel) -> TokenRecord:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(3, 250, (n,), generator=generator).tolist() for n in (9, 2, 14, 1, 7, 7, 12, 3, 5, 11, 4)]
    return pad(model, rows, 14)


def everything(model: LoadedModel, batches: Batches, site: str) -> tuple[np.ndarray, np.ndarray]:
    """Values (n, d) and (row, pos, id) of all real tokens, in the order of rows and positions."""
    values, tokens = [], []
    for number in range(batches.n_batches):
        batch = batches.batch(number)
        with capture(model, site) as acts:
            model(batch.record)
        for item, row in enumerate(batch.rows.tolist()):
            for pos in batch.record.mask[item].nonzero()[:, 0].tolist():
                values.append(acts[site][item, pos].flatten().numpy())
                tokens.append((row, pos, int(batch.record.ids[item, pos])))
    order = sorted(range(len(tokens)), key=tokens.__getitem__)
    return np.stack(values)[order], np.array(tokens)[order]


def made(values: torch.Tensor, record: TokenRecord, rows: list[int], number: int = 0) -> Rows:
    """Rows of a batch whose activations at z.0 are given: (batch, pos, d)."""
    batch = Batch(number=number, rows=torch.tensor(rows), record=record.rows(rows))
    site = Site(Part.Z, 0)
    return Rows(batch, [site], {site: values})


def tied(record: TokenRecord, d: int = 6) -> torch.Tensor:
    """Few different values, so that most tokens tie; the last coordinate is zero or minus zero everywhere."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(-2, 3, (*record.ids.shape, d), generator=generator).float()
    values[..., -1] = torch.where(values[..., 0] > 0, 0.0, -0.0)
    return values


def told(observer: Observer, values: torch.Tensor, record: TokenRecord, cut: list[list[int]]) -> Observer:
    for number, rows in enumerate(cut):
        acts = made(values[rows], record, rows, number)
        observer.update(acts.batch, acts)
    return observer


CUTS = {
    "one": [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10]],
    "in order": [[0, 1, 2], [3, 4, 5, 6, 7], [8, 9, 10]],
    "mixed": [[10, 3], [7, 0, 5, 2], [1], [9, 4, 8, 6]],
}


@pytest.mark.parametrize("sorted_by_length", [False, True])
def test_top_examples_equal_a_full_sort(model, record, sorted_by_length):
    batches = bucketed(record, 3) if sorted_by_length else RecordBatches(record, 4)
    top = TopExamples(5)
    observe(model, batches, SITES, [top])
    for site in SITES:
        values, tokens = everything(model, batches, site)
        found = top.result()[site]
        for dim in range(values.shape[1]):
            best = np.argsort(-values[:, dim], kind="stable")[:5]
            assert np.array_equal(found.value[:, dim].numpy(), values[best, dim])
            place = torch.stack([found.row[:, dim], found.pos[:, dim], found.id[:, dim]], dim=1).numpy()
            assert np.array_equal(place, tokens[best])


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("n", [1, 4, 200])
def test_ties_go_to_the_earlier_token_however_the_input_is_cut(record, cut, n):
    values = tied(record)
    top = told(TopExamples(n, before=0, after=0), values, record, CUTS[cut]).result()["z.0"]
    tokens = record.mask.nonzero().tolist()
    for dim in range(values.shape[2]):
        best = sorted(tokens, key=lambda t: (-float(values[t[0], t[1], dim]), t))[:n]
        kept = top.row[:, dim] >= 0
        assert torch.stack([top.row[kept, dim], top.pos[kept, dim]], dim=1).tolist() == best
        assert bool((top.value[~kept, dim] == float("-inf")).all())
        assert len(top.table(dim)) == len(best)


def test_the_context_is_the_text_around_the_token(model, record):
    left = from_rows(model, [ids[mask].tolist() for ids, mask in zip(record.ids, record.mask, strict=True)], pad="left")
    for text in (record, left):
        values = tied(text)
        top = told(TopExamples(4, before=3, after=2), values, text, CUTS["mixed"]).result()["z.0"]
        for _, line in top.table(2).iterrows():
            real = text.ids[line["row"]][text.mask[line["row"]]].tolist()
            at = line["pos"] - int(text.first[line["row"]])
            assert line["context"] == real[max(0, at - 3) : at + 3] and real[at] == line["id"]


def test_some_coordinates_and_many_at_once(record, monkeypatch):
    values = tied(record, 40)
    whole = told(TopExamples(3), values, record, CUTS["mixed"]).result()["z.0"]
    monkeypatch.setattr("interp.instrument.stream_top.CHUNK_NUMBERS", 7)
    some = told(TopExamples(3, dims=[39, 4]), values, record, CUTS["one"]).result()["z.0"]
    assert some.dims.tolist() == [39, 4]
    for name in ("value", "row", "pos", "id", "context"):
        assert torch.equal(getattr(some, name), getattr(whole, name)[:, [39, 4]])


def test_massive_activations_are_found_with_their_ratio(record):
    values = torch.randn(*record.ids.shape, 6, generator=torch.Generator().manual_seed(2))
    values[2, 5, 3], values[6, 0, 3], values[8, 1, 1] = -5000.0, 4000.0, 99.0
    values[~record.mask] = 1e6  # padding is no token
    for cut in CUTS.values():
        table = told(MassiveActivations(2, ratio=1000), values, record, cut).result()
        assert table[["dim", "value", "row", "pos", "n_massive"]].to_numpy().tolist() == [
            [3, -5000.0, 2, 5, 2],
            [1, 99.0, 8, 1, 0],
        ]
        assert table["id"].tolist() == [int(record.ids[2, 5]), int(record.ids[8, 1])]
        sizes = sorted(values[2][record.mask[2]].abs().flatten().tolist())
        assert table["ratio"][0] == pytest.approx(5000 / sizes[(len(sizes) - 1) // 2], rel=1e-6)


def test_massive_ties_and_sequences_of_zeros(record):
    values = torch.zeros(*record.ids.shape, 2)
    values[[9, 4], :, 0] = -7.0
    for cut in CUTS.values():
        table = told(MassiveActivations(5, ratio=1, floor=5), values, record, cut).result()
        lengths = record.lengths.tolist()
        # Half of the values of a sequence are 0 and half are 7: the lower median is 0, so nothing can be said.
        assert table[["dim", "value", "ratio", "row", "pos", "n_massive"]].to_numpy().tolist() == [
            [0, -7.0, 0.0, 4, 0, 0],
            [1, 0.0, 0.0, 0, 0, 0],
        ]
        values[..., 1] = values[..., 0]
        table = told(MassiveActivations(5, ratio=1, floor=5), values, record, cut).result()
        assert table[["ratio", "n_massive"]].to_numpy().tolist() == [[1.0, lengths[9] + lengths[4]]] * 2
        values[..., 1] = 0.0


def test_statistics_are_those_of_all_rows(model, record):
    seen, batches = SiteStatistics(), bucketed(record, 4)
    observe(model, batches, SITES, [seen])
    for site in SITES:
        values, tokens = everything(model, batches, site)
        found = seen.result()[site]
        assert found.count == len(tokens)
        np.testing.assert_allclose(found.mean, values.astype(np.float64).mean(0), rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(found.variance, values.astype(np.float64).var(0), rtol=1e-9)
        at, dim = np.unravel_index(np.abs(values).argmax(), values.shape)
        assert found.top == values[at, dim] and found.top_token == (*tokens[at], dim)


@pytest.mark.parametrize("kind", [TopExamples, MassiveActivations, SiteStatistics])
def test_merged_states_are_seeing_all(record, kind):
    values, cut = tied(record), CUTS["mixed"]
    if kind is SiteStatistics:  # of equal values it keeps the one merged first
        values = values + torch.randn(values.shape, generator=torch.Generator().manual_seed(3))
    whole = told(kind(), values, record, cut)
    first, second = told(kind(), values, record, cut[:1]), kind()
    for number, rows in enumerate(cut[1:], 1):
        acts = made(values[rows], record, rows, number)
        second.update(acts.batch, acts)
    empty = kind()
    empty.merge({})
    for observer in (second, first):  # in the wrong order
        empty.merge(load(save({name: tensor.contiguous() for name, tensor in observer.state().items()})))
    same(whole, empty)
    assert isinstance(whole, Observer)
    empty.clear()
    assert empty.state() == {} and len(empty.result()) == 0


def same(one: Observer, other: Observer) -> None:
    a, b = one.state(), other.state()
    assert set(a) == set(b) and a
    for name, tensor in a.items():
        if name.endswith(("moments", "numbers")):  # the order of merging changes last bits
            torch.testing.assert_close(tensor, b[name], rtol=1e-12, atol=1e-12)
        else:
            assert torch.equal(tensor, b[name]), name


CONFIG = StoreConfig(dtype="float16", shard_tokens=20)


def watchers() -> list[Observer]:
    return [TopExamples(3), MassiveActivations(), SiteStatistics()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in next(folder.iterdir()).iterdir()}


def test_a_store_is_written_in_the_same_pass(model, record, tmp_path):
    batches, alone, beside = bucketed(record, 2), watchers(), watchers()
    observe(model, batches, SITES, alone)
    forwards: list[int] = []
    with model.module.register_forward_pre_hook(lambda *_: forwards.append(1)):
        ActivationStore.write(model, batches, SITES, tmp_path / "b", CONFIG, observers=beside)
    ActivationStore.write(model, batches, SITES, tmp_path / "a", CONFIG)
    for one, other in zip(alone, beside, strict=True):
        same(one, other)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert len(forwards) == batches.n_batches + 1  # one to learn the shapes


def test_what_was_written_before_is_seen_too(model, record, tmp_path):
    batches, alone, found, resumed = bucketed(record, 2), watchers(), watchers(), watchers()
    observe(model, batches, SITES, alone)
    store = ActivationStore.write(model, batches, SITES, tmp_path, CONFIG)
    whole = contents(tmp_path)
    ActivationStore.write(model, batches, SITES, tmp_path, CONFIG, observers=found)
    for name in ("shard-00001.json", "shard-00002.safetensors", "manifest.json"):
        store.folder.remove(name)
    ActivationStore.write(model, batches, SITES, tmp_path, CONFIG, observers=resumed)
    assert contents(tmp_path) == whole
    for one, two, three in zip(alone, found, resumed, strict=True):
        same(one, two)
        same(one, three)


def _process(rank: int, folder: Path) -> None:
    model = tiny_model("llama")
    record = pad(model, [[3 + (7 * i + j) % 240 for j in range(1 + 5 * i % 13)] for i in range(11)], 14)
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meet'}", rank=rank, world_size=2)
    seen, beside = watchers(), watchers()
    observe(model, bucketed(record, 2), SITES, seen)
    ActivationStore.write(model, bucketed(record, 2), SITES, folder / "store", CONFIG, observers=beside)
    dist.destroy_process_group()
    states = {f"{i}|{k}": v.contiguous() for i, o in enumerate([*seen, *beside]) for k, v in o.state().items()}
    save_file(states, folder / f"{rank}.safetensors")
    if rank == 0:
        alone = watchers()
        observe(model, bucketed(record, 2), SITES, alone, ranks=Ranks())
        save_file(
            {f"{i}|{k}": v.contiguous() for i, o in enumerate(alone) for k, v in o.state().items()},
            folder / "alone.safetensors",
        )


def test_two_processes_find_what_one_finds(tmp_path):
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                _process(rank, tmp_path)
                code = 0
            except BaseException as error:  # noqa: BLE001 - the parent reads it
                (tmp_path / f"error-{rank}.txt").write_text(repr(error))
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], [path.read_text() for path in tmp_path.glob("error-*.txt")]
    first, second, alone = (load_file(tmp_path / f"{name}.safetensors") for name in ("0", "1", "alone"))
    assert set(first) == set(second) and len(alone) * 2 == len(first)
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name])
        number, _, rest = name.partition("|")
        expected = alone[f"{int(number) % 3}|{rest}"]
        torch.testing.assert_close(tensor, expected, rtol=1e-12, atol=1e-12)


def test_inputs_without_tokens(model):
    """Items with positions and no text: ids are -1, there is no context."""
    site = Site(Part.Z, 0)
    batch = Batch(number=0, rows=torch.tensor([4, 5]), inputs=torch.zeros(2, 3))
    acts = Rows(batch, [site], {site: torch.arange(12.0).view(2, 3, 2)})
    top, massive = TopExamples(2), MassiveActivations(1)
    for observer in (top, massive):
        observer.update(batch, acts)
    found = top.result()["z.0"]
    assert found.row.tolist() == [[5, 5], [5, 5]] and found.pos.tolist() == [[2, 2], [1, 1]]
    assert found.id.unique().tolist() == [-1] and found.table(0)["context"].tolist() == [[], []]
    assert massive.result()[["dim", "value", "row", "pos", "id"]].to_numpy().tolist() == [[1, 11.0, 5, 2, -1]]


def test_bad_input(model, record):
    with pytest.raises(InterpError, match="no observers"):
        observe(model, record, SITES, [])
    with pytest.raises(InterpError, match="no sites"):
        observe(model, record, [], [TopExamples()])
    with pytest.raises(InterpError, match="n=0"):
        TopExamples(0)
    with pytest.raises(InterpError, match="n=0"):
        MassiveActivations(0)
    with pytest.raises(InterpError, match=r"coordinates 0 to \d+, asked for \[9999\]"):
        observe(model, record, SITES, [TopExamples(dims=[9999])])
    with pytest.raises(InterpError, match="process group"):
        observe(model, record, SITES, [TopExamples()], ranks=Ranks(rank=0, world=2))
    values = tied(record)
    values[3, 0, 2] = float("nan")
    for observer in (TopExamples(), MassiveActivations()):
        with pytest.raises(InterpError, match="not finite at row 3, position 0"):
            told(observer, values, record, CUTS["mixed"])
    top = told(TopExamples(2), tied(record), record, CUTS["one"])
    with pytest.raises(InterpError, match="do not merge"):
        top.merge(told(TopExamples(2), tied(record, 5), record, CUTS["one"]).state())
    with pytest.raises(InterpError, match="was not watched"):
        top.result()["z.0"].table(99)
    acts = made(tied(record), record, CUTS["one"][0])
    with pytest.raises(InterpError, match=r"nearest: z\.0"):
        acts["z.1"]
