"""Every class of dictionary_learning is read as it computes; a pickle that wants more than tensors is refused."""

from __future__ import annotations

import json
import os

import pytest
import torch

from interp.core.errors import ArtefactError
from interp.dictionaries.formats.dictionary_learning import TENSORS, read

LINEAR = {
    "W_enc": ("encoder.weight", lambda tensor: tensor.t()), "b_enc": ("encoder.bias", lambda tensor: tensor),
    "W_dec": ("decoder.weight", lambda tensor: tensor.t()),
}  # fmt: skip
PLAIN = {name: (name, lambda tensor: tensor) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
PAIRS = {
    "AutoEncoder": LINEAR | {"b_dec": ("bias", lambda tensor: tensor)},
    "AutoEncoderNew": LINEAR | {"b_dec": ("decoder.bias", lambda tensor: tensor)},
    "AutoEncoderTopK": LINEAR | {"b_dec": ("b_dec", lambda tensor: tensor)},
    "BatchTopKSAE": LINEAR | {"b_dec": ("b_dec", lambda tensor: tensor)},
    "GatedAutoEncoder": LINEAR | {
        "b_enc": ("gate_bias", lambda tensor: tensor), "b_dec": ("decoder_bias", lambda tensor: tensor),
        "activation.r_mag": ("r_mag", lambda tensor: tensor), "activation.b_mag": ("mag_bias", lambda tensor: tensor),
    },
    "JumpReluAutoEncoder": PLAIN,
    "MatryoshkaBatchTopKSAE": PLAIN,
}  # fmt: skip


def theirs_of(name, making):
    from dictionary_learning import dictionary
    from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

    modules = {
        "AutoEncoderTopK": top_k, "BatchTopKSAE": batch_top_k, "MatryoshkaBatchTopKSAE": matryoshka_batch_top_k,
    }  # fmt: skip
    options = {"k": 5} if name in modules else {}
    options |= {"group_sizes": [10, 20]} if "Matryoshka" in name else {}
    made = getattr(modules.get(name, dictionary), name)(12, 30, **options)
    with torch.no_grad():
        for index, (parameter_name, parameter) in enumerate(made.named_parameters()):
            parameter.add_(making.noise(*parameter.shape, seed=index, scale=0.5))
            if parameter_name == "threshold":
                parameter.abs_().add_(0.2)
    if name in modules:
        made.threshold.fill_(0.6)
    return made


def saved(theirs, folder, name=None):
    folder.mkdir()
    torch.save(theirs.state_dict(), folder / "ae.pt")
    if name:
        trainer = {"dict_class": name, "lm_name": "tiny", "layer": 3, "submodule_name": "resid_post_layer_3"}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    return folder


@pytest.mark.needs_package("dictionary_learning")
@pytest.mark.parametrize("name", TENSORS)
def test_every_class_is_read_as_it_computes(tmp_path, making, name):
    theirs, x = theirs_of(name, making), making.noise(23, making.D, scale=4)
    found = read(saved(theirs, tmp_path / "d", name))
    assert found.about["source"].endswith(name) and found.about["model"] == "tiny"
    making.same(found.dictionary, theirs, x)
    making.same_gradients(found.dictionary, theirs, x, PAIRS[name])
    assert 0 < float(found.dictionary.encode(x).l0().float().mean()) < making.M


@pytest.mark.needs_package("dictionary_learning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path, making, dtype):
    for name in ("AutoEncoderTopK", "JumpReluAutoEncoder", "BatchTopKSAE"):
        theirs = theirs_of(name, making).to(dtype)
        found = read(saved(theirs, tmp_path / name, name))
        assert found.dictionary.W_dec.dtype == dtype
        x = making.noise(23, making.D, scale=4).to(dtype).float()
        making.same(found.dictionary.float(), theirs.float(), x)


@pytest.mark.needs_package("dictionary_learning")
def test_unit_rows_are_what_their_loader_gives(tmp_path, making):
    theirs, x = theirs_of("AutoEncoder", making), making.noise(23, making.D, scale=4)
    found = read(saved(theirs, tmp_path / "d", "AutoEncoder")).dictionary
    theirs.normalize_decoder()
    making.same(found.unit_rows(), theirs, x)


@pytest.mark.needs_package("dictionary_learning")
def test_a_file_alone_is_recognised_by_its_names_or_asks(tmp_path, making):
    for name in TENSORS:
        folder = saved(theirs_of(name, making), tmp_path / name)
        if name in ("AutoEncoderTopK", "BatchTopKSAE"):
            with pytest.raises(ArtefactError, match="AutoEncoderTopK or BatchTopKSAE; pass kind="):
                read(folder / "ae.pt")
            assert read(folder / "ae.pt", kind=name).about["source"].endswith(name)
        else:
            assert read(folder / "ae.pt").about["source"].endswith(name)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch /tmp/should-not-exist",)


def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path):
    torch.save({"encoder.weight": torch.zeros(3, 2), "x": Malicious()}, tmp_path / "ae.pt")
    with pytest.raises(ArtefactError, match="would have to run code; it is not read"):
        read(tmp_path)
    assert not os.path.exists("/tmp/should-not-exist")


@pytest.mark.needs_package("dictionary_learning")
def test_bad_files_are_refused(tmp_path, making):
    def state(name, **changes):
        (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": name}}))
        found = theirs_of(name, making).state_dict() | changes
        torch.save({key: value for key, value in found.items() if value is not None}, tmp_path / "ae.pt")

    for name, changes, message in (
        ("AutoEncoder", {"bias": None}, "a AutoEncoder has"),
        ("AutoEncoder", {"decoder.weight": torch.zeros(30, 12)}, r"\(30, 12\)"),
        ("AutoEncoderTopK", {"k": torch.tensor(31)}, "k=31 must lie"),
        ("BatchTopKSAE", {"threshold": torch.tensor(-1.0)}, "never set in training"),
        ("AutoEncoder", {"bias": torch.full((12,), torch.nan)}, "NaN"),
    ):
        state(name, **changes)
        with pytest.raises(ArtefactError, match=message):
            read(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"trainer": {"dict_class": "IdentityDict"}}))
    with pytest.raises(ArtefactError, match="'IdentityDict' is not read here"):
        read(tmp_path)
    for content in (b"", b"PK\x03\x04", b"garbage"):
        (tmp_path / "ae.pt").write_bytes(content)
        with pytest.raises(ArtefactError, match="damaged"):
            read(tmp_path)
    torch.save([1, 2], tmp_path / "ae.pt")
    with pytest.raises(ArtefactError, match="state dict"):
        read(tmp_path)
    (tmp_path / "ae.pt").unlink()
    with pytest.raises(ArtefactError, match="no ae.pt"):
        read(tmp_path)
