"""SAELens and this package compute the same numbers from the same folder, whoever wrote it; bad folders are refused."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp.core.errors import ArtefactError, InterpError
from interp.core.sites import Part, Site
from interp.dictionaries.formats.saelens import (
    SPARSITY,
    WEIGHTS,
    load_saelens,
    read,
    read_density,
    save_saelens,
    write,
)  # fmt: skip
from interp.dictionaries.formats.saelens_config import CONFIG, REFUSED, SAE_ARCHITECTURES, TRANSCODERS
from interp.dictionaries.saved import SavedDictionary

CASES = {
    "standard": ("relu", {}),
    "topk": ("topk", {}),
    "jumprelu": ("jump_relu", {}),
    "gated": ("gated", {}),
    "transcoder": ("relu", {"d_out": 7}),
    "skip_transcoder": ("relu", {"d_out": 7, "skip": True}),
    "jumprelu_transcoder": ("jump_relu", {"d_out": 7}),
    "jumprelu_skip_transcoder": ("jump_relu", {"d_out": 12, "skip": True}),
}
"""Architecture -> (our kind, options)."""


def theirs_from(folder):
    import sae_lens

    return sae_lens.SAE.load_from_disk(folder)


def pairs_for(architecture: str) -> dict:
    def same(tensor):
        return tensor

    names = {name: (name, same) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if architecture == "gated":
        names |= {"b_enc": ("b_gate", same), "activation.r_mag": ("r_mag", same), "activation.b_mag": ("b_mag", same)}
    if "skip" in architecture:
        names["W_skip"] = ("W_skip", lambda tensor: tensor.t())
    return names


@pytest.mark.needs_package("sae_lens")
def test_every_architecture_of_the_installed_sae_lens_is_read_or_refused_by_name():
    import sae_lens
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

    assert sae_lens.__version__
    known = {*SAE_CLASS_REGISTRY, *SAE_TRAINING_CLASS_REGISTRY}
    assert known == {*SAE_ARCHITECTURES, *TRANSCODERS, *REFUSED}


@pytest.mark.needs_package("sae_lens")
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("architecture", CASES)
def test_saelens_reads_what_is_written_here(tmp_path, making, architecture, scale):
    kind, options = CASES[architecture]
    ours, x = making.made(kind, scale=scale, **options), making.noise(23, making.D, scale=4)
    save_saelens(ours, tmp_path / "d", site=Site(Part.RESID_POST, 10), metadata={"model_name": "tiny"})
    theirs = theirs_from(tmp_path / "d")
    assert theirs.cfg.architecture() == architecture
    assert theirs.cfg.metadata.hook_name == "blocks.10.hook_resid_post"
    making.same(ours, theirs, x)
    making.same_gradients(load_saelens(tmp_path / "d"), theirs, x, pairs_for(architecture))


@pytest.mark.needs_package("sae_lens")
@pytest.mark.parametrize("architecture", [*CASES, "abstopk"])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
def test_reading_what_saelens_wrote(tmp_path, making, architecture, norm):
    from sae_lens.registry import get_sae_class

    transcodes = architecture in TRANSCODERS
    model, config = get_sae_class(architecture)
    options = {"d_out": CASES[architecture][1]["d_out"]} if transcodes else {}
    options |= {"k": 5} if "topk" in architecture else {}
    for subtract in (False,) if transcodes else (False, True):
        theirs = model(config(d_in=12, d_sae=30, apply_b_dec_to_input=subtract, normalize_activations=norm, **options))
        with torch.no_grad():
            for index, parameter in enumerate(theirs.parameters()):
                parameter.add_(making.noise(*parameter.shape, seed=index, scale=0.4))
        folder = tmp_path / str(subtract)
        theirs.save_model(folder)
        x = making.noise(23, making.D, scale=4)
        if transcodes and norm != "none":
            with pytest.raises(ArtefactError, match="says nothing about its output"):
                load_saelens(folder)
            continue
        ours = load_saelens(folder)
        if architecture == "abstopk":
            codes = ours.encode(x).dense()
            torch.testing.assert_close(codes[:, :30] - codes[:, 30:], theirs.encode(x).detach(), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(ours(x), theirs(x).detach(), rtol=1e-4, atol=1e-4)
        else:
            making.same(ours, theirs, x, tol=1e-4)
            making.same_gradients(ours, theirs, x, pairs_for(architecture), tol=1e-4)


@pytest.mark.needs_package("sae_lens")
def test_rows_rescaled_by_their_norm(tmp_path, making):
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    x = making.noise(23, making.D, scale=4)
    codes = []
    for rescale in (False, True):
        theirs = TopKSAE(TopKSAEConfig(d_in=12, d_sae=30, k=4, rescale_acts_by_decoder_norm=rescale))
        with torch.no_grad():
            for index, parameter in enumerate(theirs.parameters()):
                parameter.add_(making.noise(*parameter.shape, seed=index))
        theirs.save_model(tmp_path / str(rescale))
        making.same(load_saelens(tmp_path / str(rescale)), theirs, x, tol=1e-4)
        codes.append(theirs.encode(x) != 0)
    assert not torch.equal(*codes)  # the option changes which latents fire, so the comparison could have failed


@pytest.mark.needs_package("sae_lens")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", CASES)
def test_half_precision_files_hold_the_same_weights_and_thresholds(tmp_path, making, architecture, dtype):
    kind, options = CASES[architecture]
    source = making.made(kind, **options)
    save_saelens(source, tmp_path / "full")
    ours = load_saelens(tmp_path / "full")
    rounded = {name: tensor.to(dtype) for name, tensor in load_file(tmp_path / "full" / WEIGHTS).items()}
    (tmp_path / "half").mkdir()
    save_file(rounded, tmp_path / "half" / WEIGHTS)
    config = json.loads((tmp_path / "full" / CONFIG).read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    (tmp_path / "half" / CONFIG).write_text(json.dumps(config))
    half, theirs = load_saelens(tmp_path / "half"), theirs_from(tmp_path / "half")
    assert half.W_dec.dtype == theirs.W_dec.dtype == dtype
    x = making.noise(23, making.D, scale=4).to(dtype).float()
    making.same(half.like().float(), theirs.to(torch.float32), x)  # the same weights, seen in float32
    error = (half(x.to(dtype)).float() - theirs.to(dtype)(x.to(dtype)).float()).norm() / ours(x).norm()
    assert float(error.detach()) < 0.05  # arithmetic in half precision itself: summed in another order
    save_saelens(half, tmp_path / "again")
    again = load_file(tmp_path / "again" / WEIGHTS)
    assert again.keys() == rounded.keys()
    assert all(torch.equal(again[name], rounded[name]) for name in rounded)


def test_folding_half_precision_weights_gives_float32(tmp_path, making):
    dictionary = making.made("topk", scale=0.3).to(torch.bfloat16)
    save_saelens(dictionary, tmp_path / "d")
    x = making.noise(23, making.D, scale=4)
    read_back = load_saelens(tmp_path / "d")
    assert read_back.W_dec.dtype == torch.float32
    torch.testing.assert_close(read_back(x), dictionary.float()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.needs_package("sae_lens")
def test_batch_topk_is_written_as_a_jumprelu_with_its_threshold(tmp_path, making):
    for name, options, architecture in (
        ("a", {"scale": 0.25}, "jumprelu"), ("t", {"d_out": 7}, "jumprelu_transcoder"),
    ):  # fmt: skip
        ours, x = making.made("batch_topk", **options), making.noise(23, making.D, scale=4)
        theirs = theirs_from(save_saelens(ours, tmp_path / name))
        assert theirs.cfg.architecture() == architecture
        assert torch.equal(theirs.threshold, torch.full((making.M,), 0.7))
        making.same(ours, theirs, x)
        assert 0 < float(ours.encode(x).l0().float().mean()) < making.M
    untrained = making.made("batch_topk")
    untrained.activation.threshold.fill_(-1)
    with pytest.raises(InterpError, match="no threshold yet"):
        save_saelens(untrained, tmp_path / "u")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "t"]


def test_multi_and_gradient_topk_are_topk_at_inference(tmp_path, making):
    x = making.noise(9, making.D, scale=4)
    for kind in ("multi_topk", "gradient_topk"):
        ours = making.made(kind)
        torch.testing.assert_close(load_saelens(save_saelens(ours, tmp_path / kind))(x), ours(x))


def test_what_saelens_cannot_express_is_refused(tmp_path, making):
    for dictionary, about, message in (
        (making.made("group_max"), {}, "no group_max architecture"),
        (making.made("top_afa"), {}, "no top_afa architecture"),
        (making.made("topk", d_out=7), {}, "no topk transcoder"),
        (making.made("gated", d_out=7), {}, "no gated transcoder"),
        (making.made("topk"), {"site": "mlp_in.3", "target_site": "mlp_out.3"}, "no topk transcoder"),
        (making.made("relu", skip=True, token_norm="layer_norm"), {}, "does not undo"),
    ):
        with pytest.raises(InterpError, match=message):
            write(SavedDictionary(dictionary=dictionary, about=about), tmp_path / "d")
    assert not any(tmp_path.iterdir())


def test_an_autoencoder_used_as_a_transcoder_moves_its_bias(tmp_path, making):
    ours = making.made("relu")
    about = {"site": "mlp_in.3", "target_site": "mlp_out.3"}
    folder = write(SavedDictionary(dictionary=ours, about=about), tmp_path / "d")
    found = read(folder)
    assert found.about["source"] == "saelens transcoder" and not found.dictionary.subtract_b_dec
    assert (found.about["site"], found.about["target_site"]) == ("mlp_in.3", "mlp_out.3")
    x = making.noise(23, making.D, scale=4)
    torch.testing.assert_close(found.dictionary(x), ours(x), rtol=1e-5, atol=1e-5)


def test_saving_twice_is_byte_identical_and_the_scale_is_applied_once(tmp_path, making):
    for kind in ("topk", "jump_relu", "gated", "relu"):
        sae, x = making.made(kind, scale=0.25), making.noise(23, making.D, scale=4)
        here = tmp_path / kind
        save_saelens(sae, here / "a")
        again = load_saelens(here / "a")
        assert float(again.scale_in) == 1.0
        torch.testing.assert_close(again(x), sae(x), rtol=1e-5, atol=1e-5)
        save_saelens(again, here / "b")
        for name in (CONFIG, WEIGHTS):
            assert (here / "a" / name).read_bytes() == (here / "b" / name).read_bytes()
        save_saelens(again, here / "a")  # replacing an older dictionary is allowed
        assert sorted(p.name for p in here.iterdir()) == ["a", "b"]  # no draft left behind


def test_what_is_known_travels(tmp_path, making):
    about = {"model": "tiny", "weight_hash": "abc", "site": "resid_post.10", "metadata": {"prepend_bos": True}}
    saved = SavedDictionary(dictionary=making.made(), about=about, certificate={"l0": 5.0})
    found = read(write(saved, tmp_path / "d"))
    assert {name: found.about[name] for name in ("model", "weight_hash", "site")} == {
        "model": "tiny", "weight_hash": "abc", "site": "resid_post.10",
    }  # fmt: skip
    assert found.certificate == {"l0": 5.0} and found.about["metadata"]["prepend_bos"] is True


@pytest.mark.needs_package("sae_lens")
def test_density_travels_as_log10_of_the_frequency(tmp_path, making):
    density = torch.tensor([0.0, 0.5, 1e-4] * 10)
    save_saelens(making.made(), tmp_path / "d", density=density)
    stored = load_file(tmp_path / "d" / SPARSITY)["sparsity"]
    torch.testing.assert_close(stored[:3], torch.tensor([-10.0, -0.30103, -4.0]))
    torch.testing.assert_close(read_density(tmp_path / "d"), density, rtol=1e-4, atol=1e-8)
    save_saelens(making.made(), tmp_path / "bare")
    assert read_density(tmp_path / "bare") is None
    theirs_from(tmp_path / "d")


@pytest.mark.needs_package("sae_lens")
def test_expected_average_needs_its_factor_and_is_folded_like_theirs(tmp_path, making):
    save_saelens(making.made(), tmp_path / "d")
    _edit(tmp_path / "d", normalize_activations="expected_average_only_in")
    with pytest.raises(ArtefactError, match="pass input_scale="):
        load_saelens(tmp_path / "d")
    theirs = theirs_from(tmp_path / "d")
    theirs.fold_activation_norm_scaling_factor(0.37)
    making.same(load_saelens(tmp_path / "d", input_scale=0.37), theirs, making.noise(23, making.D, scale=4))
    _edit(tmp_path / "d", normalize_activations="none")
    with pytest.raises(ArtefactError, match="asks for no input scale"):
        load_saelens(tmp_path / "d", input_scale=0.37)


LEGACY = {
    "relu": {"architecture": "standard", "activation_fn_str": "relu", "apply_b_dec_to_input": True},
    "relu-bare": {},
    "topk": {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}, "apply_b_dec_to_input": False},
    "jumprelu": {"architecture": "jumprelu", "normalize_activations": False, "hook_point": "blocks.3.hook_resid_pre"},
}


@pytest.mark.needs_package("sae_lens")
@pytest.mark.parametrize("case", LEGACY)
def test_files_older_than_version_6(tmp_path, making, case):
    kind = {"jumprelu": "jump_relu"}.get(case, case.partition("-")[0])
    save_saelens(making.made(kind), tmp_path / "d")
    facts = {"d_in": 12, "d_sae": 30, "dtype": "torch.float32", "hook_name": "blocks.1.hook_resid_post"}
    if "hook_point" in LEGACY[case]:
        del facts["hook_name"]
    (tmp_path / "d" / CONFIG).write_text(json.dumps(facts | LEGACY[case]))
    theirs = theirs_from(tmp_path / "d")
    found = read(tmp_path / "d")
    assert found.about["site"] == ("resid_pre.3" if case == "jumprelu" else "resid_post.1")
    making.same(found.dictionary, theirs, making.noise(23, making.D, scale=4))


def test_old_options_that_change_the_numbers(tmp_path, making):
    relu = making.made("relu")
    save_saelens(relu, tmp_path / "d")
    old = {"d_in": 12, "d_sae": 30, "dtype": "float32"}
    (tmp_path / "d" / CONFIG).write_text(json.dumps(old | {"activation_fn_str": "tanh-relu"}))
    with pytest.raises(ArtefactError, match="'tanh-relu' is not read here"):
        load_saelens(tmp_path / "d")
    (tmp_path / "d" / CONFIG).write_text(json.dumps(old | {"normalize_activations": True}))
    with pytest.raises(ArtefactError, match="input_scale"):
        load_saelens(tmp_path / "d")
    factor, x = torch.linspace(0.5, 2, 30), making.noise(9, 12, scale=4)
    save_file(load_file(tmp_path / "d" / WEIGHTS) | {"scaling_factor": factor}, tmp_path / "d" / WEIGHTS)
    (tmp_path / "d" / CONFIG).write_text(json.dumps(old))
    with pytest.raises(ArtefactError, match="scaling_factor"):
        load_saelens(tmp_path / "d")
    (tmp_path / "d" / CONFIG).write_text(json.dumps(old | {"finetuning_scaling_factor": True}))
    expected = (relu.encode(x).dense() * factor) @ relu.W_dec + relu.b_dec
    torch.testing.assert_close(load_saelens(tmp_path / "d")(x), expected, rtol=1e-5, atol=1e-5)


def _edit(folder, **changes):
    config = json.loads((folder / CONFIG).read_text())
    for name, value in changes.items():
        if value is None:
            del config[name]
        else:
            config[name] = value
    (folder / CONFIG).write_text(json.dumps(config))


def _tensors(folder, **changes):
    tensors = load_file(folder / WEIGHTS) | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: _edit(f, architecture="jumprelu"), "a jumprelu has .*'threshold'"),
        (lambda f: _edit(f, architecture="matching_pursuit"), "one after the other"),
        (lambda f: _edit(f, architecture="batchtopk"), "training architecture"),
        (lambda f: _edit(f, architecture="novel"), "known are standard, topk"),
        (lambda f: _edit(f, k=None), "lacks k"),
        (lambda f: _edit(f, k=31), "k=31 must lie in 1..d_dict=30"),
        (lambda f: _edit(f, k="4"), "not a positive whole number"),
        (lambda f: _edit(f, d_sae=31), r"\(12, 30\)"),
        (lambda f: _edit(f, normalize_activations="covariance_whitening"), "covariance_whitening"),
        (lambda f: _edit(f, apply_b_dec_to_input="yes"), "neither true nor false"),
        (lambda f: _edit(f, reshape_activations="odd"), "expected 'none' or 'hook_z'"),
        (lambda f: _edit(f, dtype="int8"), "dtype='int8'"),
        (lambda f: _tensors(f, b_enc=None), "holds"),
        (lambda f: _tensors(f, b_enc=torch.full((30,), torch.nan)), "NaN"),
        (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
        (lambda f: (f / CONFIG).unlink(), f"no {CONFIG}"),
        (lambda f: (f / CONFIG).write_text("{"), "damaged"),
        (lambda f: (f / CONFIG).write_text("[]"), "JSON object"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), "damaged"),
        (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-8]), "damaged"),
        (lambda f: (f / WEIGHTS).write_bytes(b"PK\x03\x04"), "damaged"),
    ],
)
def test_bad_folders_are_refused(tmp_path, making, damage, message):
    save_saelens(making.made(), tmp_path / "d")
    damage(tmp_path / "d")
    with pytest.raises(ArtefactError, match=message):
        load_saelens(tmp_path / "d")


def test_foreign_folders_are_not_overwritten(tmp_path, making):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("mine")
    (tmp_path / "d" / CONFIG).write_text("{}")
    with pytest.raises(ArtefactError, match="not a saved dictionary"):
        save_saelens(making.made(), tmp_path / "d")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ArtefactError, match="not a saved dictionary"):
        save_saelens(making.made(), tmp_path / "file")
    with pytest.raises(ArtefactError, match="could not write"):
        save_saelens(making.made(), tmp_path / "file" / "below")
    assert (tmp_path / "d" / "thesis.txt").read_text() == "mine" and (tmp_path / "file").read_text() == "mine"
