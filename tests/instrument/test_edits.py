"""Edits: closed forms, purity, order, positions, receipts, generation, and what is refused."""

from types import SimpleNamespace

import pytest
import torch

from interp.core.errors import InterpError, NeverFiredError
from interp.instrument.capture import capture
from interp.instrument.edits import (
    Edit,
    add,
    clamp_feature,
    edited,
    last,
    mean,
    patch_from,
    project_out,
    resample,
    rotate,
    scale,
    set_to,
    zero,
)
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model

FAMILIES = ["llama", "gemma3", "gpt2"]


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return tiny_model("llama")


def tokens(model: LoadedModel, shape: tuple[int, int] = (2, 7), seed: int = 0) -> torch.Tensor:
    assert model.dims.d_vocab is not None
    return torch.randint(model.dims.d_vocab, shape, generator=torch.Generator().manual_seed(seed))


def run(model: LoadedModel, edits: list[Edit], site: str, ids: torch.Tensor | None = None) -> torch.Tensor:
    with edited(model, edits), capture(model, site) as acts:
        model(tokens(model) if ids is None else ids)
    return acts[site]


def plain(model: LoadedModel, site: str) -> torch.Tensor:
    with capture(model, site) as acts:
        model(tokens(model))
    return acts[site]


@pytest.mark.parametrize("family", FAMILIES)
def test_zero_edits_are_bitwise_no_ops_at_every_site(family: str) -> None:
    model = tiny_model(family)
    ids = tokens(model)
    base = model(ids)
    with edited(model, [add("*", 0.0)]) as receipts:
        assert torch.equal(model(ids), base)
    assert len(receipts) == len(model.sites()) and all(r.fired and r.moved == 0 for r in receipts)


def test_values_of_each_edit(model: LoadedModel) -> None:
    x = plain(model, "resid_post.1")
    d = x.shape[-1]
    v = torch.randn(d, generator=torch.Generator().manual_seed(1))
    u = v / v.norm()
    rotation = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(2)))[0]
    cases = [
        (add("resid_post.1", v), x + v),
        (scale("resid_post.1", 3.0), x * 3),
        (zero("resid_post.1"), torch.zeros_like(x)),
        (set_to("resid_post.1", v), v.expand_as(x)),
        (mean("resid_post.1", x), x.mean((0, 1)).expand_as(x)),
        (project_out("resid_post.1", v), x - (x @ u)[..., None] * u),
        (rotate("resid_post.1", rotation), x @ rotation),
        (patch_from("resid_post.1", x.flip(0)), x.flip(0)),
    ]
    for edit, expected in cases:
        torch.testing.assert_close(run(model, [edit], "resid_post.1"), expected)
    assert float((run(model, [project_out("resid_post.1", v)], "resid_post.1") @ u).abs().max()) < 1e-5


def test_only_the_chosen_tokens_heads_and_dims_change(model: LoadedModel) -> None:
    z = plain(model, "z.1")
    out = run(model, [zero("z.1", at=[2, -1], head=[0, 3], dims=[1, 5])], "z.1")
    expected = z.clone()
    for pos in (2, 6):
        for head in (0, 3):
            expected[:, pos, head, [1, 5]] = 0
    assert torch.equal(out, expected)


def test_one_position_per_row_and_a_mask(model: LoadedModel) -> None:
    x = plain(model, "resid_post.0")
    rows = run(model, [zero("resid_post.0", at=torch.tensor([1, 4]))], "resid_post.0")
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 1] = mask[1, 4] = True
    assert torch.equal(rows, run(model, [zero("resid_post.0", at=mask)], "resid_post.0"))
    assert torch.equal(rows, x.masked_fill(mask[..., None], 0))


def test_per_row_vectors(model: LoadedModel) -> None:
    x = plain(model, "resid_post.0")
    steps = torch.tensor([1.0, -2.0])[:, None, None]
    torch.testing.assert_close(
        run(model, [add("resid_post.0", steps.expand(2, 1, x.shape[-1]))], "resid_post.0"), x + steps
    )


def test_the_order_of_the_list_is_the_order_of_the_edits(model: LoadedModel) -> None:
    x = plain(model, "resid_post.1")
    add_first = run(model, [add("resid_post.1", 1.0), scale("resid_post.1", 2.0)], "resid_post.1")
    scale_first = run(model, [scale("resid_post.1", 2.0), add("resid_post.1", 1.0)], "resid_post.1")
    torch.testing.assert_close(add_first, (x + 1) * 2)
    torch.testing.assert_close(scale_first, x * 2 + 1)


def test_nested_edits_run_outside_in(model: LoadedModel) -> None:
    x = plain(model, "resid_post.1")
    with edited(model, add("resid_post.1", 1.0)), edited(model, scale("resid_post.1", 2.0)):
        with capture(model, "resid_post.1") as acts:
            model(tokens(model))
    torch.testing.assert_close(acts["resid_post.1"], (x + 1) * 2)


def test_edits_are_not_in_place(model: LoadedModel) -> None:
    kept: list[torch.Tensor] = []
    handle = model.layers[0].register_forward_hook(lambda _m, _a, out: kept.append(out))
    before = plain(model, "resid_post.0").clone()
    kept.clear()
    with edited(model, zero("resid_post.0")):
        model(tokens(model))
    handle.remove()
    assert torch.equal(kept[0], before)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_a_whole_layer_makes_the_other_run(family: str) -> None:
    """Causal oracle: with every position of one residual layer patched, the output is the donor's."""
    model = tiny_model(family)
    clean, corrupt = tokens(model, seed=0), tokens(model, seed=1)
    with capture(model, ["resid_post.1", "resid_mid.1"], stop=False) as donor:
        expected = model(clean)
    with edited(model, patch_from("resid_post.1", donor["resid_post.1"])):
        torch.testing.assert_close(model(corrupt), expected)
    with edited(model, patch_from("resid_mid.1", donor["resid_mid.1"])), capture(model, "resid_mid.1") as acts:
        model(corrupt)
    torch.testing.assert_close(acts["resid_mid.1"], donor["resid_mid.1"])


@pytest.mark.parametrize("family", FAMILIES)
def test_resid_mid_edits_reach_both_the_mlp_and_the_skip(family: str) -> None:
    model = tiny_model(family)
    clean, corrupt = tokens(model, seed=0), tokens(model, seed=1)
    with capture(model, "resid_mid.2", stop=False) as donor:
        expected = model(clean)
    with edited(model, patch_from("resid_mid.2", donor["resid_mid.2"])):
        torch.testing.assert_close(model(corrupt), expected, atol=1e-4, rtol=1e-4)


def test_editing_the_pattern_by_hand(model: LoadedModel) -> None:
    """Attending uniformly to position 0 makes z the value of position 0."""
    first = torch.zeros(7, 7)
    first[:, 0] = 1
    with capture(model, "v.1") as acts:
        model(tokens(model))
    z = run(model, [set_to("pattern.1", first, head=2)], "z.1")
    group = 2 // (model.dims.n_heads // model.dims.n_kv_heads)  # pyright: ignore
    torch.testing.assert_close(z[:, :, 2], acts["v.1"][:, :1, group].expand_as(z[:, :, 2]))
    assert torch.equal(z[:, :, [0, 1, 3]], plain(model, "z.1")[:, :, [0, 1, 3]])


def test_editing_scores_goes_through_the_softmax(model: LoadedModel) -> None:
    lowest = torch.finfo(torch.float32).min
    scores = torch.full((7, 7), lowest)
    scores[:, 0] = 0.0
    with (
        edited(model, [set_to("attn_scores.1", scores, head=2)]),
        capture(model, ["pattern.1", "attn_scores.1"]) as acts,
    ):
        model(tokens(model))
    assert torch.equal(acts["pattern.1"][:, 2, :, 0], torch.ones(2, 7))


def test_receipts_say_what_was_touched_and_how_far(model: LoadedModel) -> None:
    x = plain(model, "resid_post.1")
    with edited(model, [scale("resid_post.1", 1.5, at=last), zero("z.0", head=1)]) as receipts:
        model(tokens(model))
    assert receipts[0].n_tokens == 2 and receipts[0].n_calls == 1
    assert receipts[0].moved == pytest.approx(0.5, rel=1e-5)
    assert receipts[1].moved == pytest.approx(1.0) and receipts[1].n_tokens == 14
    with edited(model, [add("resid_post.1", 1.0)]) as receipts:
        model(tokens(model))
    assert receipts[0].moved == pytest.approx(x.numel() ** 0.5 / float(x.norm()), rel=1e-4)


def test_resample_takes_rows_of_the_pool_and_is_seeded(model: LoadedModel) -> None:
    pool = torch.arange(5.0)[:, None, None].expand(5, 7, model.dims.d_model or 0)
    one = run(model, [resample("resid_post.0", pool, seed=3)], "resid_post.0")
    again = run(model, [resample("resid_post.0", pool, seed=3)], "resid_post.0")
    assert torch.equal(one, again)
    assert all(len(one[b].unique()) == 1 and float(one[b, 0, 0]) in range(5) for b in range(2))


def test_clamp_feature_moves_one_latent_and_keeps_the_error(model: LoadedModel) -> None:
    d = model.dims.d_model or 0
    basis = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(5)))[0]
    dictionary = SimpleNamespace(features=basis, encode=lambda x: SimpleNamespace(dense=lambda: x @ basis.T))
    x = plain(model, "resid_post.1")
    out = run(model, [clamp_feature("resid_post.1", dictionary, 3, 7.0)], "resid_post.1")
    codes, before = out @ basis.T, x @ basis.T
    torch.testing.assert_close(codes[..., 3], torch.full_like(codes[..., 3], 7.0), atol=1e-4, rtol=1e-4)
    others = [i for i in range(d) if i != 3]
    torch.testing.assert_close(codes[..., others], before[..., others], atol=1e-4, rtol=1e-4)
    with pytest.raises(InterpError, match="features 0 to"):
        clamp_feature("resid_post.1", dictionary, d, 1.0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["prompt", "new", "all"])
def test_generation_is_edited_alike_with_and_without_the_cache(family: str, scope: str) -> None:
    model = tiny_model(family)
    ids = tokens(model)
    v = 2 * torch.randn(model.dims.d_model or 0, generator=torch.Generator().manual_seed(4))
    outs, values = [], []
    for use_cache in (True, False):
        with edited(model, add("resid_post.1", v), scope=scope), capture(model, "resid_post.2") as acts:  # pyright: ignore
            outs.append(model.generate(ids, n_new=6, use_cache=use_cache))
        values.append(acts["resid_post.2"])
    assert torch.equal(outs[0], outs[1])
    torch.testing.assert_close(values[0], values[1], atol=1e-4, rtol=1e-4)
    assert not torch.equal(outs[0], model.generate(ids, n_new=6))


def test_scopes_touch_what_they_say(model: LoadedModel) -> None:
    counts = {}
    for scope in ("prompt", "new", "all"):
        with edited(model, add("resid_post.1", 1.0), scope=scope) as receipts:
            model.generate(tokens(model), n_new=5)
        counts[scope] = receipts[0].n_tokens
    assert counts == {"prompt": 14, "new": 8, "all": 22}
    with edited(model, add("resid_post.1", 1.0, at=last)) as receipts:
        model.generate(tokens(model), n_new=5)
    assert receipts[0].n_tokens == 2


def test_left_padded_generation_does_not_depend_on_the_padding(model: LoadedModel) -> None:
    ids = tokens(model, (1, 5))
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    record = SimpleNamespace(ids=padded, mask=torch.arange(8)[None] >= 3)
    v = torch.randn(model.dims.d_model or 0, generator=torch.Generator().manual_seed(4))
    with edited(model, add("resid_post.1", v)):
        alone = model.generate(ids, n_new=5)
        together = model.generate(record, n_new=5)
    assert torch.equal(alone[:, 5:], together[:, 8:])


REFUSED = [
    (lambda m: add("resid_post.0", torch.ones(3)), "does not fit resid_post.0"),
    (lambda m: add("resid_post.0", 1.0, head=0), "no head axis"),
    (lambda m: zero("z.0", head=99), "head 0 to"),
    (lambda m: zero("resid_post.0", dims=9999), "dims 0 to"),
    (lambda m: zero("resid_post.0", at=99), "outside the input"),
    (lambda m: zero("resid_post.99"), "layers with resid_post: 0-"),
    (lambda m: project_out("resid_post.0", torch.ones(2, 2)), "does not fit"),
    (lambda m: rotate("resid_post.0", torch.ones(2, 2)), "does not fit"),
    (lambda m: Edit("resid_post.0", lambda x, c: x[:1]), "keep shape"),
    (lambda m: Edit("resid_post.0", lambda x, c: x.double()), "keep shape"),
    (lambda m: zero("resid_post.0", at=torch.zeros(2, 7, dtype=torch.bool)), "touched no token"),
    (lambda m: zero("resid_post.0", at=torch.tensor([1, 2, 3])), "3 positions"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_bad_edits_are_refused_with_the_reason(model: LoadedModel, case: int) -> None:
    make, message = REFUSED[case]
    with pytest.raises(InterpError, match=message), edited(model, [make(model)]):
        model(tokens(model))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.module.modules()) == 0


def test_an_edit_that_never_fires_is_an_error(model: LoadedModel) -> None:
    with pytest.raises(NeverFiredError, match="never fired"), edited(model, zero("z.0")):
        pass
    with pytest.raises(NeverFiredError, match="touched no token"), edited(model, zero("z.0"), scope="new"):
        model(tokens(model))


def test_a_donor_of_one_position_is_used_and_a_short_one_is_refused(model: LoadedModel) -> None:
    x = plain(model, "resid_post.1")
    out = run(model, [patch_from("resid_post.1", x[:, :1], at=3)], "resid_post.1")
    assert torch.equal(out[:, 3], x[:, 0])
    with pytest.raises(InterpError, match="positions 0 to 3"):
        run(model, [patch_from("resid_post.1", x[:, :4], at=5)], "resid_post.1")


def test_edited_scores_keep_the_mask(model: LoadedModel) -> None:
    with edited(model, zero("attn_scores.0")) as receipts, capture(model, "pattern.0") as acts:
        model(tokens(model))
    assert not acts["pattern.0"].triu(1).any()
    torch.testing.assert_close(acts["pattern.0"][0, 0, 3, :4], torch.full((4,), 0.25))
    assert receipts[0].moved == pytest.approx(1.0)


def test_mean_ablation_is_per_head_and_in_place_edits_are_refused(model: LoadedModel) -> None:
    z = plain(model, "z.1")
    torch.testing.assert_close(run(model, [mean("z.1", z)], "z.1"), z.mean((0, 1)).expand_as(z))
    with pytest.raises(InterpError, match="in place"):
        run(model, [Edit("mlp_out.1", lambda x, c: x.mul_(0), at=3)], "mlp_out.1")


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_an_edited_stream_is_not_rounded_by_a_huge_one(family: str) -> None:
    """The block's output is the edited stream plus what the MLP added, bit for bit, as the block itself adds them."""
    model = tiny_model(family)
    ids = tokens(model)
    value = torch.randn(ids.shape[0], ids.shape[1], 32, generator=torch.Generator().manual_seed(0))
    with edited(model, [add("resid_pre.1", 2e4)]):
        with edited(model, [set_to("resid_mid.1", value)]), capture(model, ["mlp_out.1", "resid_post.1"]) as acts:
            model(ids)
    assert torch.equal(acts["resid_post.1"], value + acts["mlp_out.1"])


def test_two_edits_of_one_stream_end_in_any_order() -> None:
    model = tiny_model("llama")
    ids = tokens(model)
    plain = model(ids)
    first, second = edited(model, [add("resid_mid.1", 1.0)]), edited(model, [add("resid_mid.1", 2.0)])
    first.__enter__()
    second.__enter__()
    both = model(ids)
    first.__exit__(None, None, None)
    one = model(ids)
    second.__exit__(None, None, None)
    with edited(model, [add("resid_mid.1", 2.0)]):
        assert torch.equal(model(ids), one)
    with edited(model, [add("resid_mid.1", 1.0), add("resid_mid.1", 2.0)]):
        assert torch.equal(model(ids), both)
    assert torch.equal(model(ids), plain)
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.module.modules())
