"""Tasks in words, with tokenizers of several kinds: aligned, answered, balanced, seeded, held out, or refused."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
import torch

from interp.core.errors import InterpError
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel
from interp.tasks import task as tasks
from interp.tasks.base import PromptPairs
from interp.tasks.facts import FACTS
from interp.tasks.greater_than import GreaterThan
from interp.tasks.library import TASKS, make_pairs
from interp.tasks.metrics import AnswerSets
from interp.tasks.pronoun import MEN, WOMEN, WORDS

Reader = Callable[[str], LoadedModel]
TOKENIZERS = [
    "bpe",
    pytest.param("smollm2", marks=pytest.mark.needs_model("smollm2-135m")),
    pytest.param("gemma", marks=pytest.mark.needs_model("gemma3-270m")),
]
WORDED = [(name, corruption) for name, task in TASKS.items() if task.words for corruption in task.corruptions]


def changed_regions(text: str, other: str) -> list[tuple[int, int]]:
    """First and last-plus-one character of each run of letters or digits of `text` that `other` has otherwise."""
    parts = [list(re.finditer(r"\d|[A-Za-z]+|[^A-Za-z\d]", t)) for t in (text, other)]
    if len(parts[0]) != len(parts[1]):  # a subject of two words against one of one
        before = next(i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b)
        after = next(i for i, (a, b) in enumerate(zip(text[::-1], other[::-1], strict=False)) if a != b)
        return [(before, len(text) - after)]
    return [a.span() for a, b in zip(*parts, strict=True) if a[0] != b[0]]


def differing_spans(record: TokenRecord, other: TokenRecord, row: int) -> list[tuple[int, int]]:
    where = (record.ids[row] != other.ids[row]).nonzero()[:, 0].tolist()
    assert record.spans is not None
    return [tuple(record.spans[row, pos].tolist()) for pos in where]


@pytest.mark.parametrize("which", TOKENIZERS)
@pytest.mark.parametrize(("name", "corruption"), WORDED)
def test_pairs_are_aligned_and_differ_only_in_the_changed_words(
    reader: Reader, which: str, name: str, corruption: str
) -> None:
    model = reader(which)
    pairs = make_pairs(model, name, 8, seed=1, corruption=corruption)
    texts = pairs.clean.texts, pairs.corrupt.texts
    assert len(pairs) == 8 and texts[0] is not None and texts[1] is not None
    for row in range(8):
        for record, a, b in ((pairs.clean, *texts), (pairs.corrupt, *texts[::-1])):
            regions = changed_regions(a[row], b[row])
            spans = differing_spans(record, pairs.corrupt if record is pairs.clean else pairs.clean, row)
            assert spans and regions
            for begin, end in spans:
                assert any(begin < stop and end > start for start, stop in regions), (a[row], b[row], begin, end)
    assert set(pairs.roles) - {"YY+1"} == set(TASKS[name].roles) - {"YY+1"}
    assert pairs.metric().name == TASKS[name].metric
    for where in pairs.roles.values():
        assert bool(((where >= 0) & (where < pairs.n_pos)).all())
    assert bool((pairs.roles["END"] == pairs.n_pos - 1).all())
    assert bool(pairs.clean.mask.all()) and bool(pairs.corrupt.mask.all())


@pytest.mark.parametrize("which", TOKENIZERS)
@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.words])
def test_answers_continue_the_prompt_as_one_token(reader: Reader, which: str, name: str) -> None:
    """Prompt and answer, decoded and encoded again as one text, are the prompt's ids and the answer."""
    model = reader(which)
    pairs = make_pairs(model, name, 6, seed=2)
    for row, text in enumerate(pairs.clean.texts or ()):
        for answer in pairs.answers[row].tolist():
            ids = [*pairs.clean.ids[row].tolist(), answer]
            whole = model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            assert whole.startswith(text) and len(whole) > len(text)
            assert list(model.tokenizer(whole)["input_ids"]) == ids
            assert whole[len(text)] == " " or name == "greater-than"


ROLE_WORDS = {
    ("ioi", "s2"): {"S2"}, ("greater-than", "01"): {"YY", "YY+1"}, ("docstring", "c"): {"C_def"},
    ("docstring", "def"): {"A_def", "B_def", "C_def"}, ("docstring", "doc"): {"A_doc", "B_doc"},
    ("colored-objects", "query"): {"QUERY"}, ("agreement", "number"): {"SUBJECT"},
    ("gendered-pronoun", "gender"): {"NAME"}, ("ioi", "swapped"): {"IO", "S1", "S2"},
}  # fmt: skip


@pytest.mark.needs_model("smollm2-135m")
@pytest.mark.parametrize(("name", "corruption"), ROLE_WORDS)
def test_roles_lie_on_what_is_changed(reader: Reader, name: str, corruption: str) -> None:
    """SmolLM2 writes these words as one token each, so that roles and changed positions are the same."""
    pairs = make_pairs(reader("smollm2"), name, 12, corruption=corruption)
    for row in range(12):
        changed = set((pairs.clean.ids[row] != pairs.corrupt.ids[row]).nonzero()[:, 0].tolist())
        named = {int(pairs.roles[role][row]) for role in ROLE_WORDS[name, corruption]}
        beside = {int(pairs.roles["C_def"][row]) + 2} if corruption == "def" else set[int]()
        assert changed <= named | beside and (corruption == "01" or changed >= named)


@pytest.mark.parametrize("which", ["bpe", "bytes"])
def test_equal_seeds_give_equal_pairs(reader: Reader, which: str) -> None:
    for name in ("greater-than", *(["ioi", "facts"] if which == "bpe" else [])):
        a, b, c = (make_pairs(reader(which), name, 6, seed=seed) for seed in (3, 3, 4))
        assert a.hash == b.hash != c.hash
        assert a.templates == b.templates


@pytest.mark.parametrize("n", [1, 7, 30])
@pytest.mark.parametrize("name", ["ioi", "gendered-pronoun", "agreement"])
def test_as_many_as_asked_for_and_all_different(reader: Reader, name: str, n: int) -> None:
    pairs = make_pairs(reader("bpe"), name, n)
    assert len(pairs) == len(pairs.templates) == n
    assert len({tuple(row) for row in pairs.clean.ids.tolist()}) == n


def test_fewer_pairs_than_asked_for_are_said(reader: Reader) -> None:
    pairs = make_pairs(reader("bpe"), "gendered-pronoun", 200, split="test")
    assert 0 < len(pairs) < 200
    assert any(f"{len(pairs)} pairs instead of 200" in note for note in pairs.notes)


def test_groups_have_equal_shares(reader: Reader) -> None:
    orders = Counter(name.split()[0] for name in make_pairs(reader("bpe"), "ioi", 30).templates)
    assert orders == {"ABBA": 15, "BABA": 15}
    pronouns = make_pairs(reader("bpe"), "gendered-pronoun", 20)
    assert Counter(pronouns.answers[:, 0].tolist()).most_common()[0][1] == 10
    groups = Counter(name.split(" ", 1)[1] for name in make_pairs(reader("bpe"), "agreement", 24).templates)
    assert set(groups.values()) == {6} and len(groups) == 4


def test_splits_share_no_prompt_and_no_word_asked_about(reader: Reader) -> None:
    model = reader("bpe")
    for name in ("ioi", "facts", "agreement", "docstring", "colored-objects", "gendered-pronoun"):
        train, test = (make_pairs(model, name, 12, split=split) for split in ("train", "test"))
        assert not set(train.clean.texts or ()) & set(test.clean.texts or ())
        if name in ("ioi", "docstring", "colored-objects"):
            assert not set(train.answers.flatten().tolist()) & set(test.answers.flatten().tolist())
        if name in ("ioi", "agreement", "gendered-pronoun"):
            first = [{item.split()[1] if name != "ioi" else item for item in p.templates} for p in (train, test)]
            assert name == "agreement" or not first[0] & first[1]


def test_what_cannot_be_asked_is_refused(reader: Reader) -> None:
    with pytest.raises(InterpError, match="'ioi'.*|nearest: ioi"):
        make_pairs(reader("bpe"), "iio")
    with pytest.raises(InterpError, match="corruption of ioi 's3'; nearest: s2"):
        make_pairs(reader("bpe"), "ioi", corruption="s3")
    with pytest.raises(InterpError, match="split"):
        make_pairs(reader("bpe"), "ioi", split="val")
    with pytest.raises(InterpError, match="at least 1"):
        make_pairs(reader("bpe"), "ioi", 0)
    with pytest.raises(InterpError, match="none of .* not one token"):
        make_pairs(reader("bytes"), "ioi")
    with pytest.raises(InterpError, match="last two digits of a year"):
        make_pairs(reader("threes"), "greater-than")
    silent = LoadedModel(module=reader("bytes").module, source="silent")
    with pytest.raises(InterpError, match="has no tokenizer, and facts is written in words"):
        make_pairs(silent, "facts")


def test_drops_are_counted_by_reason(reader: Reader) -> None:
    """The trained tokenizer splits some names: those cannot be answers."""
    pairs = make_pairs(reader("bpe"), "ioi", 40)
    counts = [int(note.split(" of ")[0]) for note in pairs.notes if "pairs dropped" in note]
    assert sum(counts) == pairs.n_dropped > 0
    assert any("an answer is not one token" in note for note in pairs.notes)


def test_take_carries_metric_and_sentences(reader: Reader) -> None:
    pairs = make_pairs(reader("bytes"), "greater-than", 6)
    few = pairs.take([4, 1])
    assert isinstance(few.own, GreaterThan) and isinstance(pairs.own, GreaterThan)
    assert few.own.years.tolist() == [int(pairs.own.years[4]), int(pairs.own.years[1])]
    assert few.templates == (pairs.templates[4], pairs.templates[1])
    logits = torch.randn(2, 2, 259)
    rows = torch.arange(2)
    assert torch.equal(few.metric()(logits, rows), pairs.metric()(logits, torch.tensor([4, 1])))


def numbers_by_hand(p: torch.Tensor, tokens: list[int], year: int, *, two_steps: bool) -> float:
    """P(later) - P(not later), summed over written-out years."""
    total = 0.0
    for other in range(100):
        sign = 1.0 if other > year else -1.0
        if not two_steps:
            total += sign * float(p[-1, tokens[other]])
        elif other // 10 == year // 10:
            total += sign * float(p[-2, tokens[other // 10]] * p[-1, tokens[other % 10]])
        elif other % 10 == 0:
            total += sign * float(p[-2, tokens[other // 10]])  # whatever the unit would be
    return total


@pytest.mark.parametrize("which", ["bytes", "bpe"])
def test_greater_than_is_the_sum_over_all_years(reader: Reader, which: str) -> None:
    model = reader(which)
    pairs = make_pairs(model, "greater-than", 10, seed=5)
    own = pairs.own
    assert isinstance(own, GreaterThan) and own.n_last == (2 if which == "bytes" else 1)
    texts = pairs.clean.texts or ()
    size = max(int(own.tokens.max()) + 1, 259)
    logits = torch.randn(10, own.n_last, size, dtype=torch.float64) * 4
    found = own(logits, torch.arange(10))
    names = [str(i) for i in range(10)] if which == "bytes" else [f"{i:02d}" for i in range(100)]
    tokens = [model.tokenizer.convert_tokens_to_ids(name) for name in names]
    for row, text in enumerate(texts):
        first, second = re.findall(r"\d+", text)
        assert second == (first[:3] if which == "bytes" else first[:2])
        expected = numbers_by_hand(logits[row].softmax(-1), tokens, int(first[2:]), two_steps=which == "bytes")
        assert float(found[row]) == pytest.approx(expected, abs=1e-9)


def certain(pairs: PromptPairs, model: LoadedModel, decade: str, unit: str) -> torch.Tensor:
    """Logits of a model that is sure of two digits."""
    logits = torch.full((1, 2, 259), -40.0)
    for pos, digit in enumerate((decade, unit)):
        logits[0, pos, model.tokenizer.convert_tokens_to_ids(digit)] = 40.0
    return pairs.metric()(logits, torch.tensor([0]))


def test_greater_than_of_a_certain_model(reader: Reader) -> None:
    model = reader("bytes")
    pairs = make_pairs(model, "greater-than", 4, seed=5)
    assert isinstance(pairs.own, GreaterThan)
    decade, unit = divmod(int(pairs.own.years[0]), 10)
    assert float(certain(pairs, model, str(decade), str(unit + 1))) == pytest.approx(1)
    assert float(certain(pairs, model, str(decade), str(unit))) == pytest.approx(-1)
    if decade < 9:
        assert float(certain(pairs, model, str(decade + 1), "0")) == pytest.approx(1)
    if decade > 0:
        assert float(certain(pairs, model, str(decade - 1), "9")) == pytest.approx(-1)


def test_agreement_has_all_forms_on_the_right_side(reader: Reader) -> None:
    model = reader("bpe")
    pairs = make_pairs(model, "agreement", 8)
    assert isinstance(pairs.own, AnswerSets)
    for row, name in enumerate(pairs.templates):
        forms = [model.tokenizer.decode([i]).strip() for i in pairs.own.right[row].tolist() if i >= 0]
        assert forms and set(forms) <= ({"is", "was", "has"} if "singular" in name else {"are", "were", "have"})
        subject = (pairs.clean.texts or ())[row].split()[1]
        assert (subject in ("children", "churches") or subject.endswith("s")) == ("plural" in name)


def test_docstring_sets_the_answer_against_every_other_argument(reader: Reader) -> None:
    model = reader("bpe")
    pairs = make_pairs(model, "docstring", 4)
    assert isinstance(pairs.own, AnswerSets)
    for row, text in enumerate(pairs.clean.texts or ()):
        a, b, c, d = re.findall(r"\w+", text.split("\n")[0].split("self")[1])
        wrong = {model.tokenizer.decode([i]).strip() for i in pairs.own.wrong[row].tolist()}
        assert model.tokenizer.decode([int(pairs.own.right[row, 0])]).strip() == c
        assert {a, b, d} <= wrong and c not in wrong


def test_word_lists_hold_what_they_should() -> None:
    assert not set(MEN) & set(WOMEN) and len(MEN) == len(WOMEN)
    assert len({word for pair in WORDS for word in pair}) == 2 * len(WORDS)
    for known in FACTS.values():
        assert len({subject for subject, _ in known}) == len(known)
    train, test = (tasks.held_out(range(9), split) for split in tasks.SPLITS)
    assert (train, test) == ((0, 1, 3, 4, 6, 7), (2, 5, 8))


@pytest.mark.parametrize("n_tokens", [10, 100])
def test_greater_than_has_the_gradient_of_its_value(n_tokens: int) -> None:
    own = GreaterThan(years=torch.tensor([34, 7]), tokens=torch.arange(n_tokens))
    logits = torch.randn(2, own.n_last, n_tokens + 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: own(x, torch.tensor([1, 0])), (logits,))
