"""Lens, neighbours, ablation and examples, each against plain torch."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError

from interp.core.errors import InterpError
from interp.core.seed import torch_generator
from interp.core.sites import Site
from interp.dictionaries.baselines import fit_pca
from interp.dictionaries.pages import Pages, PagesConfig
from interp.dictionaries.pages.ablation import Ablation, Job
from interp.dictionaries.pages.lens import Lens, far_from_the_end, norm_weight
from interp.dictionaries.pages.neighbours import aligned_neurons, chance, n_neurons, nearest
from interp.dictionaries.pages.record import firings
from interp.dictionaries.pages.values import FeaturePage
from interp.instrument.tokens import TokenRecord
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model
from tests.dictionaries.pages import planted

# The final norm


@pytest.mark.parametrize(
    ("family", "centres", "shift"),
    [("llama", False, 0.0), ("gemma", False, 1.0), ("gemma3", False, 1.0), ("gpt2", True, 0.0)],
)
def test_the_norms_weight_is_measured(family: str, centres: bool, shift: float) -> None:
    model = tiny_model(family, n_kv_heads=None if family == "gpt2" else 2)
    path = {"gpt2": "transformer.ln_f.weight"}.get(family, "model.norm.weight")
    gamma, found = norm_weight(model)
    assert found is centres
    assert torch.allclose(gamma, model.module.get_parameter(path).detach() + shift, atol=1e-4)


def test_the_norms_weight_at_an_odd_width() -> None:
    model = tiny_model("gpt2", n_kv_heads=None, d_model=33, n_heads=3)
    gamma, centres = norm_weight(model)
    assert centres
    assert torch.allclose(gamma, model.module.get_parameter("transformer.ln_f.weight").detach(), atol=1e-4)


def test_the_lens_is_the_change_of_the_logits_at_the_end() -> None:
    """A small step along a row, just before a LayerNorm, moves the logits by the lens, up to scale and mean."""
    model = tiny_model("gpt2", n_kv_heads=None)
    lens, warning = Lens.of(model, model.table.one("resid_post.2"), 32)
    assert lens is not None
    assert warning is None, "the last blocks of a small model are near the end"
    norm, unembed = model.module.get_submodule("transformer.ln_f"), model.weight("W_U")
    generator = torch_generator(0, "step")
    x, row = torch.randn(2, 32, generator=generator, dtype=torch.float64)
    x -= x.mean()
    row -= (row @ x) / (x @ x) * x  # along x a norm does not move
    norm.double()
    with torch.no_grad():
        moved = (norm(x + 1e-6 * row) - norm(x)) @ unembed.double() / 1e-6 * x.square().mean().sqrt()
    norm.float()
    moved -= moved.mean()
    assert torch.allclose(lens.logits(row.float()[None]).values[0].double(), moved, atol=1e-3)


@pytest.mark.parametrize(("site", "width"), [("neurons.1", 48), ("z.1", 32)])
def test_the_lens_goes_through_what_writes(site: str, width: int) -> None:
    model = planted.model()
    lens, _ = Lens.of(model, model.table.one(site), width)
    assert lens is not None
    rows = torch.randn(3, width, generator=torch_generator(0, "rows"))
    out = {"neurons.1": "mlp.down_proj", "z.1": "self_attn.o_proj"}[site]
    stream = rows @ model.module.get_parameter(f"model.layers.1.{out}.weight").detach().T
    expected = (stream * model.module.get_parameter("model.norm.weight").detach()) @ model.weight("W_U").detach()
    assert torch.allclose(lens.logits(rows).values, expected - expected.mean(1, keepdim=True), atol=1e-4)


def test_no_lens_where_nothing_is_written() -> None:
    lens, why = Lens.of(planted.model(), planted.model().table.one("mlp_in.1"), 32)
    assert lens is None
    assert why is not None
    assert "does not write to the residual stream" in why
    lens, why = Lens.of(planted.model(), planted.model().table.one("resid_post.1"), 31)
    assert (lens, "width 31" in str(why)) == (None, True)


def test_the_lens_warns_far_from_the_end() -> None:
    model = tiny_model("llama", n_layers=8)
    warned = [layer for layer in range(8) if far_from_the_end(model, model.table.one(f"resid_post.{layer}"))]
    assert warned == [0, 1, 2]
    assert "5 more blocks" in str(far_from_the_end(model, model.table.one("resid_post.2")))


# Neighbours


@pytest.mark.parametrize("block", [3, 8192])
def test_nearest_rows(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("interp.dictionaries.pages.neighbours.ROWS", block)
    rows = torch.randn(10, 6, generator=torch_generator(0, "rows"))
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    cosines = unit @ unit.T - 3 * torch.eye(10)
    own = torch.tensor([4, 0])
    found = nearest(rows[own], rows, 4, leave_out=own)
    assert found.indices.tolist() == cosines[own].topk(4).indices.tolist()
    assert torch.allclose(found.values.double(), cosines[own].topk(4).values, atol=1e-6)


def test_neurons_that_write_the_row_are_found() -> None:
    model = planted.model()
    rows = torch.stack([model.weight("W_down", 1)[7], -2 * model.weight("W_down", 0)[3]]).detach()
    found = aligned_neurons(model, model.table.one("resid_post.1"), rows, rows.flip(0), 2)
    assert [near[0].name for near in found] == ["L1 N7", "L0 N3"]
    assert [near[0].value for near in found] == pytest.approx([1.0, -1.0], abs=1e-5)
    assert found[0][0].null == pytest.approx(-float(torch.cosine_similarity(rows[0], -rows[1], dim=0)), abs=1e-5)
    counts = {
        site: n_neurons(model, model.table.one(site), 32) for site in ("resid_pre.1", "resid_post.1", "mlp_out.1")
    }
    assert counts == {"resid_pre.1": 48, "resid_post.1": 96, "mlp_out.1": 48}
    basis = aligned_neurons(model, model.table.one("neurons.1"), torch.eye(48)[[5]], torch.eye(48)[[6]], 1)
    assert basis[0][0].name == "L1 N5"


def test_chance_of_the_largest_cosine() -> None:
    generator = torch_generator(0, "chance")
    for n, d in ((1, 8), (50, 8), (256, 64)):
        others = torch.nn.functional.normalize(torch.randn(1500, n, d, generator=generator), dim=-1)[..., 0]
        assert chance(n, d, signed=True) == pytest.approx(float(others.amax(1).median()), abs=0.02)
        assert chance(n, d, signed=False) == pytest.approx(float(others.abs().amax(1).median()), abs=0.02)


# Ablation


def plain_losses(model: LoadedModel, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        log_p = model.module(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    return -log_p[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]


@pytest.mark.parametrize("cached", [True, False])
def test_ablation_of_a_transcoder(cached: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read before the MLP, write after it; by hooks of torch, on the whole row."""
    if not cached:
        monkeypatch.setattr("interp.dictionaries.pages.ablation.keeps_all", lambda cache: False)
    model, dictionary, record = planted.model(), planted.dense_dictionary(d_out=32), planted.text(1, 24)
    read, write = (model.table.one(site) for site in ("mlp_in.1", "mlp_out.1"))
    counted = torch.arange(24) >= 5
    codes = dictionary.encode(planted.activations(model, record, "mlp_in.1")[0]).dense()
    latent = int((codes[5:] > 0).sum(0).argmax())
    removed = torch.where(counted[:, None], codes[:, latent, None] * dictionary.W_dec[latent], 0.0)
    module = model.module.get_submodule("model.layers.1.mlp")
    with_hook = []
    for change in (removed, removed.norm(dim=1, keepdim=True) * dictionary.W_dec[2] / dictionary.W_dec[2].norm()):
        hook = module.register_forward_hook(lambda _m, _i, out, change=change: out - change)
        with_hook.append(plain_losses(model, record.ids))
        hook.remove()
    base = plain_losses(model, record.ids)
    job = Job(latent=latent, null=2, row=0, windows=((12, 8, 16), (23, 20, 24)))
    found = Ablation(model, dictionary, read, write).run([job], {0: record.ids[0]}, {0: counted})
    first, last = found[latent, 0, 12], found[latent, 0, 23]
    assert first.loss == pytest.approx((with_hook[0] - base)[8:16].tolist(), abs=1e-4)
    assert first.loss_null == pytest.approx(float((with_hook[1] - base)[12]), abs=1e-4)
    assert last.loss[-1] is last.loss_null is None
    assert last.loss[:-1] == pytest.approx((with_hook[0] - base)[20:23].tolist(), abs=1e-4)
    assert max(map(abs, first.loss)) > 0.01


def test_a_latent_that_does_not_fire_costs_nothing() -> None:
    model, record = planted.model(), planted.text(1, 20, alphabet=3)
    site = model.table.one(planted.SITE)
    job = Job(latent=4, null=0, row=0, windows=((3, 0, 6),))
    found = Ablation(model, planted.dictionary(), site, site).run([job], {0: record.ids[0]}, {0: torch.ones(20) > 0})
    assert found[4, 0, 3].loss == (0.0,) * 6


# A dictionary with values of all sizes


@pytest.fixture(scope="module")
def dense_pages() -> tuple[dict[int, FeaturePage], torch.Tensor, TokenRecord]:
    record = planted.text(8, 30, seed=5, alphabet=26)
    cfg = PagesConfig(
        latents="all", min_firings=3, n_top=5, n_intervals=4, n_per_interval=3, n_bins=8, n_ablated=1, drop_norm=0,
        same_window=0, chunk=7,
    )  # fmt: skip
    with Pages(planted.model(), planted.dense_dictionary(), record, "resid_post.1", cfg) as pages:
        found = {page.latent: page for page in pages}
    codes = planted.dense_dictionary().encode(planted.activations(planted.model(), record, "resid_post.1")).dense()
    return found, codes, record


def test_top_examples_are_the_largest_of_distinct_tokens(
    dense_pages: tuple[dict[int, FeaturePage], torch.Tensor, TokenRecord],
) -> None:
    found, codes, record = dense_pages
    for latent, page in found.items():
        best: dict[int, float] = {}
        for value, token in zip(codes[..., latent].flatten().tolist(), record.ids.flatten().tolist(), strict=True):
            best[token] = max(best.get(token, 0.0), value)
        expected = sorted((value for value in best.values() if value > 0), reverse=True)[:5]
        top = [example for example in page.examples if example.group == -1]
        assert [example.activation for example in top] == pytest.approx(expected, rel=1e-4)
        assert len({example.ids[example.at] for example in top}) == len(top)


def test_histograms_and_intervals_hold_what_they_say(
    dense_pages: tuple[dict[int, FeaturePage], torch.Tensor, TokenRecord],
) -> None:
    found, codes, _ = dense_pages
    for latent, page in found.items():
        fired = codes[..., latent][codes[..., latent] > 0].double().numpy()
        assert page.header.n_firings == len(fired)
        assert page.header.max_activation == pytest.approx(fired.max(), rel=1e-4)
        expected, _ = np.histogram(fired, bins=8, range=(0, fired.max() * (1 + 1e-9)))
        assert np.abs(np.cumsum(page.histogram.counts) - np.cumsum(expected)).max() <= 1, "an edge may round"
        assert sum(page.histogram.counts) == len(fired)
        for example in page.examples:
            if example.group >= 0:
                low, high = (page.header.max_activation * i / 4 for i in (example.group, example.group + 1))
                assert low - 1e-5 <= example.activation <= high + 1e-5
        sizes = [sum(page.histogram.counts[2 * i : 2 * i + 2]) for i in range(4)]
        shown = [sum(example.group == i for example in page.examples) for i in range(4)]
        assert all((n > 0) == (size > 0) and n <= 3 for n, size in zip(shown, sizes, strict=True))


def test_headers_of_a_linear_encoder(dense_pages: tuple[dict[int, FeaturePage], torch.Tensor, TokenRecord]) -> None:
    made = planted.dense_dictionary()
    scaled = dataclasses.asdict(dense_pages[0][min(dense_pages[0])].header)
    latent = min(dense_pages[0])
    e, d = made.W_enc[:, latent].double(), made.W_dec[latent].double()
    assert scaled["encoder_norm"] == pytest.approx(float(e.norm()))
    assert scaled["decoder_norm"] == pytest.approx(float(d.norm()))
    assert scaled["cosine"] == pytest.approx(float(e @ d / e.norm() / d.norm()))
    assert scaled["bias"] == pytest.approx(float(made.b_enc[latent]))


def test_signed_codes_are_refused() -> None:
    x = torch.randn(50, 8, generator=torch_generator(0, "x"))
    with pytest.raises(InterpError, match="a latent is negative"):
        firings(fit_pca(x, 3), x)


@pytest.mark.parametrize(
    "wrong", [{"latents": 0}, {"latents": ()}, {"n_bins": 7}, {"n_top": 0}, {"before": -1}, {"chunk": 0}]
)
def test_wrong_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises((InterpError, TypeCheckError)):
        PagesConfig(**wrong)


def test_a_site_of_another_width_is_refused() -> None:
    with pytest.raises(InterpError, match="do not fit a dictionary"):
        Pages(
            planted.model(),
            planted.dense_dictionary(d=31),
            planted.text(),
            Site(planted.model().table.one("resid_post.1").part, 1),
        ).__enter__()
