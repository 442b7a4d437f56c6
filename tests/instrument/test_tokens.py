"""Token records: spans against the text, padding that changes nothing, specials, sinks, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from interp.core.errors import InterpError
from interp.instrument.edits import add, edited
from interp.instrument.tokens import TokenRecord, adds_start, from_ids, residual_norms, sink_candidates, tokenize
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model

TEXTS = ["Héllo wörld", "a b", "<bos>x y z"]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


def test_one_byte_is_one_token_and_nothing_is_added(model: LoadedModel) -> None:
    record = tokenize(model, "Hé")
    assert record.ids.tolist() == [list("Hé".encode())]
    assert record.mask.all() and not record.special.any() and record.notes == ()


@pytest.mark.parametrize("pad", ["left", "right"])
def test_spans_are_where_the_text_is(model: LoadedModel, pad: str) -> None:
    record = tokenize(model, ["plain words", "short"], pad=pad)
    assert record.spans is not None and record.texts is not None
    for row, text in enumerate(record.texts):
        spans = record.spans[row][record.mask[row]].tolist()
        assert [text[a:b] for a, b in spans] == record.str_tokens(row) == list(text)
        assert (record.spans[row][~record.mask[row]] == -1).all()
    assert record.find(0, "words") == list(range(6, 11))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_padding_on_either_side_changes_no_prediction(family: str) -> None:
    model = tiny_model(family)
    texts = ["one two three", "four"]
    alone = [model(tokenize(model, text))[0, -1] for text in texts]
    for pad in ("left", "right"):
        record = tokenize(model, texts, pad=pad)
        logits = model(record)[torch.arange(2), record.last]
        torch.testing.assert_close(logits, torch.stack(alone), rtol=1e-4, atol=1e-4)


def test_first_last_and_lengths(model: LoadedModel) -> None:
    left, right = (tokenize(model, ["abcd", "xy"], pad=pad) for pad in ("left", "right"))
    assert left.first.tolist() == [0, 2] and left.last.tolist() == [3, 3]
    assert right.first.tolist() == [0, 0] and right.last.tolist() == [3, 1]
    assert left.lengths.tolist() == right.lengths.tolist() == [4, 2] and left.n_tokens == 6
    assert left.hash != right.hash == tokenize(model, ["abcd", "xy"], pad="right").hash


def test_specials_are_marked_and_padding_is_not_special(model: LoadedModel) -> None:
    record = tokenize(model, TEXTS, pad="left")
    assert record.special.sum() == 1
    assert record.str_tokens(2)[0] == "<bos>"
    assert not (record.special & ~record.mask).any()


def test_rows_keep_everything_together(model: LoadedModel) -> None:
    record = tokenize(model, TEXTS, pad="right")
    picked = record.rows([2, 0])
    assert picked.texts == (TEXTS[2], TEXTS[0]) and torch.equal(picked.ids, record.ids[[2, 0]])
    assert picked.str_tokens(1) == record.str_tokens(0)
    assert len(record.rows(slice(1, None))) == 2


def test_a_doubled_or_missing_start_token_is_noted(model: LoadedModel) -> None:
    def tokenizer(text: str, add_special_tokens: bool = True, **_: object) -> SimpleNamespace:
        out = model.tokenizer(text)
        ids = [256, *out.input_ids] if add_special_tokens else out.input_ids
        return Encoding(input_ids=ids)

    class Encoding(dict[str, list[int]]):
        input_ids = property(lambda self: self["input_ids"])

    wrapped = SimpleNamespace(
        bos_token_id=256, all_special_ids=[256], is_fast=False,
        convert_ids_to_tokens=model.tokenizer.convert_ids_to_tokens, decode=model.tokenizer.decode,
    )  # fmt: skip

    class Callable(SimpleNamespace):
        __call__ = staticmethod(tokenizer)

    bos_model = LoadedModel(model.module, Callable(**vars(wrapped)))
    assert adds_start(bos_model) and not adds_start(model)
    assert "no start token" in tokenize(bos_model, "hi").notes[0]
    assert "twice" in tokenize(bos_model, "<bos>hi", add_special=True).notes[0]
    assert tokenize(bos_model, "hi", add_special=True).notes == ()
    assert tokenize(bos_model, "hi", add_special=True).ids[0, 0] == 256


def test_sinks_are_found_where_one_is_planted(model: LoadedModel) -> None:
    record = tokenize(model, ["some words here", "other words too"])
    assert not sink_candidates(model, record, ratio=50.0).any()
    huge = torch.full((model.dims.d_model,), 1e4)
    with edited(model, add("resid_post.0", huge, at=[3])):
        found = record.sinks(model)
    expected = torch.zeros_like(record.mask)
    expected[:, 3] = True
    assert torch.equal(found, expected)


def test_residual_norms_do_not_depend_on_the_batch(model: LoadedModel) -> None:
    record = from_ids(model, torch.randint(256, (20, 6), generator=torch.Generator().manual_seed(0)))
    every = residual_norms(model, record, [0, 2])
    assert every.shape == (2, 20, 6)
    torch.testing.assert_close(every[:, 3:4], residual_norms(model, record.rows([3]), [0, 2]), rtol=1e-5, atol=1e-5)


def test_ids_without_a_tokenizer_are_shown_as_numbers(model: LoadedModel) -> None:
    bare = LoadedModel(model.module)
    assert from_ids(bare, [[5, 6]]).str_tokens(0) == ["5", "6"]
    with pytest.raises(InterpError, match="no tokenizer"):
        tokenize(bare, "x")


@pytest.mark.parametrize(
    ("texts", "hint"),
    [([], "no texts"), ("", "text 0 is empty"), (["a", ""], "text 1 is empty"), (["ab", "c"], "1 to 2 tokens")],
)
def test_bad_texts_are_refused(model: LoadedModel, texts: list[str] | str, hint: str) -> None:
    with pytest.raises(InterpError, match=hint):
        tokenize(model, texts)


def test_bad_ids_rows_and_lengths_are_refused(model: LoadedModel) -> None:
    with pytest.raises(InterpError, match="0 to 258"):
        from_ids(model, [[259]])
    with pytest.raises(InterpError, match="shape"):
        from_ids(model, [])
    with pytest.raises(InterpError, match="context of 256"):
        tokenize(model, "x" * 300)
    record = tokenize(model, "abc")
    with pytest.raises(InterpError, match="rows 0 to 0"):
        record.str_tokens(1)
    with pytest.raises(InterpError, match="does not occur"):
        record.find(0, "z")
    with pytest.raises(InterpError, match="only padding"):
        TokenRecord(ids=record.ids, mask=record.mask & False, special=record.special, strings=record.strings)
