"""Linear recurrences decoding from a state: the same sites and values as in a whole forward, whatever was edited."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from interp.core.errors import InterpError
from interp.core.sites import Part, Site
from interp.instrument.capture import capture
from interp.instrument.edits import Edit, edited
from interp.models.probe import probe_tokens
from interp.models.tiny import tiny_model
from tests.models.conformance import check_capture, editable


def test_one_row_of_rwkv_decodes_with_a_cache_as_without() -> None:
    model = tiny_model("rwkv")
    prompt = probe_tokens(model, 1)
    sites = [site for site in model.sites() if site.layer is not None and site.part is not Part.TIME_DECAY]
    with capture(model, sites) as cached:
        tokens = model.generate(prompt, n_new=5)
    with capture(model, sites, stop=False) as whole:
        model(tokens[:, :-1])
    for site in sites:
        assert torch.allclose(cached[site], whole[site], rtol=1e-3, atol=1e-4), site


def test_several_rows_of_rwkv_are_generated_as_each_alone() -> None:
    """transformers' own decoding with a cache gives rows of a batch each other's state: it is not used for them."""
    model = tiny_model("rwkv")
    prompts = probe_tokens(model)
    together = model.generate(prompts, n_new=5)
    alone = torch.cat([model.generate(prompts[i : i + 1], n_new=5) for i in range(len(prompts))])
    assert torch.equal(together, alone)
    own = model.module.generate(  # type: ignore[operator]
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    assert not torch.equal(own, together), "transformers is mended: drop batch_cache of rwkv"


def test_a_step_of_decoding_reads_mamba2s_step_size_per_head() -> None:
    """As many channels in a head as heads: shapes alone do not tell (batch, head, channel) from (batch, pos, head)."""
    model = tiny_model("mamba2", overrides={"num_heads": 8, "head_dim": 8})
    prompt = probe_tokens(model)[:, :8]
    with capture(model, "step_size.0") as cached:
        tokens = model.generate(prompt, n_new=4)
    with capture(model, "step_size.0") as whole:
        model(tokens[:, :-1])
    assert cached["step_size.0"].shape == (2, 11, 8)
    assert torch.allclose(cached["step_size.0"], whole["step_size.0"], atol=1e-5)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "qwen3-next", "recurrent-gemma", "xlstm"])
def test_an_edit_of_any_gate_while_decoding_is_that_of_a_whole_forward(name: str) -> None:
    """Logits of each step, not just the tokens: every site inside a recurrence, moved at every position."""
    model = tiny_model(name, n_layers=2)
    prompt = probe_tokens(model, 1)[:, :5]
    gates = [site for site in editable(model) if site.layer == 0 and str(site.part).endswith(GATES)]
    assert len(gates) >= 4
    for site in gates:
        edit = Edit(site, lambda x, _c: x * 0.9)
        with edited(model, [edit]), capture(model, "logits") as cached:
            tokens = model.generate(prompt, n_new=3)
        with edited(model, [edit]):
            whole = model(tokens[:, :-1])
        steps = cached["logits"]
        assert torch.allclose(steps, whole[:, -steps.shape[1] :], rtol=1e-3, atol=1e-3), site


GATES = ("gate", "gate_pre", "decay", "decay_pre", "step_size", "step_size_pre", "state_in", "state_out")


def test_a_write_gate_at_0_writes_nothing() -> None:
    model = tiny_model("qwen3-next")

    def at_2(value: float) -> Edit:
        return Edit("v.0", lambda x, _c: _set(x, 2, value))

    shut = Edit("write_gate.0", lambda x, _c: _set(x, 2, 0.0))
    outputs: list[Tensor] = []
    for edits in ([at_2(0.0)], [at_2(3.0)], [at_2(0.0), shut], [at_2(3.0), shut]):
        with capture(model, "readout.0") as acts, edited(model, edits):
            model(probe_tokens(model))
        outputs.append(acts["readout.0"])
    assert float((outputs[0] - outputs[1]).abs().max()) > 1e-2
    assert torch.equal(outputs[2], outputs[3])


def _set(x: Tensor, position: int, value: float) -> Tensor:
    new = x.clone()
    new[:, position] = value
    return new


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("mamba", {"use_bias": True, "use_conv_bias": False}),
        ("mamba2", {"n_groups": 1, "use_bias": True, "use_conv_bias": False}),
        ("qwen3-next", {"linear_num_value_heads": 2, "mlp_only_layers": [0, 1, 2]}),
        ("recurrent-gemma", {"block_types": ["recurrent", "recurrent", "attention"]}),
        ("rwkv", {"rescale_every": 0}),
        ("xlstm", {"use_bias": True, "num_heads": 2}),
    ],
)
def test_other_configurations_pass_the_probe(name: str, overrides: dict[str, object]) -> None:
    assert check_capture(tiny_model(name, overrides=overrides)).passed > 40


@pytest.mark.parametrize("name", ["mamba", "mamba2", "recurrent-gemma", "rwkv"])
def test_half_precision_passes_the_probe(name: str) -> None:
    """Mamba's stream stays float32 beside half-precision weights."""
    assert check_capture(tiny_model(name, n_layers=2, dtype=torch.bfloat16)).passed > 20


def test_layers_without_a_part_say_which_have_it() -> None:
    model = tiny_model("qwen3-next")
    with pytest.raises(InterpError, match="attn_gate"):
        model.resolve("attn_gate.0")
    assert [str(site) for site in model.sites("attn_gate.*")] == ["attn_gate.1"]
    assert model.table.axes(Site(Part.Q, 0)) == ("batch", "pos", "key_head", "d_key")
    assert model.table.axes(Site(Part.Q, 1)) == ("batch", "pos", "head", "d_head")
