"""What codes are used for: counted by hand, found again where they were planted, and steering where they steer."""

from __future__ import annotations

import math

import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries.codebook import Codebook
from interp.dictionaries.codebook_search import Coded, best_neuron, encoded, find, match_table, matching, patterns_of
from interp.dictionaries.codebook_stats import chosen_latents, contexts, usage
from interp.dictionaries.codebook_steer import draw_codes, followers, replaced, steer
from interp.dictionaries.codes import SparseCodes
from interp.instrument.capture import capture
from interp.instrument.edits import edited, set_to
from interp.instrument.tokens import from_ids
from interp.models.tiny import tiny_model

BOOK = Codebook(torch.eye(4)[None].repeat(2, 1, 1), 2)  # two groups of four codes, two codes per token and group
CODES = SparseCodes(torch.full((2, 4), 0.5), torch.tensor([[0, 1, 4, 5], [2, 0, 7, 4]]), 8)


def record_of(text: str, model):
    return from_ids(model, torch.tensor([list(text.encode())]))


def test_usage_by_hand():
    book = Codebook(torch.eye(4)[None], 1)
    used = usage(torch.tensor([[0], [0], [1], [3]]), book)
    assert used.counts.tolist() == [[2, 1, 0, 1]] and used.share.tolist() == [[0.5, 0.25, 0, 0.25]]
    assert used.perplexity.tolist() == [pytest.approx(math.exp(0.5 * math.log(2) + 0.5 * math.log(4)))]
    assert used.dead_fraction == 0.25
    ranked = used.ranked()
    assert ranked[ranked["series"] == "codes"]["share"].tolist() == [0.5, 0.25, 0.25]
    assert set(ranked[ranked["series"] == "uniform"]["share"]) == {0.25}
    with pytest.raises(InterpError, match="no activations"):
        chosen_latents(book, torch.zeros(0, 4))


def test_contexts_are_where_the_code_is_chosen():
    model = tiny_model("llama")
    record = record_of("abcabcab", model)
    keep = torch.ones(1, 8, dtype=torch.bool)
    keep[0, 0] = False
    latents = torch.tensor([1, 2, 0, 1, 2, 0, 1])[:, None]  # of b c a b c a b
    table = contexts(latents, record, keep, window=2, n_examples=9)
    assert table["latent"].unique().tolist() == [1]  # the others are chosen at fewer than three tokens
    assert sorted(table["pos"]) == [1, 4, 7] and set(table["token"]) == {"b"} and table["density"][0] == 3 / 7
    by_pos = table.set_index("pos")
    assert by_pos.loc[4, "before"] == "ca" and by_pos.loc[4, "after"] == "ca" and by_pos.loc[7, "after"] == ""
    assert contexts(latents, record, keep, latent_list=[2])["token"].tolist() == ["c", "c"]
    with pytest.raises(InterpError, match="7 encoded tokens for 8 kept ones"):
        contexts(latents, record, ~torch.zeros_like(keep))


def test_a_pattern_marks_every_token_it_touches():
    model = tiny_model("llama")
    record = record_of("x12 345", model)
    assert matching(record, r"\d\d").tolist() == [[False, True, True, False, True, True, False]]
    assert not matching(record, "q").any()
    with pytest.raises(InterpError, match="not a regular expression"):
        matching(record, "(")
    with pytest.raises(InterpError, match="names one twice"):
        patterns_of(["a", "a"])


def planted(n: int, seed: int, *, code_recall: float = 0.8, code_false: float = 0.01) -> tuple[Coded, torch.Tensor]:
    """A pattern at a fifth of the tokens; latent 5 and, less well, neuron 2 with a minus sign stand for it."""
    source = torch.Generator().manual_seed(seed)
    truth = torch.rand(n, generator=source) < 0.2
    draw = torch.rand(n, generator=source)
    on = torch.where(truth, draw < code_recall, draw < code_false)
    latents = torch.where(on, 5, torch.randint(0, 5, (n,), generator=source))[:, None]
    neurons = torch.randn(n, 4, generator=source)
    neurons[:, 2] -= 2 * truth
    return Coded(latents=latents, neurons=neurons, sequence=torch.arange(n) // 50, d_dict=8), truth


def test_a_planted_code_is_found_and_judged_on_other_text():
    (search, truth), (other, other_truth) = planted(4000, 0), planted(4000, 1)
    match = find(search, truth, other, other_truth)
    assert match is not None and match.latent == 5 and match.searched == 6
    precision = float((other_truth & (other.latents[:, 0] == 5)).sum() / (other.latents[:, 0] == 5).sum())
    assert match.precision(match.code).value == pytest.approx(precision)
    assert match.recall(match.code).value == pytest.approx(0.8, abs=0.03)
    assert match.base_rate == pytest.approx(0.2, abs=0.02)
    assert find(search, torch.zeros_like(truth), other, other_truth) is None
    table = match_table({"p": match}).set_index("kind")
    assert table.loc["code", "unit"] == 5 and table.loc["code", "precision"] == pytest.approx(precision)
    low, high = table.loc["code", ["precision_low", "precision_high"]]
    assert low <= precision <= high and high - low < 0.1


def test_the_best_neuron_is_that_of_a_plain_search_at_the_recall_of_the_code():
    search, truth = planted(1500, 0)
    hits = int((truth & (search.latents[:, 0] == 5)).sum())
    unit, sign, threshold = best_neuron(search.neurons, truth, hits, 8, seed=0)  # all four, with both signs
    assert (unit, sign) == (2, -1)
    best = 0.0
    for u in range(4):
        for s in (1, -1):
            values = search.neurons[:, u] * s
            cut = sorted(values[truth].tolist(), reverse=True)[hits - 1]
            best = max(best, float(truth[values >= cut].double().mean()))
    on = search.neurons[:, unit] * sign >= threshold
    assert int((on & truth).sum()) == hits  # the recall of the code
    assert float(truth[on].double().mean()) == pytest.approx(best)


def test_a_search_on_noise_finds_only_the_base_rate_on_other_text():
    source = torch.Generator().manual_seed(3)
    truth = torch.rand(8000, generator=source) < 0.3
    latents = torch.randint(0, 50, (8000, 2), generator=source)
    both = [
        Coded(latents=latents[part], neurons=torch.randn(4000, 40, generator=source), sequence=torch.arange(4000) // 40,
              d_dict=50)
        for part in (slice(0, 4000), slice(4000, 8000))
    ]  # fmt: skip
    match = find(both[0], truth[:4000], both[1], truth[4000:])
    assert match is not None
    assert match.precision(match.code).value == pytest.approx(match.base_rate, abs=0.08)


def test_tokens_codes_and_neurons_must_be_as_many():
    with pytest.raises(InterpError, match="2 codes, 2 neurons and 3 tokens need one number"):
        encoded(torch.zeros(2, 1).long(), torch.zeros(2, 4), torch.ones(1, 3, dtype=torch.bool), 4)


def test_choices_are_replaced_from_the_least_similar_on():
    last = replaced(BOOK, CODES, [3], slots=1)
    assert last.indices.tolist() == [[0, 3, 4, 5], [2, 3, 7, 4]] and torch.equal(last.values, CODES.values)
    assert replaced(BOOK, CODES, [6, 7]).indices.tolist() == [[0, 1, 6, 7], [2, 0, 6, 7]]
    off = replaced(BOOK, CODES, [-2])  # the zero code of the second group
    assert off.values.tolist() == [[0.5, 0.5, 0, 0]] * 2
    assert CODES.indices.tolist() == [[0, 1, 4, 5], [2, 0, 7, 4]]
    for latents, slots, message in (([], 1, "0 latents"), ([1], 3, "slots from 0 to k=2"), ([8], 1, "latents 0 to 7")):
        with pytest.raises(InterpError, match=message):
            replaced(BOOK, CODES, latents, slots)


def test_followers_are_the_tokens_whose_share_rises_most():
    latents = torch.tensor([0, 0, 0, 1, 1, 1, 0])[:, None]
    following = torch.tensor([7, 7, 2, 2, 2, 2, -1])  # -1: unknown
    assert followers(latents, following, torch.tensor([0, 1]), 1).tolist() == [[7], [2]]
    drawn = draw_codes(latents, 5, least=4, seed=0, label="test")
    assert drawn.tolist() == [0]
    with pytest.raises(InterpError, match="no code is chosen at 9 tokens"):
        draw_codes(latents, 5, least=9, seed=0, label="test")


def test_patching_a_code_does_what_setting_the_activation_does():
    """Codes are three activations that the model itself had; the effect is that of putting them there by hand."""
    model = tiny_model("llama")
    site = model.table.one("resid_post.1")
    ids = torch.randint(0, 256, (5, 9), generator=torch.Generator().manual_seed(0))
    prompts = from_ids(model, ids)
    with capture(model, site) as acts:
        model(prompts)
    chosen = acts[site][[0, 1, 2], 4]
    book = Codebook(chosen[None], 1)
    keep = torch.zeros(5, 9, dtype=torch.bool)
    keep[:, -1] = True
    follow = torch.tensor([[10, 20], [30, 40]])
    steered = steer(model, site, book, prompts, torch.tensor([0, 2]), follow, torch.tensor([1]), keep=keep)

    def mass(code: int) -> torch.Tensor:
        with edited(model, set_to(site, chosen[code], at=keep)):
            return model(prompts)[:, -1].double().log_softmax(-1)[:, follow].logsumexp(-1)

    own = book.encode(acts[site][:, -1]).indices[:, 0]
    base = torch.stack([mass(int(code))[row] for row, code in enumerate(own)])
    torch.testing.assert_close(
        steered.own, torch.stack([(mass(0) - base)[:, 0], (mass(2) - base)[:, 1]]), atol=1e-4, rtol=0
    )
    torch.testing.assert_close(steered.random, (mass(1) - base).mean(0)[None], atol=1e-4, rtol=0)
    table = steered.table({10: "x"})
    assert table["followers"].tolist()[0] == "'x' '20'" and table["effect"][0] == pytest.approx(
        float(steered.own[0].mean())
    )
    with pytest.raises(InterpError, match="last token is left out"):
        steer(model, site, book, prompts, torch.tensor([0]), follow[:1], torch.tensor([1]), keep=~keep)
