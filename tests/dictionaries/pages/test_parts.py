"""What is counted, against something simpler: sorting everything, dense correlations, lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from interp.core.seed import numpy_generator
from interp.dictionaries.pages import Pages, PagesConfig
from interp.dictionaries.pages.choose import choose_latents, stand_ins
from interp.dictionaries.pages.codes_file import CodesWriter
from interp.dictionaries.pages.keep import Best, Kept, lottery, window_keys
from interp.dictionaries.pages.tally import Tally
from tests.dictionaries.pages import planted

# Best of a stream


def random_kept(n: int, seed: int) -> Kept:
    draw = numpy_generator(seed, "kept")
    return Kept(
        group=draw.integers(0, 5, n), score=draw.integers(0, 20, n).astype(float), row=draw.integers(0, 30, n),
        pos=draw.integers(0, 9, n), key=draw.integers(0, 40, n).astype(np.uint64),
    )  # fmt: skip


@pytest.mark.parametrize("pieces", [1, 2, 17, 200])
def test_the_best_of_a_stream_are_those_of_sorting_everything(pieces: int) -> None:
    every = random_kept(200, 1)
    best = Best(5, 4)
    for part in np.array_split(np.arange(200), pieces):
        hopeful = part[best.hopeful(every.group[part], every.score[part])]
        best.update(every.take(hopeful))
    for group in range(5):
        rows = [
            (-every.score[i], every.row[i], every.pos[i], every.key[i]) for i in np.flatnonzero(every.group == group)
        ]
        expected: list[tuple[float, int, int, int]] = []
        for row in sorted(rows):
            if row[3] not in [other[3] for other in expected]:
                expected.append(row)
        mine = best.kept.take(best.kept.group == group)
        assert [(-s, r, p, k) for s, r, p, k in zip(mine.score, mine.row, mine.pos, mine.key, strict=True)] == expected[
            :4
        ]


def test_the_lottery_is_even_and_depends_on_place_alone() -> None:
    row, pos = np.divmod(np.arange(20_000), 100)
    drawn = lottery(0, row, pos)
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert abs(counts - 1000).max() < 5 * 1000**0.5
    assert np.array_equal(lottery(0, row[5:9], pos[5:9]), drawn[5:9])
    assert not np.array_equal(lottery(1, row, pos), drawn)
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.03


def test_equal_windows_have_equal_keys() -> None:
    keys = window_keys(np.array([[1, 2, 3], [1, 2, 3], [3, 2, 1], [-1, 2, 3]]))
    assert keys[0] == keys[1]
    assert len(set(keys.tolist())) == 3


# Which latents


def test_latents_are_drawn_among_the_live_ones() -> None:
    fired = np.array([0, 3, 10, 12, 11, 50, 9, 10])
    assert choose_latents(fired, "all", min_firings=10, seed=0).tolist() == [2, 3, 4, 5, 7]
    drawn = choose_latents(fired, 3, min_firings=10, seed=0)
    assert len(drawn) == 3
    assert set(drawn.tolist()) < {2, 3, 4, 5, 7}
    assert choose_latents(fired, 3, min_firings=10, seed=0).tolist() == drawn.tolist()
    seen = {tuple(choose_latents(fired, 3, min_firings=10, seed=seed).tolist()) for seed in range(30)}
    assert len(seen) > 5
    assert choose_latents(fired, (6, 0, 6), min_firings=10, seed=0).tolist() == [0, 6]


def test_stand_ins_fire_about_as_often() -> None:
    fired = np.concatenate([[0], np.arange(10, 1010)])
    latents = np.arange(0, 1001, 50)
    found = stand_ins(fired, latents, min_firings=10, seed=0)
    assert found[0] == -1, "a dead latent has none"
    assert (found[1:] != latents[1:]).all()
    assert np.abs(fired[found[1:]] - fired[latents[1:]]).max() <= 16
    some = stand_ins(fired, latents[3:5], min_firings=10, seed=0)
    assert some.tolist() == found[3:5].tolist(), "what else is shown does not matter"
    assert stand_ins(np.array([20, 0]), np.array([0]), min_firings=1, seed=0).tolist() == [-1], "nobody else lives"


# Correlation


def test_correlations_are_numpys(tmp_path: Path) -> None:
    record = planted.text(6, 30)
    x = planted.activations(planted.model(), record, "resid_post.1").flatten(0, 1)
    dictionary = planted.dense_dictionary()
    dense = dictionary.encode(x).dense().double().numpy()
    with Pages(planted.model(), dictionary, record, "resid_post.1", PagesConfig(latents="all", drop_norm=0)) as pages:
        found = Tally(pages.latents, pages.nulls, pages.totals, pages.cfg, d_vocab=259)
        found.read(pages.codes, 50)
        correlations = found.correlations(pages.latents)
        cosines = found.cosines(pages.latents)
        latents = pages.latents
    live = np.flatnonzero(dense.std(0) > 0)
    expected = np.corrcoef(dense.T[live])
    places = np.searchsorted(live, latents)
    assert np.allclose(correlations[:, live], expected[places], atol=1e-5)
    unit = dense / np.maximum(np.linalg.norm(dense, axis=0), 1e-12)
    assert np.allclose(cosines, (unit.T @ unit)[latents], atol=1e-5)


# Codes on disk


def test_codes_come_back_in_blocks_of_any_size(tmp_path: Path) -> None:
    draw = numpy_generator(0, "codes")
    lengths = np.array([4, 1, 7, 3])
    counts = draw.integers(0, 4, 15)
    latents = draw.integers(0, 90, counts.sum())
    values = draw.random(counts.sum()).astype(np.float32)
    ids, kept = draw.integers(0, 50, 15), draw.random(15) < 0.7
    with CodesWriter(tmp_path) as writer:
        writer.append(
            np.array([7, 8, 9]), lengths[:3], ids[:12], kept[:12], counts[:12],
            latents[: counts[:12].sum()], values[: counts[:12].sum()],
        )  # fmt: skip
        rest = counts[:12].sum()
        writer.append(np.array([2]), lengths[3:], ids[12:], kept[12:], counts[12:], latents[rest:], values[rest:])
    codes = writer.codes()
    assert codes.n_tokens == 15
    for size in (1, 5, 100):
        blocks = list(codes.blocks(size))
        assert all(len(block.id) <= max(size, 7) for block in blocks)
        assert np.concatenate([block.rows for block in blocks]).tolist() == [7, 8, 9, 2]
        assert np.concatenate([block.id for block in blocks]).tolist() == ids.tolist()
        assert np.concatenate([block.latent for block in blocks]).tolist() == latents.tolist()
        assert np.concatenate([block.value for block in blocks]).tolist() == values.tolist()
        at = [
            np.searchsorted(np.cumsum(lengths), sum(len(b.id) for b in blocks[:i]), "right") for i in range(len(blocks))
        ]
        for first, block in zip(at, blocks, strict=True):
            assert np.diff(block.starts).tolist() == lengths[first : first + len(block.rows)].tolist()
    third = codes.block(2, 3)
    assert third.pos.tolist() == list(range(7))
    assert third.following.tolist() == [*ids[6:12].tolist(), -1]
    assert third.windows(np.array([0]), 1).tolist() == [[-1, ids[5], ids[6]]]
