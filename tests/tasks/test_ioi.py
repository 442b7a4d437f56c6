"""Prompt pairs: alignment, roles, what is dropped, and what is refused."""

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from interp.core.errors import InterpError
from interp.instrument.tokens import adds_start, from_ids
from interp.models.load import load
from interp.models.tiny import tiny_model
from interp.tasks.base import Draft, PromptPairs, align, pair
from interp.tasks.ioi import NAMES, draft, ioi_pairs, random_drafts, random_pairs, standard_drafts


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


def test_random_drafts_are_seeded_balanced_and_proper() -> None:
    drafts = random_drafts(20, seed=1)
    assert drafts == random_drafts(20, seed=1) != random_drafts(20, seed=2)
    for item in drafts:
        assert item.right.strip() in NAMES
        assert item.right != item.wrong
        assert item.clean.count(item.wrong.strip()) == 2
        assert item.corrupt.count(item.right.strip()) == 2
    second_gives = [item.roles["S1"] > item.roles["IO"] for item in drafts]
    assert sum(second_gives) == 10
    with pytest.raises(InterpError, match="at least 1"):
        random_drafts(0, seed=0)
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
