"""sparsify and this package compute the same numbers from the same folder, whoever wrote it."""

from __future__ import annotations

import json
from importlib import util

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp.core.errors import ArtefactError, InterpError
from interp.dictionaries.formats.sparsify import CONFIG, WEIGHTS, coders, hookpoint, read, write
from interp.dictionaries.saved import SavedDictionary

PAIRS = {
    "W_enc": ("encoder.weight", lambda tensor: tensor.t()),
    "b_enc": ("encoder.bias", lambda tensor: tensor),
    "W_dec": ("W_dec", lambda tensor: tensor),
    "b_dec": ("b_dec", lambda tensor: tensor),
}


class Theirs(torch.nn.Module):
    """A sparse coder with dense codes and the reconstruction as its output."""

    def __init__(self, coder):
        super().__init__()
        self.coder = coder
        self.named_parameters = coder.named_parameters

    def encode(self, x):
        found = self.coder.encode(x)
        return torch.zeros_like(found.pre_acts).scatter(1, found.top_indices, found.top_acts)

    def forward(self, x):
        """As `SparseCoder.forward`, which with multi_topk returns its training pass of 4 k latents instead."""
        found = self.coder.encode(x)
        out = self.coder.decode(found.top_acts, found.top_indices)
        return out if self.coder.W_skip is None else out + x @ self.coder.W_skip.mT


@pytest.fixture(autouse=True)
def plain_decode(monkeypatch):
    """Their eager decoder: the Triton one wants widths that are multiples of 8."""
    if util.find_spec("sparsify"):
        from sparsify import sparse_coder, utils

        monkeypatch.setattr(sparse_coder, "decoder_impl", utils.eager_decode)


def loaded(folder):
    from sparsify import SparseCoder

    return Theirs(SparseCoder.load_from_disk(folder))


@pytest.mark.needs_package("sparsify")
@pytest.mark.parametrize("kind", ["topk", "group_max", "multi_topk"])
@pytest.mark.parametrize(("d_out", "skip"), [(None, False), (12, False), (12, True)])
def test_sparsify_reads_what_is_written_here(tmp_path, making, kind, d_out, skip):
    ours, x = making.made(kind, d_out=d_out, skip=skip, scale=0.25), making.noise(23, making.D, scale=4)
    theirs = loaded(write(SavedDictionary(dictionary=ours), tmp_path / "layers.1"))
    assert theirs.coder.cfg.transcode == (d_out is not None)
    making.same(ours, theirs, x)
    if kind != "multi_topk":
        torch.testing.assert_close(theirs.coder(x).sae_out, ours(x), rtol=1e-5, atol=1e-5)


@pytest.mark.needs_package("sparsify")
@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize("transcode", [False, True])
@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("latents", [{"num_latents": 30}, {"num_latents": 0, "expansion_factor": 3}])
def test_reading_what_sparsify_wrote(tmp_path, making, activation, transcode, skip, latents):
    from sparsify import SparseCoder, SparseCoderConfig

    k = 5 if latents["num_latents"] else 6
    config = SparseCoderConfig(activation=activation, k=k, transcode=transcode, skip_connection=skip, **latents)
    coder = SparseCoder(12, config)
    with torch.no_grad():
        for index, parameter in enumerate(coder.parameters()):
            parameter.add_(making.noise(*parameter.shape, seed=index, scale=0.5))
        coder.encoder.bias.add_(20)  # their backward ignores the ReLU, so compare where all selected are positive
    coder.save_to_disk(tmp_path / "layers.3.mlp")
    found = read(tmp_path / "layers.3.mlp")
    assert found.dictionary.d_dict == (30 if latents["num_latents"] else 36)
    assert found.about["site"] == ("mlp_in.3" if transcode else "mlp_out.3")
    assert found.about.get("target_site") == ("mlp_out.3" if transcode else None)
    x, theirs = making.noise(23, making.D), Theirs(coder)
    making.same(found.dictionary, theirs, x, tol=1e-4)
    pairs = PAIRS | ({"W_skip": ("W_skip", lambda tensor: tensor.t())} if skip else {})
    making.same_gradients(found.dictionary, theirs, x, pairs, tol=1e-4)


@pytest.mark.needs_package("sparsify")
def test_latents_that_the_relu_zeroes(tmp_path, making):
    ours = making.made("topk")
    ours.b_enc.sub_(30)
    theirs = loaded(write(SavedDictionary(dictionary=ours), tmp_path / "c"))
    x = making.noise(23, making.D, scale=4)
    assert int(ours.encode(x).l0().max()) < making.K
    making.same(read(tmp_path / "c").dictionary, theirs, x)


@pytest.mark.needs_package("sparsify")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, making, dtype):
    half = making.made("topk").to(dtype)
    theirs = loaded(write(SavedDictionary(dictionary=half), tmp_path / "c"))
    assert theirs.coder.dtype == dtype
    found, x = read(tmp_path / "c").dictionary, making.noise(23, making.D, scale=4).to(dtype).float()
    assert found.W_dec.dtype == dtype
    making.same(found.float(), theirs.float(), x)
    write(SavedDictionary(dictionary=half), tmp_path / "again")
    first, second = load_file(tmp_path / "c" / WEIGHTS), load_file(tmp_path / "again" / WEIGHTS)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_what_is_known_travels_and_the_run_names_the_model(tmp_path, making):
    about = {"model": "tiny", "weight_hash": "abc", "site": "mlp_in.2", "target_site": "mlp_out.2"}
    saved = SavedDictionary(dictionary=making.made(d_out=12), about=about, certificate={"l0": 5.0})
    assert hookpoint(saved) == "layers.2.mlp"
    found = read(write(saved, tmp_path / "anything"))
    assert {name: found.about[name] for name in about} == about and found.certificate == {"l0": 5.0}
    write(SavedDictionary(dictionary=making.made()), tmp_path / "layers.7")
    (tmp_path / "config.json").write_text(json.dumps({"model": "EleutherAI/some"}))
    found = read(tmp_path / "layers.7")
    assert (found.about["model"], found.about["site"]) == ("EleutherAI/some", "resid_post.7")
    assert coders(tmp_path) == ["anything", "layers.7"]


def test_what_sparsify_cannot_express_is_refused(tmp_path, making):
    for dictionary, message in (
        (making.made("relu"), "no relu"),
        (making.made("jump_relu"), "no jump_relu"),
        (making.made("batch_topk"), "no batch_topk"),
        (making.made("topk", d_out=7), "one width"),
        (making.made("topk", token_norm="layer_norm"), "token_norm='layer_norm' is lost"),
    ):
        with pytest.raises(InterpError, match=message):
            write(SavedDictionary(dictionary=dictionary), tmp_path / "d")
    assert not any(tmp_path.iterdir())


def _edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text()) | changes
    (folder / CONFIG).write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _edit(f, d_in=None), "lacks d_in"),
        (lambda f: _edit(f, activation="relu"), "'relu' is not read here"),
        (lambda f: _edit(f, activation="groupmax", k=7), "7 equal groups"),
        (lambda f: _edit(f, k=31), "k=31 must lie"),
        (lambda f: _edit(f, signed=True), "signed"),
        (lambda f: _edit(f, num_latents=31), r"\(30, 12\)"),
        (lambda f: _edit(f, skip_connection=True), "W_skip"),
        (lambda f: save_file(load_file(f / WEIGHTS) | {"W_dec": torch.zeros(12, 30)}, f / WEIGHTS), r"\(12, 30\)"),
        (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    ],
)
def test_bad_folders_are_refused(tmp_path, making, damage, message):
    write(SavedDictionary(dictionary=making.made()), tmp_path / "d")
    damage(tmp_path / "d")
    with pytest.raises(ArtefactError, match=message):
        read(tmp_path / "d")
