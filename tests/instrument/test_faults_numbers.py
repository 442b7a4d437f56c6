"""Where NaN and infinity begin, sites of compiled blocks, and models spread over devices: beside test_faults_edges."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from interp.core.errors import InterpError
from interp.instrument.capture import NonFiniteWarning, capture
from interp.instrument.edits import Edit, add, edited, set_to
from interp.models.load import load
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model


def tokens(model: LoadedModel, shape: tuple[int, int] = (2, 7), seed: int = 0) -> Tensor:
    assert model.dims.d_vocab is not None
    return torch.randint(model.dims.d_vocab, shape, generator=torch.Generator().manual_seed(seed))


def huge(model: LoadedModel, name: str, factor: float) -> None:
    with torch.no_grad():
        model.module.get_submodule(name).weight.mul_(factor)  # pyright: ignore


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float16, 6e4), (torch.bfloat16, 3e38)])
def test_overflow_in_half_precision_names_the_first_site(dtype: torch.dtype, factor: float) -> None:
    """The up projection of layer 1 is made huge: `up.1` overflows first, whatever comes of it later."""
    model = tiny_model("llama", dtype=dtype)
    ids = tokens(model)
    huge(model, "model.layers.1.mlp.up_proj", factor)
    with pytest.warns(NonFiniteWarning, match=r"^up\.1 is the first of"), capture(model, "*", stop=False) as acts:
        model(ids)
    assert acts.receipt is not None and acts.receipt.nonfinite is not None
    listed = list(acts.receipt.nonfinite)
    assert listed[0] == "up.1" and {"neurons.1", "mlp_out.1", "logits"} <= set(listed)
    for site, value in acts.items():
        assert (str(site) in listed) == (not bool(torch.isfinite(value).all())), site
    with pytest.raises(InterpError, match=r"^up\.1 is the first"), capture(model, "*", stop=False, finite="raise"):
        model(ids)


def test_nan_in_float32_is_looked_for_on_demand() -> None:
    """One NaN is planted; attention takes it to later positions, and the receipt names the site it began at."""
    model = tiny_model("llama")
    ids = tokens(model)

    def planted(x: Tensor, _: object) -> Tensor:
        out = x.clone()
        out[1, 3, 0] = float("nan")
        return out

    sites = ["resid_post.2", "attn_out.1", "mlp_out.0", "pattern.1"]  # not in the order of the model
    with edited(model, Edit("mlp_out.0", planted)):
        with capture(model, sites, stop=False) as unseen:
            model(ids)
        with pytest.warns(NonFiniteWarning, match=r"mlp_out\.0 is the first of 4"):
            with capture(model, sites, stop=False, finite="warn") as acts:
                model(ids)
    assert unseen.receipt is not None and unseen.receipt.nonfinite is None
    assert acts.receipt is not None and acts.receipt.nonfinite == dict.fromkeys(
        ["mlp_out.0", "pattern.1", "attn_out.1", "resid_post.2"], 1
    )
    assert torch.isfinite(acts["mlp_out.0"]).sum() == acts["mlp_out.0"].numel() - 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_positions_left_aside_are_looked_at_too(dtype: torch.dtype) -> None:
    """An overflow spoils later layers also where it is at a position that is not kept."""
    model = tiny_model("llama", dtype=dtype)
    with (
        edited(model, set_to("resid_post.0", float("inf"), at=[5])),
        pytest.warns(NonFiniteWarning, match=r"resid_post\.0"),
        capture(model, "resid_post.0", positions=[1]) as acts,
    ):
        model(tokens(model))
    assert torch.isfinite(acts["resid_post.0"]).all()


def test_sites_of_whole_numbers_have_nothing_that_could_overflow() -> None:
    """Sites of whole numbers (chosen experts) have nothing to be looked at."""
    model = tiny_model("mixtral", dtype=torch.bfloat16)
    sites = [site for site in model.sites() if "expert" in str(site)]
    assert sites
    with capture(model, sites, stop=False) as acts:
        model(tokens(model))
    assert acts.receipt is not None and acts.receipt.nonfinite == {}


def test_sites_inside_functions_of_a_compiled_module_are_refused() -> None:
    """An `op` site watches torch functions, which compiled code does not call."""
    model = tiny_model("qwen2-moe")
    inside = [site for site in model.sites() if model.table.reach(site).side == "op"]
    assert inside
    model.layers[0].compile(backend="eager")
    with pytest.raises(InterpError, match="is compiled"), capture(model, inside[0]):
        pass


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
def test_a_device_map_gives_the_same_values_and_edits(tmp_path: Path, device_map: object) -> None:
    plain = tiny_model("llama")
    plain.module.save_pretrained(tmp_path)  # pyright: ignore
    mapped = load(tmp_path, device_map=device_map, check=False)
    ids, sites = tokens(plain), ["embed", "resid_post.*", "pattern.1", "neurons.2", "logits"]
    seen = []
    for model in (plain, mapped):
        with edited(model, add("resid_mid.1", 1.0, at=[2])), capture(model, sites, stop=False) as acts:
            model(ids)
        seen.append({str(site): value.cpu() for site, value in acts.items()})
    for name, value in seen[0].items():
        torch.testing.assert_close(seen[1][name], value, rtol=1e-4, atol=1e-4)


class Split(nn.Module):
    """A network whose parts lie on two devices, as a device map would put them."""

    def __init__(self, second: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4).to(second)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).to(self.b.weight.device))


@pytest.mark.gpu
def test_values_of_a_network_on_two_devices_stay_where_they_are() -> None:
    model = LoadedModel(Split("cuda"))
    x = torch.randn(3, 5, 4)
    with edited(model, [add("a", torch.ones(4)), add("b", torch.ones(4), at=[1])]), capture(model, ["a", "b"]) as acts:
        out = model(x)
    assert acts["a"].device.type == "cpu" and acts["b"].device.type == "cuda"
    expected = model.module.b((model.module.a(x) + 1).cuda())  # pyright: ignore
    expected[:, 1] += 1
    torch.testing.assert_close(out, expected.detach())


def test_overflow_in_the_dtype_that_is_kept_is_told() -> None:
    """The model is float32 and finite; the copy is float16, which ends at 65,504."""
    model = tiny_model("llama")
    ids = tokens(model)
    with pytest.warns(NonFiniteWarning, match=r"^resid_post\.1 is the first of 2 sites"):
        with edited(model, add("resid_post.1", 1e5, at=2)), capture(model, "resid_post.*", dtype=torch.float16) as acts:
            model(ids)
    assert acts.receipt is not None and acts.receipt.nonfinite == {"resid_post.1": 1, "resid_post.2": 1}
    with edited(model, add("resid_post.1", 1e5, at=2)):
        with capture(model, "resid_post.1", dtype=torch.float16, positions=3, finite="raise") as elsewhere:
            model(ids)
    assert bool(torch.isfinite(elsewhere["resid_post.1"]).all())


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool])
def test_a_dtype_that_cannot_hold_activations(dtype: torch.dtype) -> None:
    model = tiny_model("llama")
    with pytest.raises(InterpError, match="floating dtype"), capture(model, "gate.0", dtype=dtype):
        model(tokens(model))
