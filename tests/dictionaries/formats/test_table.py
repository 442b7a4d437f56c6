"""A path is recognised by what lies there; nothing is guessed."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from interp.core.errors import ArtefactError, InterpError
from interp.dictionaries.formats.plain import Hints
from interp.dictionaries.formats.table import FORMATS, WRITABLE, load_dictionary, recognise, rewrite, save_dictionary
from interp.dictionaries.saved import SavedDictionary

PLACES = {"circuit-tracer": "layer_0.safetensors", "plain": "d.safetensors"}


@pytest.mark.parametrize("format", WRITABLE)
def test_what_is_written_is_recognised_and_read_back(tmp_path, making, format):
    ours = making.made("jump_relu" if format == "circuit-tracer" else "topk", scale=0.5)
    path = save_dictionary(
        SavedDictionary(dictionary=ours, certificate={"l0": 1.0}), tmp_path / PLACES.get(format, "d"), format
    )
    assert recognise(path).name == format
    found, x = load_dictionary(path), making.noise(9, making.D, scale=4)
    torch.testing.assert_close(found.dictionary(x), ours(x), rtol=1e-5, atol=1e-5)
    assert found.certificate == {"l0": 1.0}
    save_dictionary(found, path, format)  # an older dictionary may be replaced


def test_a_checkpoint_of_dictionary_learning_is_recognised(tmp_path, making):
    torch.save({"bias": torch.zeros(3)}, tmp_path / "ae.pt")
    assert recognise(tmp_path).name == recognise(tmp_path / "ae.pt").name == "dictionary_learning"
    with pytest.raises(InterpError, match="only read here"):
        save_dictionary(SavedDictionary(dictionary=making.made()), tmp_path / "d", "dictionary_learning")


def test_a_folder_of_two_layouts_asks_which(tmp_path, making):
    saved = SavedDictionary(dictionary=making.made())
    save_dictionary(saved, tmp_path / "d", "saelens")
    save_dictionary(saved, tmp_path / "e", "interp")
    for path in (tmp_path / "e").iterdir():
        shutil.copy(path, tmp_path / "d")
    with pytest.raises(ArtefactError, match="interp or saelens; say which"):
        load_dictionary(tmp_path / "d")
    assert load_dictionary(tmp_path / "d", "saelens").about["source"] == "saelens topk"


def test_a_square_file_without_a_name_asks_which(tmp_path):
    eye = {"W_enc": torch.eye(4), "W_dec": torch.eye(4), "b_enc": torch.zeros(4), "b_dec": torch.zeros(4)}
    save_file(eye, tmp_path / "x.safetensors")
    with pytest.raises(ArtefactError, match="circuit-tracer or plain"):
        load_dictionary(tmp_path / "x.safetensors")
    save_file(eye, tmp_path / "layer_3.safetensors")
    assert recognise(tmp_path / "layer_3.safetensors").name == "circuit-tracer"
    assert load_dictionary(tmp_path, hints=Hints(layer=3)).about["layer"] == 3
    tall = eye | {"W_enc": torch.zeros(7, 4), "W_dec": torch.zeros(7, 4), "b_enc": torch.zeros(7)}
    save_file(tall, tmp_path / "x.safetensors")
    assert recognise(tmp_path / "x.safetensors").name == "circuit-tracer"
    save_file(tall | {"W_enc": torch.zeros(4, 7)}, tmp_path / "x.safetensors")
    assert recognise(tmp_path / "x.safetensors").name == "plain"


def test_what_is_no_dictionary_is_refused_with_what_was_found(tmp_path, making):
    with pytest.raises(ArtefactError, match="does not exist"):
        load_dictionary(tmp_path / "none")
    with pytest.raises(ArtefactError, match="holds nothing. Known are interp: .*saelens: .*plain: "):
        load_dictionary(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ArtefactError, match="holds notes.txt"):
        load_dictionary(tmp_path)
    with pytest.raises(ArtefactError, match="one file"):
        load_dictionary(tmp_path / "notes.txt")
    save_file({"weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    with pytest.raises(ArtefactError, match="one file, weight"):
        load_dictionary(tmp_path / "w.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"PK")
    with pytest.raises(ArtefactError, match="damaged"):
        load_dictionary(tmp_path / "b.safetensors")
    with pytest.raises(InterpError, match="nearest: saelens"):
        load_dictionary(tmp_path, "sae_lens")
    run = tmp_path / "run"
    save_dictionary(SavedDictionary(dictionary=making.made()), run / "layers.1", "sparsify")
    with pytest.raises(ArtefactError, match="sparsify run; name one of its coders: layers.1"):
        load_dictionary(run)
    clt = tmp_path / "clt"
    clt.mkdir()
    save_file({"W_enc_0": torch.zeros(3, 2)}, clt / "W_enc_0.safetensors")
    with pytest.raises(ArtefactError, match="cross-layer transcoder"):
        load_dictionary(clt)
    assert set(FORMATS) - set(WRITABLE) == {"dictionary_learning"}


@pytest.mark.parametrize("format", WRITABLE)
def test_writing_again_keeps_the_other_files(tmp_path, making, format):
    ours = making.made("relu")
    if format == "sparsify":
        ours = making.made("topk")
    saved = SavedDictionary(dictionary=ours, about={"site": "resid_post.1"})
    path = save_dictionary(saved, tmp_path / PLACES.get(format, "d"), format)
    if path.is_dir():
        (path / "proof.json").write_text("{}")
    found = load_dictionary(path)
    rewrite(replace(found, certificate={"l0": 2.0}), path, format)
    again, x = load_dictionary(path), making.noise(9, making.D, scale=4)
    assert again.certificate == {"l0": 2.0} and [item.name for item in tmp_path.iterdir()] == [path.name]
    torch.testing.assert_close(again.dictionary(x), ours(x), rtol=1e-5, atol=1e-5)
    assert not path.is_dir() or (path / "proof.json").read_text() == "{}"


@pytest.mark.parametrize("failure", [OSError("no space"), KeyboardInterrupt()])
@pytest.mark.parametrize("format", ["interp", "saelens"])
def test_an_older_dictionary_stays_until_the_new_one_has_its_name(tmp_path, making, monkeypatch, format, failure):
    first, second = (SavedDictionary(dictionary=making.made("topk", scale=scale)) for scale in (1.0, 2.0))
    folder = save_dictionary(first, tmp_path / "d", format)
    x = making.noise(9, making.D)
    before = load_dictionary(folder).dictionary(x)

    def fails(self: Path, target: Path) -> Path:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fails)
        with pytest.raises((ArtefactError, KeyboardInterrupt)):
            save_dictionary(second, folder, format)
    assert torch.equal(load_dictionary(folder).dictionary(x), before)
    assert [item.name for item in tmp_path.iterdir()] == ["d"]
    save_dictionary(second, folder, format)
    torch.testing.assert_close(load_dictionary(folder).dictionary(x), second.dictionary(x))
