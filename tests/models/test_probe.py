"""The probe passes on every family and head layout, and a wrong table fails it at the right site."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from interp.core.errors import InterpError
from interp.core.sites import Part
from interp.models.family import Family, Reach, Weight
from interp.models.load import load
from interp.models.model import LoadedModel
from interp.models.probe import quick_check, verify
from interp.models.table import FamilyTable
from interp.models.tiny import tiny_model

LAYOUTS = [
    ("llama", {"n_heads": 4, "n_kv_heads": 4}),
    ("llama", {"n_heads": 4, "n_kv_heads": 2}),
    ("llama", {"n_heads": 4, "n_kv_heads": 1}),
    ("gemma3", {"n_heads": 4, "n_kv_heads": 1}),
    ("gemma3", {"n_heads": 4, "n_kv_heads": 2}),
    ("gpt2", {}),
]


@pytest.mark.parametrize(("family", "heads"), LAYOUTS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_site_means_what_its_name_says(family: str, heads: dict[str, int], attention: str) -> None:
    model = tiny_model(family, **heads)
    model.module.set_attn_implementation(attention)  # pyright: ignore
    report = verify(model)
    assert report.max_abs_diff == 0.0
    assert report.first_failure is None
    names = {check.name for check in report.checks}
    assert {"pattern @ v == z", "neurons @ W_down == mlp_out", "z @ W_O == attn_out"} <= names
    moved = [c for c in report.checks if c.name == "editing the site moves the logits"]
    assert len(moved) == len(model.sites())


def _with(model: LoadedModel, **changes: object) -> LoadedModel:
    family = model.table.family
    assert isinstance(family, Family)
    wrong = replace(family, **changes)  # pyright: ignore
    return LoadedModel(model.module, table=FamilyTable(model.module, wrong, model.dims))


def _parts(model: LoadedModel, **new: Reach) -> dict[Part, Reach]:
    assert model.table.family is not None
    return {**model.table.family.parts, **{Part(name): reach for name, reach in new.items()}}


WRONG = {
    "gate and up swapped": (
        dict(
            gate_pre=Reach(path="model.layers.{layer}.mlp.up_proj"), up=Reach(path="model.layers.{layer}.mlp.gate_proj")
        ),
        "gate_pre.0",
    ),
    "neurons read from the gate alone": (dict(neurons=Reach(path="model.layers.{layer}.mlp.act_fn")), "mlp_out.0"),
    "attention output is the next norm's": (
        dict(attn_out=Reach(path="model.layers.{layer}.post_attention_layernorm")),
        "attn_out.0",
    ),
    "keys where values should be": (
        dict(v=Reach(path="model.layers.{layer}.self_attn.k_proj", heads="n_kv_heads")),
        "v.0",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_table_is_refused_at_the_right_site(case: str) -> None:
    model = tiny_model("llama")
    parts, site = WRONG[case]
    wrong = _with(model, parts=_parts(model, **parts))
    failed = verify(wrong).first_failure
    assert failed is not None and failed.site == site
    with pytest.raises(InterpError, match=site):
        quick_check(wrong)


def test_a_transposed_weight_is_refused() -> None:
    model = tiny_model("llama", d_mlp=32, d_model=32)
    assert model.table.family is not None
    path = "model.layers.{layer}.mlp.down_proj.weight"
    weights = {**model.table.family.weights, "W_down": Weight(path=path, transpose=False)}
    failed = verify(_with(model, weights=weights)).first_failure
    assert failed is not None and failed.site == "mlp_out.0"


def test_a_module_that_never_runs_is_named() -> None:
    model = tiny_model("llama")
    model.module.spare = nn.Linear(2, 2)
    wrong = _with(model, parts=_parts(model, mlp_in=Reach(path="spare")))
    report = verify(wrong)
    assert not report.passed and "mlp_in.0" in report.unfired


def test_generic_networks_are_verified_with_an_input_of_their_own() -> None:
    model = LoadedModel(nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)))
    report = verify(model, torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    assert report.passed and report.max_abs_diff == 0.0
    with pytest.raises(InterpError, match="input of your own"):
        verify(model)


def test_a_broken_model_does_not_pass() -> None:
    """A module that behaves differently when hooked: bit-equality must notice."""

    class Moody(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(2, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + len(self.inner._forward_hooks)

    report = verify(LoadedModel(Moody()), torch.ones(1, 2))
    assert report.max_abs_diff > 0 and not report.passed


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2"])
def test_other_models_with_the_llama_layout(kind: str) -> None:
    import transformers

    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.3}
    config = getattr(transformers, f"{kind}Config")(**sizes, **heads, sliding_window=4, pad_token_id=0)
    with torch.random.fork_rng():
        module = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model = LoadedModel(module)
    report = verify(model)
    assert model.table.name == "llama"
    assert report.first_failure is None
    assert report.max_abs_diff == 0.0


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("smollm2-135m", marks=pytest.mark.needs_model("smollm2-135m")),
        pytest.param("gemma3-270m", marks=pytest.mark.needs_model("gemma3-270m")),
    ],
)
def test_bundled_models(name: str) -> None:
    model = load(name, check=False)
    report = verify(model)
    assert report.max_abs_diff == 0.0
    assert report.first_failure is None
    assert report.n_sites == len(model.sites())
