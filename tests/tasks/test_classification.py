"""In-context classification: bursts, Zipf's law, and which rows context or weights can answer."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import chisquare

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.models.tiny import tiny_model
from interp.tasks.classification import ClassLaw, ClassRows, class_rows, classification_pairs
from interp.tasks.library import make_pairs
from interp.tasks.task import Request


def rows(n: int = 2000, **fields: float) -> tuple[ClassLaw, ClassRows]:
    law = ClassLaw(**fields)  # pyright: ignore[reportArgumentType]
    return law, class_rows(law, n, generator=torch_generator(0, "test"))


def in_context(made: ClassRows) -> list[int | None]:
    """Label of the last example with the same item; None if there is none."""
    found: list[int | None] = []
    for ids in made.ids.tolist():
        known = dict(zip(ids[:-1:2], ids[1::2], strict=True))
        found.append(known.get(ids[-1]))
    return found


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_bursty_rows_repeat_every_class_the_same_number_of_times(copies: int) -> None:
    law, made = rows(300, copies=copies)
    for classes, asked in zip(made.classes.tolist(), made.asked.tolist(), strict=True):
        assert all(classes.count(c) == copies for c in classes)
        assert classes.count(asked) == copies and len(set(classes)) == law.n_distinct
    assert bool(made.bursty.all())
    assert in_context(made) == made.label.tolist()


def test_places_of_the_class_asked_for_are_uniform() -> None:
    _, made = rows(4000, copies=1)
    places = (made.classes == made.asked[:, None]).int().argmax(1)
    assert float(chisquare(places.bincount(minlength=8).tolist()).pvalue) > 1e-3


@pytest.mark.parametrize("alpha", [0.0, 1.0, 1.5])
def test_classes_follow_zipfs_law(alpha: float) -> None:
    _, made = rows(4000, alpha=alpha, p_bursty=0.0)
    counts = torch.cat([made.classes, made.asked[:, None]], dim=1).flatten().bincount(minlength=32)
    weights = [(k + 1) ** -alpha for k in range(32)]
    expected = [36_000 * w / sum(weights) for w in weights]
    assert float(chisquare(counts.tolist(), expected).pvalue) > 1e-3
    assert (float(chisquare(counts.tolist()).pvalue) < 1e-6) == (alpha > 0)


def test_shares_of_bursty_and_fresh_rows() -> None:
    _, made = rows(4000, p_bursty=0.7, p_fresh=0.25)
    assert float(made.bursty.double().mean()) == pytest.approx(0.7, abs=0.03)
    assert float(made.fresh.double().mean()) == pytest.approx(0.25, abs=0.03)


def test_weights_know_fixed_labels_and_nothing_of_fresh_ones() -> None:
    law, fixed = rows(p_fresh=0.0)
    assert torch.equal(fixed.label, fixed.asked % law.n_labels)
    assert torch.equal(fixed.ids[:, 1::2], fixed.classes % law.n_labels)
    _, fresh = rows(4000)
    by_weights = (fresh.label == fresh.asked % law.n_labels).double().mean()
    assert float(by_weights) == pytest.approx(1 / 16, abs=4 * (1 / 16 * 15 / 16 / 4000) ** 0.5)
    for labels, classes in zip(fresh.ids[:50, 1::2].tolist(), fresh.classes[:50].tolist(), strict=True):
        assert len(set(zip(labels, classes, strict=True))) == len(set(labels)) == len(set(classes))


def test_rows_that_are_not_bursty_often_lack_the_class() -> None:
    _, made = rows(3000, p_bursty=0.0, p_fresh=0.0, alpha=0.0)
    found = in_context(made)
    assert all(label == true for label, true in zip(found, made.label.tolist(), strict=True) if label is not None)
    assert sum(label is None for label in found) / 3000 == pytest.approx((31 / 32) ** 8, abs=0.04)


def test_classes_with_several_tokens() -> None:
    law, made = rows(500, n_exemplars=3)
    items = made.ids[:, ::2]
    shown = torch.cat([made.classes, made.asked[:, None]], dim=1)
    assert torch.equal((items - law.n_labels) // 3, shown)
    assert sorted(((items - law.n_labels) % 3).unique().tolist()) == [0, 1, 2]
    assert int(made.ids.max()) < law.n_tokens
    assert None in in_context(made)


@pytest.mark.parametrize("corruption", ["labels", "query"])
def test_pairs_change_all_copies_and_nothing_else(corruption: str) -> None:
    model = tiny_model("llama", n_layers=1, d_model=8, n_heads=1, n_kv_heads=1, d_mlp=8)
    pairs = make_pairs(model, "classification", 100, 1, corruption)
    for clean, corrupt, answers in zip(
        pairs.clean.ids.tolist(), pairs.corrupt.ids.tolist(), pairs.answers.tolist(), strict=True
    ):
        changed = [i for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b]
        if corruption == "query":
            assert changed == [16] and corrupt[16] in clean[0:16:2]
        else:
            assert len(changed) == 4 and all(i % 2 for i in changed)
            assert sorted(clean[i] for i in changed) == sorted(corrupt[i] for i in changed) == sorted(answers * 2)


def test_laws_that_cannot_be_are_refused() -> None:
    with pytest.raises(InterpError, match="copies=3 must divide"):
        ClassLaw(copies=3)
    with pytest.raises(InterpError, match="8 classes in a row"):
        ClassLaw(copies=1, n_labels=4)
    with pytest.raises(InterpError, match="p_bursty"):
        ClassLaw(p_bursty=1.2)
    model = tiny_model("llama", n_layers=1, d_model=8, n_heads=1, n_kv_heads=1, d_mlp=8)
    asked = Request(n=4, seed=0, corruption="labels", split="train")
    for law in (ClassLaw(copies=8), ClassLaw(p_fresh=0.5)):
        with pytest.raises(InterpError, match="two classes or more"):
            classification_pairs(model, asked, law)
