"""SAELens reads what is written here and computes the same numbers; bad folders are refused by name."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp.core.errors import ArtefactError
from interp.core.sites import Part, Site
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.formats.saelens import CONFIG, WEIGHTS, load_saelens, save_saelens


def filled(k: int = 4) -> SparseDictionary:
    sae = SparseDictionary.random(12, 30, TopK(k), seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
        sae.scale_in.fill_(0.25)
        sae.scale_out.fill_(0.25)
    return sae


def inputs() -> torch.Tensor:
    return 4 * torch.randn(23, 12, generator=torch.Generator().manual_seed(2))


@pytest.mark.needs_package("sae_lens")
@pytest.mark.parametrize("k", [1, 4, 30])
def test_saelens_computes_the_same_latents_reconstructions_and_gradients(tmp_path, k):
    import sae_lens

    sae, x = filled(k), inputs()
    save_saelens(sae, tmp_path / "d", site=Site(Part.RESID_POST, 10), metadata={"model_name": "tiny"})
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "d")
    assert type(theirs).__name__ == "TopKSAE" and theirs.cfg.k == k
    assert theirs.cfg.metadata.hook_name == "blocks.10.hook_resid_post"
    torch.testing.assert_close(theirs.encode(x), sae.encode(x).dense(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-5)
    ours = load_saelens(tmp_path / "d").requires_grad_(True)
    (x - ours(x)).square().sum().backward()
    theirs.requires_grad_(True)
    (x - theirs(x)).square().sum().backward()
    for name in ("W_enc", "b_enc", "W_dec", "b_dec"):
        torch.testing.assert_close(getattr(ours, name).grad, getattr(theirs, name).grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.needs_package("sae_lens")
def test_reading_what_saelens_wrote_with_rescaled_rows(tmp_path):
    from sae_lens.saes.topk_sae import TopKSAE as Theirs
    from sae_lens.saes.topk_sae import TopKSAEConfig

    for rescale in (False, True):
        theirs = Theirs(TopKSAEConfig(d_in=12, d_sae=30, k=4, rescale_acts_by_decoder_norm=rescale))
        with torch.no_grad():
            for index, parameter in enumerate(theirs.parameters()):
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index)))
        theirs.save_model(tmp_path / str(rescale))
        ours, x = load_saelens(tmp_path / str(rescale)), inputs()
        torch.testing.assert_close(ours.encode(x).dense(), theirs.encode(x).detach(), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours(x), theirs(x).detach(), rtol=1e-4, atol=1e-4)


def test_saving_twice_is_byte_identical_and_the_scale_is_applied_once(tmp_path):
    sae, x = filled(), inputs()
    save_saelens(sae, tmp_path / "a")
    again = load_saelens(tmp_path / "a")
    assert float(again.scale_in) == 1.0
    torch.testing.assert_close(again(x), sae(x), rtol=1e-5, atol=1e-5)
    save_saelens(again, tmp_path / "b")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    save_saelens(again, tmp_path / "a")  # replacing an older dictionary is allowed
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]  # no draft left behind


def _edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    for name, value in changes.items():
        if value is None:
            del config[name]
        else:
            config[name] = value
    (folder / CONFIG).write_text(json.dumps(config))


def _without(folder, name):
    tensors = load_file(folder / WEIGHTS)
    del tensors[name]
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _edit(f, architecture="jumprelu"), "'jumprelu' is not read here; only 'topk'"),
        (lambda f: _edit(f, k=None), "lacks k"),
        (lambda f: _edit(f, k=31), "k=31 must lie in 1..d_dict=30"),
        (lambda f: _edit(f, k="4"), "not a positive whole number"),
        (lambda f: _edit(f, d_sae=31), r"\(12, 30\)"),
        (lambda f: _edit(f, normalize_activations="layer_norm"), "layer_norm"),
        (lambda f: _edit(f, apply_b_dec_to_input=False), "apply_b_dec_to_input=False"),
        (lambda f: _without(f, "b_enc"), "holds"),
        (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
        (lambda f: (f / CONFIG).unlink(), f"no {CONFIG}"),
        (lambda f: (f / CONFIG).write_text("{"), "damaged"),
        (lambda f: (f / CONFIG).write_text("[]"), "JSON object"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), "damaged"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]), "damaged"),
        (lambda f: (f / WEIGHTS).write_bytes(b"PK\x03\x04"), "damaged"),
    ],
)
def test_bad_folders_are_refused(tmp_path, damage, message):
    save_saelens(filled(), tmp_path / "d")
    damage(tmp_path / "d")
    with pytest.raises(ArtefactError, match=message):
        load_saelens(tmp_path / "d")


def test_foreign_folders_are_not_overwritten(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtefactError, match="not a saved dictionary"):
        save_saelens(filled(), tmp_path / "d")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtefactError, match="not a saved dictionary"):
        save_saelens(filled(), tmp_path / "file")
    with pytest.raises(ArtefactError, match="could not write"):
        save_saelens(filled(), tmp_path / "file" / "below")
    assert (tmp_path / "d" / "thesis.txt").read_text() == "mine" and (tmp_path / "file").read_text() == "mine"
