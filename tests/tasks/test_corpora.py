"""Corpora: contiguous chunks of one stream, the golden loss, sentiment pairs, and what is refused."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from torch.nn.functional import cross_entropy

from interp.core.errors import ArtefactError, InterpError, MissingPackageError
from interp.models.load import load
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model
from interp.tasks.corpora import corpus_text, load_corpus
from interp.tasks.sentiment import ContrastPairs, sentiment_pairs


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


def test_chunks_are_contiguous_from_the_start(model: LoadedModel) -> None:
    record = load_corpus(model, "docs:assignment", 3, 50)
    assert bytes(record.ids.flatten().tolist()) == topics["assignment"].encode()[:150]
    later = load_corpus(model, "docs:assignment", 1, 50, skip=2)
    assert torch.equal(later.ids[0], record.ids[2])
    assert record.hash == load_corpus(model, "docs:assignment", 3, 50).hash != later.hash


@pytest.mark.needs_model("smollm2-135m")
def test_golden_loss_of_the_bundled_model() -> None:
    model = load("smollm2-135m", check=False)
    ids = load_corpus(model, "docs:assignment", 6, 128).ids
    loss = cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert abs(float(loss) - 3.143) < 0.005


def test_a_file_and_the_docstrings_of_a_package(model: LoadedModel, tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("äb" * 30, encoding="utf-8")
    assert load_corpus(model, f"file:{file}", 2, 5).str_tokens(0)[2] == "b"
    assert "Decode" in corpus_text("docstrings:json")
    assert len(corpus_text("docs")) > len(corpus_text("docs:assignment"))


def test_docstrings_are_read_not_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "boom").mkdir()
    (tmp_path / "boom" / "__init__.py").write_text('"""Safe text."""\nraise SystemExit("was run")\n')
    (tmp_path / "boom" / "broken.py").write_text("def (:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert corpus_text("docstrings:boom") == "Safe text."


def test_bad_corpora_are_refused(model: LoadedModel, tmp_path: Path) -> None:
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe\x00")
    for name, error, hint in [
        ("docs:assignmnt", InterpError, "nearest: assignment"),
        ("dcos:assignment", InterpError, "unknown corpus"),
        (f"file:{empty}", InterpError, "empty"),
        (f"file:{binary}", ArtefactError, "UTF-8"),
        ("file:/no/such/file", ArtefactError, "No such file"),
        ("docstrings:no_such_package", MissingPackageError, "no package"),
    ]:
        with pytest.raises(error, match=hint):
            load_corpus(model, name, 1, 8)
    with pytest.raises(InterpError, match=r"gives \d+ sequences of 100 tokens"):
        load_corpus(model, "docs:assignment", 10_000, 100)
    with pytest.raises(InterpError, match="at least 1"):
        load_corpus(model, "docs:assignment", 0, 100)


def test_pairs_differ_in_one_word_and_share_nothing_with_the_prompts() -> None:
    pairs = sentiment_pairs()
    assert len(set(pairs.positive)) == len(set(pairs.negative)) == 40 and len(set(pairs.prompts)) == 24
    for positive, negative in zip(pairs.positive, pairs.negative, strict=True):
        assert positive.split()[:-1] == negative.split()[:-1] and positive != negative
    adjectives = {text.split()[-1] for text in pairs.positive + pairs.negative}
    assert not adjectives & {*pairs.words_for, *pairs.words_against}
    assert not adjectives & {word for prompt in pairs.prompts for word in prompt.split()}


@pytest.mark.needs_model("smollm2-135m")
def test_both_sides_of_a_pair_have_equal_length() -> None:
    tokenizer, pairs = load("smollm2-135m", check=False).tokenizer, sentiment_pairs()
    for positive, negative in zip(pairs.positive, pairs.negative, strict=True):
        assert len(tokenizer(positive).input_ids) == len(tokenizer(negative).input_ids)


def test_impossible_pairs_are_refused() -> None:
    with pytest.raises(InterpError, match="2 to 40"):
        sentiment_pairs(41)
    with pytest.raises(InterpError, match="as many positive"):
        ContrastPairs(positive=("a",), negative=(), prompts=("p",) * 4, words_for=("x",), words_against=("y",))
    with pytest.raises(InterpError, match="at least 4 held-out"):
        ContrastPairs(positive=("a",), negative=("b",), prompts=("p",), words_for=("x",), words_against=("y",))
