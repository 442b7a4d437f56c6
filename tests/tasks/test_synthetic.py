"""Tasks of token ids: readers that know the rule are always right, readers that do not are at chance, nothing leaks."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
import torch
from scipy.stats import chisquare
from tokenizers.processors import TemplateProcessing

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model
from interp.tasks.base import PromptPairs
from interp.tasks.induction import SequenceDiff, induction_pairs
from interp.tasks.library import TASKS, make_pairs
from interp.tasks.modular_addition import addition_pairs, modulus_of, table
from interp.tasks.recall import NO_LABEL, recall_rows
from interp.tasks.sequences import ordinary
from interp.tasks.task import Request

SYNTHETIC = [(name, corruption) for name, task in TASKS.items() if not task.words for corruption in task.corruptions]
N = 200
SMALL = {"vocab_size": 12, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama", n_layers=1, d_model=8, n_heads=1, n_kv_heads=1, d_mlp=8)


def request(n: int = N, corruption: str = "", seed: int = 0, split: str = "train") -> Request:
    return Request(n=n, seed=seed, corruption=corruption, split=split)


def hash_map(ids: list[int]) -> int | None:
    """What followed the last token when it stood there first; None if it never did."""
    followed: dict[int, int] = {}
    for token, after in pairwise(ids):
        followed.setdefault(token, after)
    return followed.get(ids[-1])


def both(pairs: PromptPairs) -> list[tuple[list[int], int, int]]:
    """Clean and corrupted prompts, each with its answer and the other one's."""
    sides = ((pairs.clean.ids, 0), (pairs.corrupt.ids, 1))
    return [
        (ids.tolist(), int(answer[side]), int(answer[1 - side]))
        for rows, side in sides
        for ids, answer in zip(rows, pairs.answers, strict=True)
    ]


@pytest.mark.parametrize(("name", "corruption"), SYNTHETIC)
def test_every_task_gives_what_was_asked_for(model: LoadedModel, name: str, corruption: str) -> None:
    pairs = make_pairs(model, name, 12, 3, corruption)
    assert len(pairs) == 12 and pairs.n_dropped == 0
    assert set(pairs.roles) == set(TASKS[name].roles)
    assert bool((pairs.answers[:, 0] != pairs.answers[:, 1]).all())
    assert bool((pairs.clean.ids < 256).all())  # no special token
    again, other = (make_pairs(model, name, 12, seed, corruption) for seed in (3, 4))
    assert pairs.hash == again.hash != other.hash
    assert pairs.hash != make_pairs(model, name, 12, 3, corruption, split="test").hash


@pytest.mark.parametrize(("name", "corruption"), SYNTHETIC)
def test_the_start_token_moves_every_role_by_one(model: LoadedModel, name: str, corruption: str) -> None:
    starting = tiny_model("llama", n_layers=1, d_model=8, n_heads=1, n_kv_heads=1, d_mlp=8)
    starting.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 256)]
    )
    plain, moved = (make_pairs(m, name, 4, 0, corruption) for m in (model, starting))
    assert torch.equal(moved.clean.ids[:, 1:], plain.clean.ids) and bool((moved.clean.ids[:, 0] == 256).all())
    assert torch.equal(moved.corrupt.ids[:, 1:], plain.corrupt.ids)
    for role, where in plain.roles.items():
        assert torch.equal(moved.roles[role], where + 1)
    assert any("start token" in note for note in moved.notes)


def test_a_model_without_tokenizer_is_asked_all_the_same(model: LoadedModel) -> None:
    bare = LoadedModel(module=model.module, source="bare")
    for name in {name for name, _ in SYNTHETIC}:
        assert len(make_pairs(bare, name, 5)) == 5
    assert len(ordinary(bare, 1)) == 259 and len(ordinary(model, 1)) == 256


@pytest.mark.parametrize(
    ("name", "corruption"),
    [("induction", "target"), ("induction", "query"), ("mqar", "values"), ("mqar", "query"),
     ("classification", "labels"), ("classification", "query")],
)  # fmt: skip
def test_a_hash_map_reads_every_answer(model: LoadedModel, name: str, corruption: str) -> None:
    pairs = make_pairs(model, name, N, 1, corruption)
    assert all(hash_map(ids) == answer for ids, answer, _ in both(pairs))


@pytest.mark.parametrize(("name", "k"), [("induction", 16), ("mqar", 4), ("classification", 4)])
def test_a_bag_of_tokens_is_right_as_often_as_chance(model: LoadedModel, name: str, k: int) -> None:
    """Knows which tokens can be answers, not which belongs to the one asked about."""
    pairs = make_pairs(model, name, 600, 2)
    draw, hits = random.Random(0), 0
    for ids, answer, _ in both(pairs)[:600]:
        bag = ids[:16] if name == "induction" else ids[1 : 2 * k : 2] if name == "mqar" else ids[1::2]
        hits += draw.choice(sorted(set(bag))) == answer
    assert abs(hits / 600 - 1 / k) < 4 * (1 / k * (1 - 1 / k) / 600) ** 0.5


def test_nothing_leaks_the_answer(model: LoadedModel) -> None:
    """The answer stands once in an induction or recall prompt, and never after the token asked about again."""
    for name in ("induction", "mqar"):
        for ids, answer, _ in both(make_pairs(model, name, N, 5)):
            assert ids.count(answer) == 1 and ids[-1] != answer
    for ids, _, _ in both(make_pairs(model, "mqar", N, 5)):
        assert all(token not in ids[8:] for token in ids[1:8:2])  # values only among the pairs


def test_roles_of_synthetic_tasks_point_at_the_evidence(model: LoadedModel) -> None:
    for name, asked, answered in (
        ("induction", "A1", "B1"),
        ("mqar", "KEY", "VALUE"),
        ("classification", "ITEM", "LABEL"),
    ):
        pairs = make_pairs(model, name, 50, 6)
        for row, ids in enumerate(pairs.clean.ids.tolist()):
            assert ids[int(pairs.roles[asked][row])] == ids[-1]
            assert ids[int(pairs.roles[answered][row])] == int(pairs.answers[row, 0])
    pairs = make_pairs(model, "copying", 50, 6)
    for row, ids in enumerate(pairs.clean.ids.tolist()):
        assert ids[int(pairs.roles["SOURCE"][row])] == int(pairs.answers[row, 0])
        assert ids[int(pairs.roles["SEP1"][row])] == ids[int(pairs.roles["SEP2"][row])]


def test_fresh_halves_say_nothing_and_are_measured_whole(model: LoadedModel) -> None:
    pairs = induction_pairs(model, request(20, "fresh"), length=6)
    own = pairs.own
    assert isinstance(own, SequenceDiff) and own.n_last == 5
    for row in range(20):
        clean, corrupt = pairs.clean.ids[row].tolist(), pairs.corrupt.ids[row].tolist()
        assert clean[:6] == corrupt[:6] and clean[6:] == clean[:5]
        assert not set(corrupt[6:]) & set(corrupt[:6])
        assert own.right[row].tolist() == [*clean[7:], int(pairs.answers[row, 0])]
        assert own.wrong[row].tolist() == [*corrupt[7:], int(pairs.answers[row, 1])]
    logits = torch.randn(3, 5, 259, dtype=torch.float64)
    rows = torch.tensor([4, 0, 4])
    by_hand = [
        sum(float(logits[i, t, own.right[r, t]] - logits[i, t, own.wrong[r, t]]) for t in range(5)) / 5
        for i, r in enumerate(rows.tolist())
    ]
    assert own(logits, rows).tolist() == pytest.approx(by_hand)
    assert own.take([4])(logits[:1], torch.tensor([0])).tolist() == pytest.approx(by_hand[:1])


def copied_by_place(ids: list[int]) -> int:
    separators = [i for i, token in enumerate(ids) if token == ids[0]]
    return ids[len(ids) - separators[1]]


def test_copying_needs_the_place(model: LoadedModel) -> None:
    draw, hits, total = random.Random(0), 0, 0
    for corruption in ("target", "source"):
        rows = both(make_pairs(model, "copying", N, 7, corruption))
        assert all(copied_by_place(ids) == answer for ids, answer, _ in rows)
        for ids, answer, _ in rows[:N]:
            source = ids[1 : ids.index(ids[0], 1)]
            follows = [after for token, after in pairwise(source) if token == ids[-1]]
            assert len(set(follows)) > 1
            hits, total = hits + (draw.choice(follows) == answer), total + 1
    assert hits / total < 0.6  # a match of the last token alone


def test_recall_rows_are_the_published_layout() -> None:
    made = recall_rows(torch.arange(100, 200), 300, n_keys=5, length=40, generator=torch_generator(0, "test"))
    ids, labels = made.ids, made.labels
    assert torch.equal(ids[:, 0:10:2], made.keys) and torch.equal(ids[:, 1:10:2], made.values)
    assert int(made.keys.max()) < int(made.values.min()) and int(made.keys.min()) > 100
    assert bool((made.queries >= 10).all()) and bool((made.queries % 2 == 0).all())
    assert bool((made.queries.max(dim=1).values == ids.shape[1] - 1).all())
    for row in range(300):
        assert len(set(made.keys[row].tolist())) == len(set(made.values[row].tolist())) == 5
        assert len(set(made.queries[row].tolist())) == 5
        known = dict(zip(ids[row, 0:10:2].tolist(), ids[row, 1:10:2].tolist(), strict=True))
        for pos in range(ids.shape[1]):
            token, label = int(ids[row, pos]), int(labels[row, pos])
            assert label == (known[token] if pos >= 10 and token != 100 else NO_LABEL)
    assert int((labels != NO_LABEL).sum()) == 1500


def test_gaps_follow_the_power_law() -> None:
    """With two keys one slot is drawn: its frequency is the law itself."""
    made = recall_rows(
        torch.arange(50), 20_000, n_keys=2, length=24, power=0.5, generator=torch_generator(1, "test")
    )  # fmt: skip
    slots = (made.queries.min(dim=1).values - 4) // 2
    n_slots = (made.ids.shape[1] - 4) // 2
    weights = [x**-0.5 for x in range(1, n_slots + 1)]
    counts = slots.bincount(minlength=n_slots).tolist()
    expected = [20_000 * w / sum(weights) for w in weights]
    assert n_slots == 9 and float(chisquare(counts, expected).pvalue) > 1e-3
    assert float(chisquare(counts).pvalue) < 1e-6


def test_random_fillers_come_from_all_tokens() -> None:
    args = {"n_keys": 2, "length": 24}
    pool = torch.arange(30)
    plain = recall_rows(pool, 50, **args, generator=torch_generator(2, "test"))
    mixed = recall_rows(pool, 50, **args, random_filler=True, generator=torch_generator(2, "test"))
    assert all((row == 0).sum() == len(row) - 6 for row in plain.ids)
    assert len(mixed.ids[:, 5:].unique()) == 30
    with pytest.raises(InterpError, match="at least 24 tokens"):
        recall_rows(pool, 5, n_keys=6, length=20, generator=torch_generator(0, "test"))
    with pytest.raises(InterpError, match="13 different tokens, got 11"):
        recall_rows(torch.arange(11), 5, n_keys=6, length=30, generator=torch_generator(0, "test"))


@pytest.mark.parametrize("modulus", [5, 7, 113])
def test_the_table_of_sums_is_cut_in_two(modulus: int) -> None:
    train, test = ({tuple(s) for s in table(modulus, split).tolist()} for split in ("train", "test"))
    assert not train & test
    assert train | test == {(a, b) for a in range(modulus) for b in range(modulus)}
    assert len(test) == modulus * modulus // 3


@pytest.mark.parametrize(("corruption", "kept"), [("a", 1), ("b", 0)])
def test_sums_are_right_and_of_their_split(model: LoadedModel, corruption: str, kept: int) -> None:
    pairs = make_pairs(model, "modular-addition", N, 8, corruption, split="test")
    allowed = {tuple(s) for s in table(113, "test").tolist()}
    for (clean, right, _), (corrupt, wrong, _) in zip(both(pairs)[:N], both(pairs)[N:], strict=True):
        assert right == (clean[0] + clean[1]) % 113 and wrong == (corrupt[0] + corrupt[1]) % 113
        assert clean[2] == corrupt[2] == 113
        assert tuple(clean[:2]) in allowed and tuple(corrupt[:2]) in allowed
        assert clean[kept] == corrupt[kept] and clean[1 - kept] != corrupt[1 - kept]


def test_small_tables_say_that_they_are_small(model: LoadedModel) -> None:
    pairs = addition_pairs(model, request(100, "b", split="test"), modulus=5)
    assert len(pairs) == len({tuple(ids) for ids in pairs.clean.ids.tolist()}) <= 8
    assert any(f"{len(pairs)} pairs instead of 100" in note for note in pairs.notes)
    assert [modulus_of(n) for n in (256, 115, 114, 113, 20, 12)] == [113, 113, 113, 109, 19, 11]
    with pytest.raises(InterpError, match="modulus=300"):
        addition_pairs(model, request(5, "b"), modulus=300)
    small = tiny_model("llama", n_layers=1, d_model=8, n_heads=1, n_kv_heads=1, d_mlp=8, overrides=SMALL)
    bare = LoadedModel(module=small.module, source="small")
    with pytest.raises(InterpError, match="needs 32 different tokens; small has 12"):
        make_pairs(bare, "induction", 3)
