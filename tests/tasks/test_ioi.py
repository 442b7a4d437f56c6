"""Prompt pairs: alignment, roles, what is dropped, and what is refused."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from interp.core.errors import InterpError
from interp.instrument.tokens import adds_start, from_ids
from interp.models.load import load
from interp.models.tiny import tiny_model
from interp.tasks.base import Draft, PromptPairs, align, pair
from interp.tasks.ioi import NAMES, TEMPLATES, draft, ioi_pairs, random_draft, random_pairs, standard_drafts
from interp.tasks.task import Picker, held_out


def byte_draft(clean: str, corrupt: str, right: str = "a", wrong: str = "b") -> Draft:
    return Draft(clean=clean, corrupt=corrupt, right=right, wrong=wrong, roles={"X": clean.index("x")})


def test_alignment_keeps_positions_and_counts_what_it_drops() -> None:
    model = tiny_model("llama")
    pairs = align(
        model,
        [
            byte_draft("abxd", "abyd"),
            byte_draft("abcx", "aycx"),
            byte_draft("abx", "abxd"),
            byte_draft("xbcd", "ybcd", right="ab"),
            byte_draft("abcdex", "abcdey"),
        ],
    )
    assert len(pairs) == 2
    assert pairs.n_dropped == 3
    assert pairs.roles["X"].tolist() == [2, 3]
    assert pairs.roles["END"].tolist() == [3, 3]
    assert pairs.first_difference == 1
    assert pairs.answers.tolist() == [[ord("a"), ord("b")]] * 2
    assert any("3 tokens against 4" in note for note in pairs.notes)


def test_a_start_token_is_added_where_the_tokenizer_adds_one() -> None:
    plain, starting = tiny_model("llama"), tiny_model("llama")
    backend = starting.tokenizer.backend_tokenizer
    backend.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    drafts = [byte_draft("abxd", "abyd")]
    without, added = align(plain, drafts), align(starting, drafts)
    assert not adds_start(plain) and adds_start(starting)
    assert without.clean.ids.tolist() == [[*b"abxd"]] and not without.notes
    assert added.clean.ids.tolist() == [[256, *b"abxd"]]
    assert added.answers.tolist() == without.answers.tolist()
    assert (added.roles["X"].tolist(), added.roles["END"].tolist(), added.first_difference) == ([3], [4], 3)
    assert any("start token" in note for note in added.notes)
    backend.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 256), ("<eos>", 257)]
    )
    assert not adds_start(starting)  # the last token has to be the prompt's own


def test_unequal_lengths_and_split_answers_are_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(InterpError, match="3 tokens against 4"):
        pair(model, "abx", "abxd", "a", "b")
    with pytest.raises(InterpError, match="not one token"):
        pair(model, "abx", "abd", "ab", "b")
    with pytest.raises(InterpError, match="no prompt pairs"):
        align(model, [])
    ids = torch.tensor([[1, 2, 3]])
    with pytest.raises(InterpError, match="does not differ"):
        PromptPairs(clean=from_ids(model, ids), corrupt=from_ids(model, ids), answers=torch.tensor([[1, 2]]), roles={})
    with pytest.raises(InterpError, match="3 tokens, the corrupted one 2"):
        PromptPairs(
            clean=from_ids(model, ids), corrupt=from_ids(model, ids[:, :2]), answers=torch.tensor([[1, 2]]), roles={}
        )


def test_labels_name_roles_only_where_all_pairs_agree() -> None:
    pairs = random_pairs(tiny_model("llama"), n=2, length=6)
    assert pairs.label(3) == "3 S2"
    assert pairs.label(5) == "5 END"
    moved = PromptPairs(
        clean=pairs.clean, corrupt=pairs.corrupt, answers=pairs.answers, roles={"S2": torch.tensor([2, 3])}
    )
    assert "S2" not in moved.label(3)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("order", ["ABBA", "BABA"])
def test_drafts_are_sentences_about_two_people_one_of_whom_gives(order: str, split: str) -> None:
    names = set(held_out(NAMES, split))
    pick = Picker(0, "test")
    seen: set[str] = set()
    for _ in range(60):
        item = random_draft(pick, order, "s2", split)
        receiver, giver = item.right.strip(), item.wrong.strip()
        assert {receiver, giver} <= names and receiver != giver
        assert item.clean.count(giver) == 2 and item.clean.count(receiver) == 1
        assert item.corrupt.count(giver) == 1 and item.corrupt.count(receiver) == 2
        assert (item.roles["IO"] < item.roles["S1"]) == (order == "ABBA")
        assert item.clean[item.roles["S2"] :].startswith(giver)
        assert not item.clean[item.roles["S1+1"]].isspace()
        seen.add(item.template)
    assert seen == {f"{order} {number}" for number in held_out(range(len(TEMPLATES)), split)}


def test_splits_share_no_name_and_no_sentence() -> None:
    for items in (NAMES, TEMPLATES):
        train, test = held_out(items, "train"), held_out(items, "test")
        assert not set(train) & set(test)
        assert sorted((*train, *test)) == sorted(items) and len(set(items)) == len(items)
    assert len(TEMPLATES) == 15 and len(NAMES) >= 100


def test_corruptions_change_what_they_say() -> None:
    for corruption in ("s2", "abc", "swapped"):
        item = random_draft(Picker(1, "test"), "ABBA", corruption)
        receiver, giver = item.right.strip(), item.wrong.strip()
        there = {role: item.corrupt[at:].split(" ")[0].strip(",.") for role, at in item.corrupt_roles.items()}
        if corruption == "s2":
            assert there == {"IO": receiver, "S1": giver, "S2": receiver}
        elif corruption == "swapped":
            assert there == {"IO": giver, "S1": receiver, "S2": receiver}
        else:
            assert len({receiver, giver, *there.values()}) == 5


def test_one_giver_of_two() -> None:
    with pytest.raises(InterpError, match="one of two different names"):
        draft("Mary", "John", "Tom")


@pytest.mark.needs_model("smollm2-135m")
def test_the_model_can_do_it() -> None:
    model = load("smollm2-135m", check=False)
    pairs = align(model, standard_drafts())
    assert pairs.n_dropped == 0
    assert pairs.n_pos == 14
    assert pairs.first_difference == 9
    assert [pairs.clean.strings[0][int(pairs.roles[r][0])].strip() for r in ("S1", "S2", "END")] == [
        "Mary",
        "Mary",
        "to",
    ]
    mary = pair(
        model,
        "When Mary and John went to the store, John gave a drink to",
        "When Mary and John went to the store, Mary gave a drink to",
        " Mary",
        " John",
    )
    probs = model(mary.clean)[0, -1].softmax(-1)
    assert int(probs.argmax()) == int(mary.answers[0, 0])
    assert float(probs.max()) > 0.9
    drawn = ioi_pairs(model, 6, seed=3)
    logits = model(drawn.clean)[:, -1].gather(1, drawn.answers)
    assert len(drawn) == 6
    assert float((logits[:, 0] > logits[:, 1]).float().mean()) >= 0.9


@pytest.mark.needs_model("gemma3-270m")
def test_gemma_can_do_it_with_its_start_token() -> None:
    model = load("gemma3-270m", check=False)
    pairs = align(model, standard_drafts())
    chosen = model(pairs.clean)[:, -1].gather(1, pairs.answers)
    assert pairs.clean.strings[0][0] == "<bos>"
    assert bool((chosen[:, 0] > chosen[:, 1]).all())  # 1 of 8 without it
