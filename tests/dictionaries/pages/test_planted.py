"""Pages of latents whose answers are known: each fires on given token ids, and every number is computed again."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from interp.core.errors import InterpError
from interp.dictionaries.pages import FeaturePage, Pages, PagesConfig
from interp.instrument.stream import RecordBatches
from interp.instrument.tokens import TokenRecord
from tests.dictionaries.pages import planted

CFG = PagesConfig(latents="all", min_firings=3, n_top=6, n_intervals=5, n_per_interval=2, n_bins=10, n_ablated=3)
A, B, C, D = (ord(letter) for letter in "abcd")


def collect(record: TokenRecord, cfg: PagesConfig = CFG, **more: object) -> dict[int, FeaturePage]:
    with Pages(planted.model(), planted.dictionary(), record, planted.SITE, cfg, **more) as pages:
        return {page.latent: page for page in pages}


@pytest.fixture(scope="module")
def record() -> TokenRecord:
    return planted.text()


@pytest.fixture(scope="module")
def pages(record: TokenRecord) -> dict[int, FeaturePage]:
    return collect(record)


def counted(record: TokenRecord) -> torch.Tensor:
    """Everything but the first token of each row; random weights have no massive activations."""
    kept = record.mask.clone()
    kept[torch.arange(len(record)), record.first] = False
    return kept


def test_density_counts_the_token(pages: dict[int, FeaturePage], record: TokenRecord) -> None:
    kept = counted(record)
    n = int((record.ids[kept] == A).sum())
    header = pages[0].header
    assert header.n_firings == n
    assert header.density == n / int(kept.sum())
    assert header.max_activation == 2.0
    assert not header.dead
    assert 4 not in pages, "a dead latent is not live"


def test_examples_are_at_the_token(pages: dict[int, FeaturePage], record: TokenRecord) -> None:
    kept = counted(record)
    for example in pages[0].examples:
        assert example.ids[example.at] == A
        assert example.tokens[example.at] == "a"
        for offset, (token, value) in enumerate(zip(example.ids, example.values, strict=True)):
            pos = example.start + offset
            assert token == int(record.ids[example.row, pos])
            assert value == (2.0 if token == A and kept[example.row, pos] else 0.0)
    top = [(example.row, example.pos) for example in pages[0].examples if example.group == -1]
    everywhere = ((record.ids == A) & kept).nonzero().tolist()
    assert top == [tuple(place) for place in everywhere[:6]], "equal activations come in the order of the text"
    assert {example.group for example in pages[0].examples} == {-1, 4}, "one value fills the highest interval only"


def test_histogram_of_one_value_is_its_last_bin(pages: dict[int, FeaturePage]) -> None:
    histogram = pages[0].histogram
    assert histogram is not None
    assert histogram.counts == (*[0] * 9, pages[0].header.n_firings)
    assert histogram.edges[-1] == 2.0


def test_an_edge_belongs_to_the_bin_below_it(record: TokenRecord) -> None:
    dictionary = planted.dictionary()
    dictionary.table[B, 0] = 1.0  # half of the largest value
    with Pages(planted.model(), dictionary, record, planted.SITE, dataclasses.replace(CFG, n_ablated=0)) as made:
        page = next(iter(made))
    ids = record.ids[counted(record)]
    expected = [0] * 10
    expected[4], expected[9] = int((ids == B).sum()), int((ids == A).sum())
    assert page.histogram.counts == tuple(expected)
    assert {(e.group, e.ids[e.at]) for e in page.examples if e.group >= 0} == {(2, B), (4, A)}


def test_the_commonest_token_and_its_share(pages: dict[int, FeaturePage], record: TokenRecord) -> None:
    assert pages[0].common is not None
    assert (pages[0].common.id, pages[0].common.text, pages[0].common.value) == (A, "a", 1.0)
    ids = record.ids[counted(record)]
    n_c, n_d = int((ids == C).sum()), int((ids == D).sum())
    assert pages[3].scores.token_share == max(n_c, n_d) / (n_c + n_d)
    sets = {0: {A}, 1: {B}, 2: {A}, 3: {C, D}, 5: {ord(x) for x in "efgh"}}
    for page in pages.values():
        assert page.null_latent is not None
        other = torch.tensor(sorted(sets[page.null_latent]))
        expected = float((ids == page.common.id).sum()) if page.common.id in sets[page.null_latent] else 0.0
        assert page.scores.token_share_null == pytest.approx(expected / float(torch.isin(ids, other).sum()))


def test_headers_have_no_encoder_where_there_is_none(pages: dict[int, FeaturePage]) -> None:
    header = pages[0].header
    assert header.encoder_norm is header.cosine is header.bias is None
    assert header.decoder_norm == pytest.approx(float(planted.dictionary().rows[0].norm()))


def test_neighbours_that_were_planted(pages: dict[int, FeaturePage], record: TokenRecord) -> None:
    rows = planted.dictionary().rows.double().numpy()
    similar = pages[0].neighbours.similar[0]
    assert similar.latent == 1
    cosine = rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
    assert similar.value == pytest.approx(cosine, abs=1e-6)
    assert all(near.latent != 0 for near in pages[0].neighbours.similar), "never itself"
    correlated = pages[0].neighbours.correlated
    assert [near.latent for near in correlated] == [2], "the others exclude each other, so they correlate negatively"
    assert correlated[0].value == pytest.approx(1.0)
    assert pages[0].neighbours.neurons == (), "no neuron writes before the first block"
    index, value, share = pages[0].neighbours.coordinates[0]
    assert (index, value) == (int(rows[0].argmax()), pytest.approx(rows[0].max()))
    assert share == pytest.approx(rows[0].max() / np.abs(rows[0]).sum())


def test_logit_lens_against_the_weights(pages: dict[int, FeaturePage]) -> None:
    model = planted.model()
    gamma = model.module.get_parameter("model.norm.weight").double()
    logits = (planted.dictionary().rows[0].double() * gamma) @ model.module.get_parameter("lm_head.weight").double().T
    logits -= logits.mean()
    lens = pages[0].lens
    assert lens is not None
    best = logits.topk(10)
    assert [token.id for token in lens.top] == best.indices.tolist()
    assert [token.value for token in lens.top] == pytest.approx(best.values.tolist(), rel=1e-4)
    worst = logits.topk(10, largest=False)
    assert [token.id for token in lens.bottom] == worst.indices.tolist()
    assert sum(lens.histogram.counts) == len(logits)
    z = (logits / logits.std(unbiased=False)).detach().numpy()
    assert lens.skew == pytest.approx((z**3).mean(), abs=1e-4)
    assert lens.kurtosis == pytest.approx((z**4).mean() - 3, abs=1e-3)


def test_lens_hits_are_counted_at_next_tokens(record: TokenRecord) -> None:
    """Rows that promote `b` most: a hit is an `a` before a `b`."""
    dictionary = planted.dictionary()
    model = planted.model()
    unembed = model.weight("W_U") * model.module.get_parameter("model.norm.weight")[:, None]
    dictionary.rows[0] = torch.linalg.lstsq(unembed.T.double(), torch.eye(259)[B].double()).solution.float()
    cfg = dataclasses.replace(CFG, latents=(0,), n_tokens_listed=1, n_ablated=0)
    with Pages(model, dictionary, record, planted.SITE, cfg) as made:
        page = next(iter(made))
    assert page.lens is not None
    assert page.lens.top[0].id == B
    kept = counted(record)[:, :-1]
    here, following = record.ids[:, :-1], record.ids[:, 1:]
    fires = (here == A) & kept
    assert page.lens.hit == pytest.approx(float((following[fires] == B).float().mean()))
    assert page.lens.hit_null == 0.0, "no other row promotes a letter of this text"


def losses(ids: torch.Tensor, change: torch.Tensor | None) -> torch.Tensor:
    """Next-token losses by plain torch, with something added to the embeddings."""
    module = planted.model().module
    embeddings = module.get_parameter("model.embed_tokens.weight")[ids]
    with torch.no_grad():
        logits = module(inputs_embeds=embeddings if change is None else embeddings + change, use_cache=False).logits
    log_p = logits.double().log_softmax(-1)[:, :-1]
    return -log_p.gather(-1, ids[:, 1:, None])[..., 0]


def test_ablation_against_a_computation_of_its_own(pages: dict[int, FeaturePage], record: TokenRecord) -> None:
    rows, kept = planted.dictionary().rows, counted(record)
    page = pages[0]
    fires = (record.ids == A) & kept
    rises = losses(record.ids, torch.where(fires[..., None], -2.0 * rows[0], 0.0)) - losses(record.ids, None)
    push = -rows[page.null_latent] / rows[page.null_latent].norm() * 2.0 * rows[0].norm()
    nulls = losses(record.ids, torch.where(fires[..., None], push, 0.0)) - losses(record.ids, None)
    with_loss = [example for example in page.examples if example.loss is not None]
    assert len(with_loss) == CFG.n_ablated
    for example in with_loss:
        for offset, rise in enumerate(example.loss):
            pos = example.start + offset
            if pos + 1 == record.ids.shape[1]:
                assert rise is None, "nothing follows the last token"
            else:
                assert rise == pytest.approx(float(rises[example.row, pos]), abs=1e-4)
        assert example.loss_null == pytest.approx(float(nulls[example.row, example.pos]), abs=1e-4)
    at = [float(rises[e.row, e.pos]) for e in with_loss if e.pos + 1 < record.ids.shape[1]]
    assert page.scores.ablation == pytest.approx(sum(at) / len(at), abs=1e-4)
    assert page.scores.n_ablated == len(at)
    assert abs(page.scores.ablation) > 0.01, "the test has something to see"


def same(a: dict[int, FeaturePage], b: dict[int, FeaturePage]) -> None:
    assert a.keys() == b.keys()
    for latent in a:
        assert a[latent] == b[latent], f"latent {latent}"


@pytest.mark.parametrize("rows_per_forward", [1, 5])
def test_batches_do_not_matter(record: TokenRecord, rows_per_forward: int) -> None:
    cfg = dataclasses.replace(CFG, n_ablated=0)
    with Pages(
        planted.model(), planted.dictionary(), RecordBatches(record, rows_per_forward), planted.SITE, cfg
    ) as cut:
        same({page.latent: page for page in cut}, collect(record, cfg))


@pytest.mark.parametrize("chunk", [1, 2])
def test_chunks_of_latents_do_not_matter(record: TokenRecord, chunk: int) -> None:
    """Matrix products of another shape round differently, so only what is not counted may differ, and only so far."""
    whole = collect(record, dataclasses.replace(CFG, n_ablated=0))
    for latent, page in collect(record, dataclasses.replace(CFG, n_ablated=0, chunk=chunk)).items():
        other = whole[latent]
        assert dataclasses.replace(page, lens=None, neighbours=other.neighbours) == dataclasses.replace(
            other, lens=None
        )
        assert page.lens.top[0].id == other.lens.top[0].id
        assert page.lens.top[0].value == pytest.approx(other.lens.top[0].value, rel=1e-5)
        assert (page.lens.hit, page.lens.hit_null) == (other.lens.hit, other.lens.hit_null)
        for mine, theirs in zip(page.neighbours.similar, other.neighbours.similar, strict=True):
            assert (mine.latent, mine.value) == (theirs.latent, pytest.approx(theirs.value, abs=1e-6))
        assert page.neighbours.correlated == other.neighbours.correlated


def test_blocks_of_codes_do_not_matter(record: TokenRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = dataclasses.replace(CFG, n_ablated=0)
    whole = collect(record, cfg)
    monkeypatch.setattr("interp.dictionaries.pages.tally.Tally.read.__defaults__", (1,))
    same(collect(record, cfg), whole)


def test_padding_changes_nothing(record: TokenRecord) -> None:
    """Rows of unequal length: the same pages whether padded on the right or given one by one."""
    from interp.instrument.tokens import from_rows

    rows = [record.ids[i, : 40 - 3 * i].tolist() for i in range(8)]
    cfg = dataclasses.replace(CFG, n_ablated=0)
    right, left = (collect(from_rows(planted.model(), rows, pad=side), cfg) for side in ("right", "left"))
    same(right, left)
    ids = torch.tensor([token for row in rows for token in row[1:]])
    assert right[0].header.n_firings == int((ids == A).sum())


def test_the_overview_says_what_was_left_out(record: TokenRecord) -> None:
    with Pages(planted.model(), planted.dictionary(), record, planted.SITE, CFG, corpus="letters") as made:
        overview = made.overview
    assert (overview.d_dict, overview.n_dead, overview.n_rare, overview.n_live) == (6, 1, 0, 5)
    assert overview.n_tokens == 480
    assert overview.n_counted == 468
    assert overview.chosen == "all"
    assert sum(overview.density.counts) == 5
    assert any("12 of 480 tokens are left out" in note for note in overview.notes)
    many = dataclasses.replace(CFG, min_firings=100)
    with Pages(planted.model(), planted.dictionary(), record, planted.SITE, many) as made:
        found = made.overview
        shown = {page.latent for page in made}
    fired = {latent: page.header.n_firings for latent, page in collect(record).items()}
    assert found.n_rare == sum(n < 100 for n in fired.values())
    assert shown == {latent for latent, n in fired.items() if n >= 100}


def test_a_dead_latent_that_is_named_has_a_page(record: TokenRecord) -> None:
    page = collect(record, dataclasses.replace(CFG, latents=(4,)))[4]
    assert page.header.dead
    assert page.examples == ()
    assert page.histogram is page.common is page.null_latent is None
    assert page.scores.ablation is page.scores.token_share is None
    assert page.lens is not None, "its row still promotes tokens"
    assert page.lens.hit is None


def test_nothing_is_left_behind(record: TokenRecord, tmp_path: Path) -> None:
    cfg = dataclasses.replace(CFG, n_ablated=0)
    with Pages(planted.model(), planted.dictionary(), record, planted.SITE, cfg, scratch=tmp_path) as made:
        assert list(tmp_path.iterdir())
        next(iter(made))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(InterpError, match="latents 0 to 5"):
        collect(record, dataclasses.replace(CFG, latents=(9,)), scratch=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_latent_fires_often_enough(record: TokenRecord) -> None:
    with pytest.raises(InterpError, match="no latent fires at 10000 or more"):
        collect(record, dataclasses.replace(CFG, min_firings=10_000))


def test_vectors_come_when_asked_for(record: TokenRecord) -> None:
    cfg = dataclasses.replace(CFG, latents=(1,), n_ablated=0)
    page = collect(record, cfg, vectors=True)[1]
    assert page.vector == tuple(planted.dictionary().rows[1].tolist())
