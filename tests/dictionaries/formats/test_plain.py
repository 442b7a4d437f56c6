"""Bare safetensors: everything with our header, what the caller says without one, and which way the weights lie."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp.core.errors import ArtefactError, InterpError
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.formats.plain import Hints, is_ours, is_plain, read, write
from interp.dictionaries.saved import SavedDictionary

KINDS = ("relu", "topk", "multi_topk", "batch_topk", "jump_relu", "gated", "group_max", "top_afa", "gradient_topk")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"d_out": 7}, {"d_out": 12, "skip": True}, {"token_norm": "layer_norm"}])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_comes_back(tmp_path, making, kind, options, dtype):
    ours = making.made(kind, scale=1.0 if "d_out" not in options else 0.5, **options)
    if dtype != torch.float32:
        ours.scale_in.fill_(1)
        ours.scale_out.fill_(1)
        ours = ours.to(dtype)
    saved = SavedDictionary(dictionary=ours, about={"site": "resid_post.1"}, certificate={"l0": 2.0})
    if kind == "top_afa" and ours.scale_in != ours.scale_out:
        with pytest.raises(InterpError, match="unequal scales cannot be folded"):
            write(saved, tmp_path / "d.safetensors")
        return
    found = read(write(saved, tmp_path / "d.safetensors"))
    assert found.about["site"] == "resid_post.1" and found.certificate == {"l0": 2.0}
    assert found.dictionary.activation.kind == ours.activation.kind
    x = making.noise(23, making.D, scale=4).to(dtype)
    tol = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(found.dictionary.encode(x).dense(), ours.encode(x).dense(), rtol=tol, atol=tol)
    torch.testing.assert_close(found.dictionary(x), ours(x), rtol=tol, atol=tol)
    write(found, tmp_path / "again.safetensors")
    first, second = load_file(tmp_path / "d.safetensors"), load_file(tmp_path / "again.safetensors")
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def bare(tmp_path, dictionary, *, turn=(False, False), metadata=None, **more):
    tensors = {name: getattr(dictionary, name).detach().clone() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    for name, turned in zip(("W_enc", "W_dec"), turn, strict=True):
        tensors[name] = (tensors[name].t() if turned else tensors[name]).contiguous()
    path = tmp_path / "bare.safetensors"
    save_file(tensors | more, path, metadata=metadata)
    return path


@pytest.mark.parametrize("turn", [(False, False), (True, False), (False, True), (True, True)])
def test_a_bare_file_of_any_orientation(tmp_path, making, turn):
    ours, x = making.made("topk"), making.noise(9, making.D, scale=4)
    path = bare(tmp_path, ours, turn=turn)
    assert is_plain(path) and not is_ours(path)
    found = read(path, Hints(activation="topk", k=making.K, subtract_b_dec=True)).dictionary
    torch.testing.assert_close(found(x), ours(x))


def test_what_a_bare_file_does_not_say_is_asked_for(tmp_path, making):
    path = bare(tmp_path, making.made("topk"))
    for hints, message in (
        (Hints(), "pass activation= and k=, or threshold="),
        (Hints(activation="topk"), "pass k="),
        (Hints(activation="topk", k=5), "pass subtract_b_dec="),
        (Hints(activation="batch_topk", k=5, subtract_b_dec=True), "pass threshold="),
        (Hints(activation="jump_relu", subtract_b_dec=True), "which is no jump_relu"),
        (Hints(activation="topk", k=5, subtract_b_dec=True, turned=(True, False)), "does not fit the shapes"),
        (Hints(activation="topk", k=31, subtract_b_dec=True), "k=31 must lie"),
    ):
        with pytest.raises(ArtefactError, match=message):
            read(path, hints)
    with pytest.raises(InterpError, match="nearest: topk"):
        read(path, Hints(activation="topkk", k=5, subtract_b_dec=True))
    assert read(path, Hints(k=5, subtract_b_dec=False)).dictionary.activation.kind == "topk"


def test_headers_and_tensors_that_say_it(tmp_path, making):
    x = making.noise(9, making.D, scale=4)
    ours = making.made("topk")
    found = read(bare(tmp_path, ours, metadata={"k": "5"}), Hints(subtract_b_dec=True)).dictionary
    torch.testing.assert_close(found(x), ours(x))
    ours = making.made("batch_topk")
    header = {"k": "5", "threshold": "0.7", "activation": "batch_topk"}
    found = read(bare(tmp_path, ours, metadata=header), Hints(subtract_b_dec=True)).dictionary
    torch.testing.assert_close(found(x), ours(x))
    ours = making.made("jump_relu", d_out=7)
    found = read(bare(tmp_path, ours, threshold=ours.activation.threshold.detach())).dictionary
    torch.testing.assert_close(found(x), plain_of(ours, x))
    with pytest.raises(ArtefactError, match="header"):
        read(bare(tmp_path, ours, metadata={"k": "five"}))


def plain_of(dictionary, x):
    """The function without its scales, written out."""
    z = x @ dictionary.W_enc + dictionary.b_enc
    return (z * (z > dictionary.activation.threshold)) @ dictionary.W_dec + dictionary.b_dec


def square(seed: int = 1) -> tuple[SparseDictionary, torch.Tensor]:
    """As many latents as dimensions, and activations that are its own features."""
    dictionary = SparseDictionary.random(24, 24, TopK(3), seed=seed)
    codes = torch.zeros(400, 24)
    generator = torch.Generator().manual_seed(3)
    for row in codes:
        row[torch.randperm(24, generator=generator)[:3]] = 1 + torch.rand(3, generator=generator)
    return dictionary, codes @ dictionary.W_dec.detach()


@pytest.mark.parametrize("turn", [(False, False), (True, False), (False, True), (True, True)])
def test_square_weights_are_oriented_by_what_they_reconstruct(tmp_path, turn):
    ours, x = square()
    path = bare(tmp_path, ours, turn=turn)
    hints = {"k": 3, "subtract_b_dec": True}
    found = read(path, Hints(**hints, sample=x)).dictionary
    torch.testing.assert_close(found(x), ours(x))
    torch.testing.assert_close(read(path, Hints(**hints, turned=turn)).dictionary(x), ours(x))
    with pytest.raises(ArtefactError, match="as many latents as dimensions"):
        read(path, Hints(**hints))
    with pytest.raises(ArtefactError, match="clearly better"):
        read(path, Hints(**hints, sample=torch.randn(400, 24, generator=torch.Generator().manual_seed(8))))


def test_bad_files(tmp_path, making):
    ours = making.made("topk")
    with pytest.raises(ArtefactError, match="do not fit 30 latents"):
        read(bare(tmp_path, ours, W_dec=torch.zeros(29, 12)), Hints(k=5, subtract_b_dec=True))
    save_file({"W_enc": torch.zeros(2, 3)}, tmp_path / "bare.safetensors")
    with pytest.raises(ArtefactError, match="lacks b_enc, W_dec, b_dec"):
        read(tmp_path / "bare.safetensors")
    with pytest.raises(InterpError, match="should end in .safetensors"):
        write(SavedDictionary(dictionary=ours), tmp_path / "folder")
    with pytest.raises(ArtefactError, match="not a saved dictionary"):
        write(SavedDictionary(dictionary=ours), tmp_path / "bare.safetensors")
