"""Documents, inputs and samples from real files, and what is said where they are not what they should be."""

from __future__ import annotations

import gzip
import json
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from interp.core.errors import ArtefactError, InterpError
from interp.models.tiny import tiny_model
from interp.tasks.corpora import corpus_documents, corpus_text, load_corpus, token_ids
from interp.tasks.corpora_files import read_documents
from interp.tasks.corpora_inputs import load_inputs
from interp.tasks.corpora_sampled import sampled_corpus

TEXTS = ["One lake.", "Zwei Seen: ä, ü.", "three\nlines\nhere", "four", "five"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a corpus from files asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))


def _jsonl(path: Path, field: str = "text") -> Path:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(TEXTS))
    return path


def _written(folder: Path, kind: str) -> str:
    if kind == "jsonl":
        return f"jsonl:{_jsonl(folder / 'a.jsonl')}"
    if kind == "gzip":
        return f"jsonl:{_jsonl(folder / 'a.jsonl.gz', 'body')}?field=body"
    if kind == "parquet":
        pq.write_table(pa.table({"body": TEXTS}), folder / "a.parquet", row_group_size=2)
        return f"parquet:{folder / 'a.parquet'}?column=body"
    if kind == "parquets":
        for i, text in enumerate(TEXTS):
            pq.write_table(pa.table({"text": [text]}), folder / f"{i}.parquet")
        return f"parquet:{folder}"
    if kind == "dataset":
        import datasets

        datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(folder / "set")
        return f"dataset:{folder / 'set'}"
    (folder / "deep").mkdir()
    for i, text in enumerate(TEXTS):
        (folder / ("deep" if i else "") / f"{i}.txt").write_text(text, encoding="utf-8")
    return f"folder:{folder}"


@pytest.mark.parametrize("kind", ["jsonl", "gzip", "parquet", "parquets", "dataset", "folder"])
def test_documents_come_whole_and_in_order(tmp_path: Path, kind: str) -> None:
    name = _written(tmp_path, kind)
    assert sorted(corpus_documents(name)) == sorted(TEXTS)
    if kind != "folder":  # paths are in order, not the texts
        assert list(corpus_documents(name)) == TEXTS
        sign = "&" if "?" in name else "?"
        assert list(corpus_documents(f"{name}{sign}skip=1&take=2")) == TEXTS[1:3]
    assert corpus_text(name).count("\n\n") == len(TEXTS) - 1


def test_a_stream_is_shuffled_by_its_seed_alone(tmp_path: Path) -> None:
    name = _written(tmp_path, "dataset")
    once, again, other = (list(read_documents(f"{name}?shuffle={seed}")) for seed in (1, 1, 2))
    assert once == again and sorted(once) == sorted(other) == sorted(TEXTS) and once != other


def test_a_dataset_that_is_not_on_disk_is_streamed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    _jsonl(tmp_path / "data" / "train.jsonl")
    assert list(read_documents(f"dataset:{tmp_path / 'data'}?take=2")) == TEXTS[:2]


def test_documents_are_read_only_as_far_as_they_are_needed(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "abcdef"})] * 3 + ["broken"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    model, name = tiny_model("llama"), f"jsonl:{tmp_path / 'a.jsonl'}"
    assert list(map(len, token_ids(model, corpus_documents(name), enough=13))) == [6, 6, 6]
    assert list(map(len, token_ids(model, corpus_documents(name), enough=4, longest=2))) == [6, 6]
    with pytest.raises(ArtefactError, match="line 4"):
        token_ids(model, corpus_documents(name), enough=19)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("jsonl:a.jsonll", "could not read a.jsonll: No such file or directory; nearest: a.jsonl"),
        ("jsonl:none/a.jsonl", "No such file or directory; there is no folder none"),
        ("parquet:a.jsonlx", "could not read a.jsonlx: .*; nearest: a.jsonl"),
        ("file:a.jsonx", "could not read a.jsonx: No such file or directory; nearest: a.jsonl"),
        ("dataset:set?shuffle=x", "shuffle=x should be a whole number"),
        ("jsonl:a.jsonl?field=txt", "unknown field in line 1 of a.jsonl 'txt'; nearest: text"),
        ("jsonl:a.jsonl?fild=text", "unknown option of jsonl 'fild'; nearest: field"),
        ("jsonl:a.jsonl?field", "should be key=value"),
        ("jsonl:a.jsonl?take=many", "take=many should be a whole number"),
        ("jsonl:broken.jsonl", "line 2 of broken.jsonl is not JSON"),
        ("jsonl:list.jsonl", "line 1 of list.jsonl is list"),
        ("jsonl:number.jsonl", "'text' in line 1 of number.jsonl is int, not text"),
        ("jsonl:cut.jsonl.gz", "could not read cut.jsonl.gz"),
        ("parquet:a.jsonl", "could not read a.jsonl"),
        ("parquet:.", "holds no .parquet file"),
        ("folder:a.jsonl", "could not read a.jsonl: it is no folder"),
        ("folder:b.jsonl", "it is no folder; nearest: a.jsonl"),
        ("folder:.?glob=*.md", r"no file below \. matches \*\.md"),
        ("folder:.?glob=*.bad", "latin.bad is not a UTF-8 text file"),
        ("jsonl:a.jsonl?skip=99", "is empty"),
        ("jsonll:a.jsonl", "unknown corpus 'jsonll:a.jsonl'; nearest"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    _jsonl(Path("a.jsonl"))
    Path("broken.jsonl").write_text('{"text": "good"}\n{"text": \n')
    Path("list.jsonl").write_text("[1]\n")
    Path("number.jsonl").write_text('{"text": 3}\n')
    Path("latin.bad").write_bytes("ä".encode("latin-1"))
    whole = gzip.compress(b'{"text": "x"}\n' * 100)
    Path("cut.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InterpError, match=says):
        list(corpus_documents(name))


def test_documents_become_ids_without_special_tokens() -> None:
    model = tiny_model("llama")
    assert token_ids(model, ["ab", "ä"]) == [[97, 98], [195, 164]]


def test_the_old_corpora_are_what_they_were() -> None:
    """The text of `docs` is all topics with an empty line between, as before documents were told apart."""
    from pydoc_data.topics import topics

    model = tiny_model("llama")
    ids = load_corpus(model, "docs", 2, 64, skip=3).ids.flatten().tolist()
    assert bytes(ids) == "\n\n".join(topics[key] for key in sorted(topics)).encode()[3 * 64 : 5 * 64]


def test_arrays_are_items_and_are_not_unpickled(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
    np.save(tmp_path / "a.npy", values)
    np.savez(tmp_path / "b.npz", first=values, second=values.astype(np.int16) * 2)
    batches = load_inputs(f"array:{tmp_path / 'a.npy'}", rows_per_forward=2)
    assert batches.n_batches == 3
    assert torch.equal(torch.cat([batches.batch(i).inputs for i in range(3)]), torch.from_numpy(values))
    assert batches.batch(2).rows.tolist() == [4]
    second = load_inputs(f"array:{tmp_path / 'b.npz'}?name=second", rows_per_forward=5)
    assert torch.equal(second.batch(0).inputs, torch.from_numpy(values) * 2)
    assert batches.hash != second.hash == load_inputs(f"array:{tmp_path / 'b.npz'}?name=second").hash
    with pytest.raises(InterpError, match="nearest: second"):
        load_inputs(f"array:{tmp_path / 'b.npz'}?name=secnd")
    np.save(tmp_path / "c.npy", np.array([{"a": 1}, None], dtype=object), allow_pickle=True)
    with pytest.raises(ArtefactError, match="without unpickling"):
        load_inputs(f"array:{tmp_path / 'c.npy'}")


def test_images_are_scaled_and_cut_in_the_middle(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    wide = np.zeros((10, 30, 3), dtype=np.uint8)
    wide[:, 10:20] = (255, 51, 0)  # the middle third
    image_module.fromarray(wide).save(tmp_path / "b.png")
    image_module.fromarray(np.full((12, 12), 255, dtype=np.uint8)).save(tmp_path / "a.png")  # grey
    batches = load_inputs(f"images:{tmp_path}?size=10&mean=0.5&std=0.5", rows_per_forward=8)
    x = batches.batch(0).inputs
    assert x.shape == (2, 3, 10, 10)
    assert torch.equal(x[0], torch.ones(3, 10, 10))  # a.png comes first
    assert torch.allclose(x[1, :, 5, 5], torch.tensor([1.0, (51 / 255 - 0.5) / 0.5, -1.0]))
    (tmp_path / "c.png").write_bytes(b"no image")
    with pytest.raises(ArtefactError, match=r"c\.png is no image"):
        load_inputs(f"images:{tmp_path}?size=10").batch(0)


def test_samples_follow_the_models_own_distribution() -> None:
    model = tiny_model("llama", n_layers=1)
    record = sampled_corpus(model, 400, 2, seed=3, temperature=1.0)
    assert set(record.ids[:, 0].tolist()) == {256}
    with torch.no_grad():
        chances = torch.softmax(model.module(input_ids=record.ids[:1, :1]).logits[0, -1].double(), dim=-1)
    counts = torch.bincount(record.ids[:, 1], minlength=len(chances)).double()
    top = chances.topk(8).indices
    spread = (chances[top] * (1 - chances[top]) * 400).sqrt()
    assert bool(((counts[top] - 400 * chances[top]).abs() < 4 * spread).all())


def test_samples_depend_on_the_row_and_the_seed_and_are_kept() -> None:
    model = tiny_model("llama", n_layers=1)
    many, few = sampled_corpus(model, 5, 12, seed=1), sampled_corpus(model, 3, 12, seed=1)
    assert torch.equal(many.ids[:3], few.ids)
    assert not torch.equal(sampled_corpus(model, 3, 12, seed=2).ids, few.ids)
    assert torch.equal(sampled_corpus(model, 3, 12, seed=1, cache=False).ids, few.ids)
    model.module.forward = None  # a second call reads what the first one kept
    assert torch.equal(sampled_corpus(model, 3, 12, seed=1).ids, few.ids)
