"""circuit-tracer and this package compute the same from the files of a cross-layer transcoder, whoever wrote them."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from interp.core.errors import ArtefactError, InterpError
from interp.dictionaries.activations.batch_topk import BatchTopK
from interp.dictionaries.activations.jump_relu import JumpReLU
from interp.dictionaries.activations.relu import ReLU
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.cross_layer import CrossLayerTranscoder
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.formats.cross_layer import read_clt, write_clt

L, D, M = 3, 6, 10
ACTIVATIONS = {"relu": ReLU, "jump_relu": lambda: JumpReLU(M), "batch_topk": lambda: BatchTopK(3)}


def made(making, kind="relu", *, activation=None, **options) -> CrossLayerTranscoder:
    parts = []
    for layer in range(L):
        part = SparseDictionary(D, M, (activation or ACTIVATIONS[kind])(), d_out=(L - layer) * D, **options)
        with torch.no_grad():
            for index, (name, parameter) in enumerate(part.named_parameters()):
                if not name.startswith("activation"):
                    parameter.add_(making.noise(*parameter.shape, seed=10 * layer + index, scale=0.5))
            part.scale_in.fill_(0.5 + layer)
            part.scale_out.fill_(2.0 - 0.5 * layer)
            if kind == "jump_relu":
                part.activation.log_threshold.copy_(making.noise(M, seed=layer).abs().add(0.1).log())
            if kind == "batch_topk":
                part.activation.threshold.fill_(0.2 + layer)
        parts.append(part)
    return CrossLayerTranscoder(parts).requires_grad_(False)


def theirs_from(folder):
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt

    return load_clt(str(folder), device=torch.device("cpu"), dtype=torch.float32, lazy_decoder=False)


def stacked(x: torch.Tensor) -> torch.Tensor:
    """(n, L d) as their (L, n, d)."""
    return x.unflatten(1, (L, -1)).transpose(0, 1)


@pytest.mark.needs_package("circuit_tracer")
@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_circuit_tracer_reads_what_is_written_here(tmp_path, making, kind):
    ours, x = made(making, kind), making.noise(17, L * D, scale=3)
    folder = write_clt(ours, tmp_path / "clt", model="tiny", scan="mine")
    theirs = theirs_from(folder)
    with torch.no_grad():
        codes = theirs.encode(stacked(x))
        torch.testing.assert_close(stacked(ours.encode(x).dense()), codes, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stacked(ours(x)), theirs(stacked(x)), rtol=1e-5, atol=1e-4)
    assert 0 < float((codes != 0).float().mean()) < 1
    found, config = read_clt(folder)
    torch.testing.assert_close(found(x), ours(x), rtol=1e-5, atol=1e-4)
    assert config["model_kind"] == "cross_layer_transcoder" and config["model_name"] == "tiny"
    write_clt(found, folder)  # an older one is replaced
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clt"]


@pytest.mark.needs_package("circuit_tracer")
@pytest.mark.parametrize("kind", ["relu", "jump_relu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reading_what_circuit_tracer_wrote(tmp_path, making, kind, dtype):
    from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder as Theirs

    theirs = Theirs(L, M, D, kind, lazy_decoder=False, device=torch.device("cpu"), dtype=dtype)
    with torch.no_grad():
        for index, parameter in enumerate(theirs.parameters()):
            values = making.noise(*parameter.shape, seed=index, scale=0.5)
            parameter.copy_(values.abs() if parameter.shape == (L, 1, M) else values)
    theirs.to_safetensors(str(tmp_path / "clt"))
    found, config = read_clt(tmp_path / "clt")
    assert config == {} and found.parts[0].W_dec.dtype == dtype
    found, theirs = found.float(), theirs.to(torch.float32)
    theirs.lazy_decoder = False
    x = making.noise(17, L * D, scale=3)
    with torch.no_grad():
        torch.testing.assert_close(stacked(found.encode(x).dense()), theirs.encode(stacked(x)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stacked(found(x)), theirs(stacked(x)), rtol=1e-5, atol=1e-4)
    weights = making.noise(1, L * D, seed=5)
    found.requires_grad_(True)
    (found(x) * weights).square().sum().backward()
    theirs.requires_grad_(True)
    if kind == "jump_relu":  # their gradient of a stacked threshold has the wrong shape
        theirs.activation_function.threshold.requires_grad_(False)
    (theirs(stacked(x)) * stacked(weights)).square().sum().backward()
    for layer, part in enumerate(found.parts):
        for ours, expected in (
            (part.W_enc.grad.t(), theirs.W_enc.grad[layer]), (part.b_enc.grad, theirs.b_enc.grad[layer]),
            (part.W_dec.grad.unflatten(1, (-1, D)), theirs.W_dec[layer].grad),
        ):  # fmt: skip
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    torch.testing.assert_close(found.parts[0].b_dec.grad, theirs.b_dec.grad.flatten(), rtol=1e-4, atol=1e-2)


def test_what_circuit_tracer_cannot_express_is_refused(tmp_path, making):
    for clt, message in (
        (made(making, activation=lambda: TopK(3)), "run as a relu"),
        (made(making, skip=True), "no skip path"),
    ):
        with pytest.raises(InterpError, match=message):
            write_clt(clt, tmp_path / "clt")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(ArtefactError, match="not a saved dictionary"):
        write_clt(made(making), tmp_path / "mine")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_bad_folders_are_refused(tmp_path, making):
    folder = write_clt(made(making), tmp_path / "clt")

    def change(name, **changes):
        tensors = load_file(folder / name)
        save_file({key: value for key, value in (tensors | changes).items() if value is not None}, folder / name)
        return tensors

    for name, changes, message in (
        ("W_enc_1.safetensors", {"W_enc_1": None}, "no matrix W_enc_1"),
        ("W_enc_1.safetensors", {"b_dec_1": torch.zeros(5)}, r"\(5,\)"),
        ("W_enc_2.safetensors", {"threshold_2": torch.full((M,), -1.0)}, "below 0"),
        ("W_dec_1.safetensors", {"W_dec_1": torch.zeros(M, 3, D)}, r"\(10, 3, 6\)"),
        ("W_dec_1.safetensors", {"W_dec_1": None, "other": torch.zeros(1)}, "no W_dec_1"),
    ):
        before = change(name, **changes)
        with pytest.raises(ArtefactError, match=message):
            read_clt(folder)
        save_file(before, folder / name)
    (folder / "config.yaml").write_text("a: [")
    with pytest.raises(ArtefactError, match="damaged"):
        read_clt(folder)
    (folder / "config.yaml").write_text(yaml.safe_dump({"scan": "x"}))
    assert read_clt(folder)[1] == {"scan": "x"}
    (folder / "W_dec_1.safetensors").unlink()
    with pytest.raises(ArtefactError, match=r"encoders of layers \[0, 1, 2\] and decoders of \[0, 2\]"):
        read_clt(folder)
    with pytest.raises(ArtefactError, match="expected both"):
        read_clt(tmp_path / "none")
