"""Names, aliases, patterns and weights of the family tables."""

import pytest
import torch
from torch import nn

from interp.core.errors import SiteError
from interp.core.sites import PARTS, Part, Site
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model

FAMILIES = ["llama", "gemma3", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_resolves_from_its_text_and_every_alias(family: str) -> None:
    model = tiny_model(family)
    for site in model.sites():
        assert model.resolve(str(site)) == [site]
        for alias in site.aliases:
            assert model.resolve(alias) == [site]


def test_patterns_ranges_and_braces() -> None:
    model = tiny_model("llama", n_layers=4)
    assert [str(s) for s in model.resolve("neurons.*")] == [f"neurons.{i}" for i in range(4)]
    assert [str(s) for s in model.resolve("z.{1,3}")] == ["z.1", "z.3"]
    assert [str(s) for s in model.resolve("resid_post.1-2")] == ["resid_post.1", "resid_post.2"]
    assert model.resolve(["z.1", "z.*"])[0] == Site(Part.Z, 1)
    assert len(model.resolve(["z.1", "z.*"])) == 4


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("resid_pots.1", "resid_post.1"),
        ("neurons.9", "layers with neurons: 0-3"),
        ("blocks.1.hook_resid_pots", "resid_post"),
    ],
)
def test_unknown_names_say_the_nearest(name: str, hint: str) -> None:
    with pytest.raises(SiteError, match=hint):
        tiny_model("llama", n_layers=4).resolve(name)


def test_ungated_alias_means_the_only_pre_activation() -> None:
    assert tiny_model("gpt2").resolve("mlp_pre.0") == [Site(Part.NEURONS_PRE, 0)]
    assert tiny_model("llama").resolve("mlp_pre.0") == [Site(Part.GATE_PRE, 0)]


def test_module_paths_work_beside_the_vocabulary() -> None:
    model = tiny_model("llama")
    assert model.resolve("model.layers.1.mlp") == [Site(Part.MODULE, path="model.layers.1.mlp")]


def test_weights_are_views_in_x_at_w_orientation() -> None:
    model = tiny_model("llama", n_heads=4, n_kv_heads=2)
    d = model.dims
    assert d.d_model is not None and d.d_head is not None and d.d_mlp is not None
    assert model.weight("W_gate", 0).shape == (d.d_model, d.d_mlp)
    assert model.weight("W_down", 0).shape == (d.d_mlp, d.d_model)
    assert model.weight("W_O", 0).shape == (d.n_heads, d.d_head, d.d_model)
    assert model.weight("W_U").shape == (d.d_model, d.d_vocab)
    with pytest.raises(SiteError, match="layer"):
        model.weight("W_gate", 99)
    with pytest.raises(ValueError, match="W_gate"):
        model.weight("W_gat", 0)


def test_unknown_networks_have_their_modules_as_sites() -> None:
    model = LoadedModel(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)))
    assert [str(s) for s in model.sites()] == ["0", "1", "2"]
    assert model.table.name == "generic"
    with pytest.raises(SiteError, match="nearest"):
        model.resolve("resid_post.0")


def test_every_part_is_documented() -> None:
    for part, info in PARTS.items():
        assert part in Part and info.meaning and info.axes and info.side in ("pre", "post", "linear")


def test_dims_come_from_the_weights() -> None:
    model = tiny_model("gemma3")
    assert model.dims.d_head == model.weight("W_O", 0).shape[1]
    assert model.dims.d_mlp == model.weight("W_down", 0).shape[0]
    assert isinstance(model.weight("W_E"), torch.Tensor)
