"""Vision: which position is which patch, real images through a real network, and gates in transformers' networks."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from interp.core.errors import ArtefactError, InterpError
from interp.instrument.capture import capture
from interp.instrument.edits import add, edited, patch_from, scale, set_to, zero
from interp.models import efficientnet
from interp.models.efficientnet import normalized
from interp.models.load import load
from interp.models.model import LoadedModel
from interp.models.patches import patch_record
from interp.models.probe import probe_pixels, verify
from interp.models.tiny import tiny_model
from tests.models import conformance
from tests.models.networks import filled, noise

TIMM = """timm's own blocks: run where timm can be imported, e.g. with a torchvision that fits torch."""


@pytest.mark.parametrize(("name", "registers"), [("vit", 0), ("dinov2", 0), ("dinov2-registers", 3)])
def test_each_position_is_the_patch_the_record_says(name: str, registers: int) -> None:
    """Causal oracle: changing the pixels of one patch moves `embed` there alone, and `resid_pre` at its position."""
    model = tiny_model(name)
    record = patch_record(model)
    assert record.grid == (4, 4) and record.n_pos == 17 + registers
    assert record.kinds[0] == "cls" and record.kinds.count("register") == registers
    pixels = probe_pixels(model, 1)
    with capture(model, ["embed", "resid_pre.0"]) as before:
        model(pixels)
    for row, column in ((0, 0), (1, 3), (3, 2)):
        position = record.position(row, column)
        top, left, bottom, right = record.box(position)
        changed = pixels.clone()
        changed[:, :, top:bottom, left:right] += 1
        with capture(model, ["embed", "resid_pre.0"]) as after:
            model(changed)
        moved = (after["resid_pre.0"] - before["resid_pre.0"])[0].abs().amax(-1)
        assert moved.nonzero()[:, 0].tolist() == [position]
        assert record.on_grid(moved).nonzero().tolist() == [[row, column]]
        patch = (after["embed"] - before["embed"])[0].abs().amax(-1)
        assert patch.nonzero()[:, 0].tolist() == [position - record.first_patch]
        assert record.coordinates[position].tolist() == [row, column]
    assert int(record.special.sum()) == 1 + registers and record.coordinates[: 1 + registers].eq(-1).all()


def test_registers_belong_to_no_patch() -> None:
    model = tiny_model("dinov2-registers")
    pixels = probe_pixels(model, 2)
    with capture(model, ["resid_pre.0"]) as acts:
        model(pixels)
    special = patch_record(model).special
    assert torch.equal(acts["resid_pre.0"][0, special], acts["resid_pre.0"][1, special])
    assert not torch.allclose(acts["resid_pre.0"][0, ~special], acts["resid_pre.0"][1, ~special])


def test_records_of_other_sizes_and_what_is_refused() -> None:
    model = tiny_model("vit")
    wide = patch_record(model, 8, 24)
    assert wide.grid == (2, 6) and wide.box(wide.position(1, 5)) == (4, 20, 8, 24)
    with pytest.raises(InterpError, match="not made of 4 x 4 patches"):
        patch_record(model, 10, 16)
    with pytest.raises(InterpError, match=r"no patch \(2, 0\)"):
        wide.position(2, 0)
    with pytest.raises(InterpError, match="position 0 is no patch"):
        wide.box(0)
    with pytest.raises(InterpError, match="the record 17"):
        patch_record(model).on_grid(torch.zeros(16))
    with pytest.raises(InterpError, match="no vision transformer"):
        patch_record(tiny_model("llama"))
    with pytest.raises(InterpError, match="cannot generate"):
        model.generate(torch.zeros(1, 3, dtype=torch.long), n_new=1)


def test_cls_sees_no_patch_through_a_closed_pattern() -> None:
    """Attention is bidirectional: with every head of every layer looking at CLS alone, patches do not matter."""
    model = tiny_model("vit")
    pixels = probe_pixels(model, 2)
    assert not torch.allclose(*model(pixels), atol=1e-3)
    only_cls = torch.zeros(17)
    only_cls[0] = 1
    with capture(model, ["pattern.0"]) as acts:
        model(pixels)
    assert torch.allclose(acts["pattern.0"].sum(-1), torch.ones(2, 4, 17), atol=1e-6)
    assert float(acts["pattern.0"].triu(1).abs().max()) > 0.05
    with edited(model, [set_to("pattern.*", only_cls)]):
        one, other = model(pixels)
    assert torch.allclose(one, other, atol=1e-5)


def test_layer_scale_is_a_gate_that_only_lasts_for_the_context() -> None:
    model = tiny_model("dinov2")
    pixels = probe_pixels(model)
    plain = model(pixels)
    gates = "*layer_scale*:residual_gate"
    assert len(model.resolve(gates)) == 2 * model.n_layers
    with edited(model, [zero(gates)]), capture(model, ["resid_pre.0", "resid_post.2"], stop=False) as acts:
        model(pixels)
    assert torch.equal(acts["resid_pre.0"], acts["resid_post.2"])
    assert torch.equal(model(pixels), plain)


# Real images through a real network.


def pictures() -> dict[str, Tensor]:
    """Photographs (1, 3, 224, 224) with values from 0 to 1, by what they show."""
    from sklearn.datasets import load_sample_image

    return {"daisy": _square(load_sample_image("flower.jpg")), "palace": _square(load_sample_image("china.jpg"))}


def _square(image: Any) -> Tensor:
    pixels = torch.tensor(image).permute(2, 0, 1)[None] / 255
    side = min(pixels.shape[2:])
    top, left = (pixels.shape[2] - side) // 2, (pixels.shape[3] - side) // 2
    cut = pixels[:, :, top : top + side, left : left + side]
    return functional.interpolate(cut, (224, 224), mode="bilinear", antialias=True)


CLASSES = {"daisy": 985, "palace": 698, "Egyptian cat": 285, "espresso": 967}
"""Numbers of ImageNet's classes."""


@pytest.mark.needs_model("efficientnet-lite0")
class TestEfficientNet:
    def test_photographs_are_named(self) -> None:
        model = load("efficientnet-lite0")
        for name, pixels in pictures().items():
            assert int(model(normalized(pixels)).argmax()) == CLASSES[name]

    @pytest.mark.needs_package("skimage")
    def test_more_photographs(self) -> None:
        from skimage import data

        model = load("efficientnet-lite0")
        for name, image in (("Egyptian cat", data.chelsea()), ("espresso", data.coffee())):
            logits = model(normalized(_square(image)))[0]
            assert CLASSES[name] in logits.topk(2).indices.tolist(), name

    def test_capture_moves_no_bit_and_a_patched_layer_carries_the_class(self) -> None:
        model = load("efficientnet-lite0")
        images = {name: normalized(pixels) for name, pixels in pictures().items()}
        layers = ["_blocks.4", "_blocks.10", "_blocks.15"]
        with capture(model, layers) as donor:
            palace = model(images["palace"])
        assert torch.equal(palace, model.module(images["palace"]))
        plain = model(images["daisy"])
        for name in layers:
            with edited(model, [patch_from(name, donor[name])]) as receipts:
                patched = model(images["daisy"])
            assert receipts[0].moved > 0.1
            late = int(patched.argmax()) == CLASSES["palace"]
            assert late == (name == "_blocks.15") or torch.allclose(patched, palace, atol=1e-4)
        with edited(model, [patch_from("_blocks.15", donor["_blocks.15"])]):
            assert torch.allclose(model(images["daisy"]), palace, atol=1e-4)
        with edited(model, [scale("_blocks.15", 1.0)]):
            assert torch.equal(model(images["daisy"]), plain)

    def test_weights_are_kept_as_safetensors_and_a_damaged_file_is_an_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
        first = load("efficientnet-lite0").weight_hash
        (kept,) = (tmp_path / "models").iterdir()
        assert kept.suffix == ".safetensors"
        stamp = kept.stat().st_mtime_ns
        assert load("efficientnet-lite0").weight_hash == first and kept.stat().st_mtime_ns == stamp
        kept.write_bytes(kept.read_bytes()[:1000])
        with pytest.raises(ArtefactError, match="delete"):
            load("efficientnet-lite0")

    def test_a_file_that_would_run_code_is_refused(self, tmp_path: Path) -> None:
        torch.save({"a": _Evil()}, tmp_path / "evil.pth")
        with pytest.raises(ArtefactError, match="damaged"):
            efficientnet._convert(tmp_path / "evil.pth", tmp_path / "out" / "evil.safetensors")
        assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("false",)


# Gates in transformers' vision networks.


def _efficientnet() -> nn.Module:
    import transformers

    config = transformers.EfficientNetConfig(
        image_size=16, width_coefficient=1.0, depth_coefficient=1.0, depth_divisor=8, num_labels=5,
        kernel_sizes=[3, 3], in_channels=[32, 16], out_channels=[16, 24], depthwise_padding=[], strides=[1, 2],
        num_block_repeats=[1, 1], expand_ratios=[1, 2], squeeze_expansion_ratio=0.25, hidden_dim=1280,
    )  # fmt: skip
    return transformers.EfficientNetForImageClassification(config)


def _regnet() -> nn.Module:
    import transformers

    config = transformers.RegNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4, layer_type="y", num_labels=5
    )
    return transformers.RegNetForImageClassification(config)


@pytest.mark.parametrize(("make", "n_gates"), [(_efficientnet, 2), (_regnet, 2)])
def test_squeeze_and_excitation_in_transformers(make: Any, n_gates: int) -> None:
    with torch.random.fork_rng():
        module = make()
    model = LoadedModel(filled(module))
    gates = model.resolve("*:se_gate")
    assert len(gates) == n_gates
    pixels = noise(2, 3, 16, 16)
    plain = model(pixels)
    with capture(model, gates, stop=False) as acts:
        assert torch.equal(model(pixels), plain)
    for gate in gates:
        assert acts[gate].shape[2:] == (1, 1) and bool(((acts[gate] > 0) & (acts[gate] < 1)).all())
        with edited(model, [zero(gate)]), capture(model, [gate.path]) as closed:
            model(pixels)
        assert float(closed[gate.path].abs().max()) == 0


class OnePositional(nn.Module):
    """transformers' image classifiers return an object; the conformance functions want the logits."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).logits


@pytest.mark.parametrize("make", [_efficientnet, _regnet])
def test_squeeze_and_excitation_conforms(make: Any) -> None:
    with torch.random.fork_rng():
        module = OnePositional(make())
    model, pixels = LoadedModel(filled(module)), noise(1, 3, 16, 16)
    report = verify(model, pixels)
    named = [check for check in report.checks if ":se_gate" in check.site]
    assert report.max_abs_diff == 0 and named and all(check.passed for check in named)
    conformance.check_edit(model, pixels)
    conformance.check_gradient(LoadedModel(filled(module, dtype=torch.float64)), pixels.double())


# timm itself, where it can be imported.


def timm_modules() -> Any:
    try:
        import timm
        import timm.layers
        import timm.models.convit
        import timm.models.mlp_mixer
    except (ImportError, RuntimeError) as error:  # a torchvision that does not fit torch fails with RuntimeError
        pytest.skip(f"{TIMM} Not here: {error}")
    return timm


BUILDS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "SEModule": (lambda timm: timm.layers.SEModule(8), (2, 8, 4, 4)),
    "EffectiveSEModule": (lambda timm: timm.layers.EffectiveSEModule(8), (2, 8, 4, 4)),
    "SqueezeExciteCl": (lambda timm: timm.layers.squeeze_excite.SqueezeExciteCl(8), (2, 4, 4, 8)),
    "SqueezeExcite": (lambda timm: timm.models._efficientnet_blocks.SqueezeExcite(8), (2, 8, 4, 4)),
    "GluMlp": (lambda timm: timm.layers.GluMlp(6, 8), (2, 5, 6)),
    "GluMlp conv": (lambda timm: timm.layers.GluMlp(6, 8, use_conv=True), (2, 6, 4, 4)),
    "SwiGLUPacked": (lambda timm: timm.layers.SwiGLUPacked(6, 8), (2, 5, 6)),
    "SwiGLU": (lambda timm: timm.layers.SwiGLU(6, 8, norm_layer=nn.LayerNorm), (2, 5, 6)),
    "LayerScale": (lambda timm: timm.layers.LayerScale(6, 0.5), (2, 5, 6)),
    "SpatialGatingUnit": (lambda timm: timm.models.mlp_mixer.SpatialGatingUnit(12, 5), (2, 5, 12)),
    "GPSA": (lambda timm: timm.models.convit.GPSA(8, 4), (2, 9, 8)),
}


@pytest.mark.parametrize("name", BUILDS)
def test_real_timm_blocks(name: str) -> None:
    make, shape = BUILDS[name]
    timm = timm_modules()
    with torch.random.fork_rng():
        block = make(timm)
    model = LoadedModel(filled(nn.Sequential(block)))
    assert model.table.block_sites
    conformance.check_capture(model, noise(*shape))
    conformance.check_edit(model, noise(*shape))
    with torch.random.fork_rng():
        twin = make(timm)
    conformance.check_gradient(
        LoadedModel(filled(nn.Sequential(twin), dtype=torch.float64)), noise(*shape, dtype=torch.float64)
    )


def test_real_timm_networks() -> None:
    timm = timm_modules()
    with torch.random.fork_rng():
        vit = timm.models.vision_transformer.VisionTransformer(
            img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, mlp_layer=timm.layers.SwiGLUPacked,
            mlp_ratio=2, num_classes=4,
        )  # fmt: skip
    model = LoadedModel(filled(vit))
    assert [str(site) for site in model.resolve("*:gate")] == ["blocks.0.mlp:gate", "blocks.1.mlp:gate"]
    pixels = noise(2, 3, 16, 16)
    plain = model(pixels)
    with capture(model, ["*:gate", "*:neurons"], stop=False) as acts:
        assert torch.equal(model(pixels), plain)
    assert acts["blocks.0.mlp:gate"].shape == (2, 17, 16)
    with edited(model, [add("blocks.1.mlp:gate_pre", 1.0, at=0)]):
        assert not torch.allclose(model(pixels), plain)
