"""circuit-tracer and this package compute the same numbers from the same transcoder files, whoever wrote them."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from interp.core.errors import ArtefactError, InterpError
from interp.dictionaries.formats.circuit_tracer import THRESHOLD, is_transcoder, read, read_set, write, write_set
from interp.dictionaries.saved import SavedDictionary

CASES = {
    "relu": {"d_out": 12}, "relu-skip": {"d_out": 12, "skip": True}, "jump_relu": {"d_out": 12},
    "jump_relu-skip": {"d_out": 12, "skip": True}, "batch_topk": {"d_out": 12}, "relu-auto": {}, "jump_relu-auto": {},
}  # fmt: skip
"""kind and options; `auto` subtracts b_dec from its input."""
PAIRS = {
    "W_enc": ("W_enc", lambda tensor: tensor.t()),
    "b_enc": ("b_enc", lambda tensor: tensor),
    "W_dec": ("W_dec", lambda tensor: tensor),
    "b_dec": ("b_dec", lambda tensor: tensor),
}


def theirs_from(path):
    from circuit_tracer.transcoder.single_layer_transcoder import load_relu_transcoder

    cpu = torch.device("cpu")
    return load_relu_transcoder(str(path), 0, device=cpu, lazy_encoder=False, lazy_decoder=False)


@pytest.mark.needs_package("circuit_tracer")
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("case", CASES)
def test_circuit_tracer_reads_what_is_written_here(tmp_path, making, case, scale):
    ours = making.made(case.partition("-")[0], scale=scale, **CASES[case])
    x = making.noise(23, making.D, scale=4)
    theirs = theirs_from(write(SavedDictionary(dictionary=ours), tmp_path / "layer_0.safetensors"))
    making.same(ours, theirs, x)
    found = read(tmp_path / "layer_0.safetensors").dictionary
    making.same(found, theirs, x)
    pairs = PAIRS | ({"W_skip": ("W_skip", lambda tensor: tensor.t())} if "skip" in case else {})
    making.same_gradients(found, theirs, x, pairs)


@pytest.mark.needs_package("circuit_tracer")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("jump", [False, True])
@pytest.mark.parametrize("square", [False, True])
def test_reading_what_circuit_tracer_wrote(tmp_path, making, dtype, jump, square):
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    m = 12 if square else 30
    function = JumpReLU(making.noise(m, seed=9).abs().to(dtype), 0.1) if jump else torch.nn.functional.relu
    cpu = torch.device("cpu")
    theirs = SingleLayerTranscoder(12, m, function, 0, skip_connection=True, device=cpu, dtype=dtype)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(theirs.named_parameters()):
            if "threshold" not in name:
                parameter.copy_(making.noise(*parameter.shape, seed=index, scale=0.5))
    theirs.to_safetensors(str(tmp_path / "layer_4.safetensors"))
    found = read(tmp_path / "layer_4.safetensors")
    assert found.about["layer"] == 4 and found.dictionary.W_dec.dtype == dtype
    x = making.noise(23, making.D, scale=4).to(dtype).float()
    making.same(found.dictionary.float(), theirs.to(torch.float32), x)


@pytest.mark.needs_package("circuit_tracer")
def test_a_set_of_layers_goes_both_ways(tmp_path, making):
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    ours = {
        layer: SavedDictionary(
            dictionary=making.made("relu", d_out=12, scale=1 + layer),
            about={"site": f"resid_mid.{layer}", "target_site": f"mlp_out.{layer}", "model": "tiny"},
        )
        for layer in range(3)
    }
    folder = write_set(ours, tmp_path / "set", scan="mine")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["model_kind"], config["feature_input_hook"]) == ("transcoder_set", "hook_resid_mid")
    paths = {layer: str(folder / f"layer_{layer}.safetensors") for layer in range(3)}
    theirs = load_transcoder_set(
        paths, config["scan"], config["feature_input_hook"], config["feature_output_hook"],
        device=torch.device("cpu"), lazy_encoder=False, lazy_decoder=False,
    )  # fmt: skip
    x, found = making.noise(9, making.D, scale=4), read_set(folder)
    for layer in range(3):
        making.same(ours[layer].dictionary, theirs[layer], x)
        making.same(found[layer].dictionary, theirs[layer], x)
        assert found[layer].about["target_site"] == f"mlp_out.{layer}"
    with pytest.raises(ArtefactError, match="3 layers; say which, layer=0 to 2"):
        read(folder)
    torch.testing.assert_close(read(folder, layer=1).dictionary(x), ours[1].dictionary(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ArtefactError, match="no layer 3"):
        read(folder, layer=3)
    with pytest.raises(InterpError, match="every layer from 0"):
        write_set({1: ours[1]}, tmp_path / "other")
    write_set(ours, folder)  # replacing an older set is allowed


def test_the_config_alone_names_the_sites(tmp_path, making):
    write(SavedDictionary(dictionary=making.made("relu", d_out=12)), tmp_path / "layer_2.safetensors")
    config = {"model_name": "m", "feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    about = read(tmp_path).about
    assert (about["site"], about["target_site"], about["model"]) == ("mlp_in.2", "mlp_out.2", "m")


def test_the_certificate_travels_in_the_header(tmp_path, making):
    saved = SavedDictionary(dictionary=making.made("relu", d_out=12), certificate={"l0": 3.5})
    assert read(write(saved, tmp_path / "t.safetensors")).certificate == {"l0": 3.5}


def test_what_circuit_tracer_cannot_express_is_refused(tmp_path, making):
    for dictionary, message in (
        (making.made("topk", d_out=12), "would be run as a relu"),
        (making.made("gated"), "would be run as a relu"),
        (making.made("relu", d_out=7), "one width"),
        (making.made("relu", token_norm="layer_norm"), "would be lost"),
    ):
        with pytest.raises(InterpError, match=message):
            write(SavedDictionary(dictionary=dictionary), tmp_path / "t.safetensors")
    with pytest.raises(InterpError, match="should end in .safetensors"):
        write(SavedDictionary(dictionary=making.made("relu")), tmp_path / "t")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_enc": None}, "b_enc missing"),
        ({"W_enc": torch.zeros(12, 30)}, r"\(12, 30\)"),
        ({THRESHOLD: torch.full((30,), -0.1)}, "thresholds below 0"),
        ({"extra": torch.zeros(2)}, "holds"),
    ],
)
def test_bad_files_are_refused(tmp_path, making, change, message):
    path = write(SavedDictionary(dictionary=making.made("relu", d_out=12)), tmp_path / "t.safetensors")
    tensors = load_file(path) | change
    save_file({name: value for name, value in tensors.items() if value is not None}, path)
    with pytest.raises(ArtefactError, match=message):
        read(path)


def test_other_files_are_not_overwritten(tmp_path, making):
    save_file({"mine": torch.zeros(2)}, tmp_path / "t.safetensors")
    assert not is_transcoder(tmp_path / "t.safetensors")
    with pytest.raises(ArtefactError, match="not a saved dictionary"):
        write(SavedDictionary(dictionary=making.made("relu")), tmp_path / "t.safetensors")
