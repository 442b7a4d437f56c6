"""A conversion is proven before it gets its name; what cannot be expressed is refused with the reason."""

from __future__ import annotations

import json
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from interp.core.errors import ArtefactError, InterpError
from interp.dictionaries.formats import convert as module
from interp.dictionaries.formats.convert import convert, proof_path
from interp.dictionaries.formats.plain import Hints
from interp.dictionaries.formats.proof import compare, random_inputs
from interp.dictionaries.formats.saelens import SPARSITY, read_density, save_saelens
from interp.dictionaries.formats.table import WRITABLE, load_dictionary, save_dictionary
from interp.dictionaries.saved import SavedDictionary

PLACES = {"circuit-tracer": "layer_2.safetensors", "plain": "d.safetensors"}


PAIRS = [pair for pair in product(WRITABLE, WRITABLE) if set(pair) != {"sparsify", "circuit-tracer"}]
"""All but two that have no kind of dictionary in common."""


@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_between_all_formats(tmp_path, making, source, target):
    kind, options = "relu", {"d_out": 12}
    if "sparsify" in (source, target):
        kind, options = "topk", {}
    ours = making.made(kind, scale=0.5, **options)
    about = {"model": "tiny", "weight_hash": "abc", "site": "mlp_in.2", "target_site": "mlp_out.2"}
    about = about if kind == "relu" else {"model": "tiny", "weight_hash": "abc", "site": "resid_post.2"}
    saved = SavedDictionary(dictionary=ours, about=about, certificate={"l0": 3.0})
    start = save_dictionary(saved, tmp_path / "from" / PLACES.get(source, "d"), source)
    place = tmp_path / "to" / PLACES.get(target, "d")
    proof = convert(start, place, target, real=making.noise(40, making.D, scale=4), peers=False)
    assert proof["equal"] and set(proof["comparisons"]) == {
        "there, random", "and back, random", "there, real", "and back, real",
    }  # fmt: skip
    assert json.loads(proof_path(place).read_text()) == proof
    found = load_dictionary(place)
    assert {name: found.about[name] for name in about} == about and found.certificate == {"l0": 3.0}
    x = making.noise(9, making.D, scale=4)
    torch.testing.assert_close(found.dictionary(x), ours(x), rtol=1e-5, atol=1e-5)
    expected = {place.name, proof_path(place).name} if place.is_file() else {place.name}
    assert {path.name for path in place.parent.iterdir()} == expected
    convert(start, place, target, peers=False)  # an older result is replaced


@pytest.mark.needs_package("sae_lens", "sparsify", "circuit_tracer")
@pytest.mark.parametrize(
    ("kind", "options", "target"),
    [
        ("topk", {}, "saelens"), ("gated", {}, "saelens"), ("batch_topk", {}, "saelens"),
        ("jump_relu", {"d_out": 12, "skip": True}, "saelens"), ("topk", {"d_out": 12, "skip": True}, "sparsify"),
        ("group_max", {}, "sparsify"), ("jump_relu", {"d_out": 12}, "circuit-tracer"), ("relu", {}, "circuit-tracer"),
    ],
)  # fmt: skip
def test_the_library_that_owns_the_format_judges(tmp_path, making, kind, options, target):
    start = save_dictionary(SavedDictionary(dictionary=making.made(kind, scale=0.5, **options)), tmp_path / "from")
    proof = convert(start, tmp_path / PLACES.get(target, "d"), target, real=making.noise(40, making.D, scale=4))
    judged = [row for name, row in proof["comparisons"].items() if name.startswith("read by its library")]
    assert len(judged) == 2 and all(row["equal"] for row in judged)
    assert proof["judged_by"].split()[0] in ("sae-lens", "eai-sparsify", "circuit-tracer")


@pytest.mark.parametrize(
    ("kind", "options", "target", "message"),
    [
        ("group_max", {}, "saelens", "no group_max architecture"),
        ("topk", {"d_out": 7}, "saelens", "no topk transcoder"),
        ("relu", {}, "sparsify", "no relu"),
        ("topk", {}, "circuit-tracer", "would be run as a relu"),
        ("relu", {"d_out": 7}, "circuit-tracer", "one width"),
        ("relu", {}, "dictionary_learning", "only read here"),
    ],
)
def test_what_the_target_cannot_express_is_refused_with_the_reason(tmp_path, making, kind, options, target, message):
    start = save_dictionary(SavedDictionary(dictionary=making.made(kind, **options)), tmp_path / "from")
    with pytest.raises(InterpError, match=message):
        convert(start, tmp_path / PLACES.get(target, "d"), target)
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_an_unequal_conversion_leaves_nothing_behind(tmp_path, making, monkeypatch):
    start = save_dictionary(SavedDictionary(dictionary=making.made()), tmp_path / "from")
    real_write = module._write

    def forgets_a_bias(before, draft, chosen, source, origin):
        path = real_write(before, draft, chosen, source, origin)
        weights = path / "sae_weights.safetensors"
        tensors = load_file(weights)
        save_file(tensors | {"b_dec": tensors["b_dec"] * 1.001}, weights)
        return path

    monkeypatch.setattr(module, "_write", forgets_a_bias)
    with pytest.raises(ArtefactError, match="to saelens is not equal: there, random: error"):
        convert(start, tmp_path / "to", "saelens", peers=False)
    assert [path.name for path in tmp_path.iterdir()] == ["from"]


def test_places_are_checked_before_the_work(tmp_path, making):
    start = save_dictionary(SavedDictionary(dictionary=making.made()), tmp_path / "from")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for place, format, message in (
        (start, "saelens", "is the source"),
        (tmp_path / "mine", "saelens", "is no saelens dictionary"),
        (tmp_path / "d", "plain", "should end in .safetensors"),
        (tmp_path / "d", "novel", "unknown format"),
    ):
        with pytest.raises(InterpError, match=message):
            convert(start, place, format)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x"


def test_densities_and_hints_travel(tmp_path, making):
    density = torch.linspace(0, 1, 30)
    save_saelens(making.made("relu"), tmp_path / "a", density=density)
    convert(tmp_path / "a", tmp_path / "b", "saelens", peers=False)
    assert (tmp_path / "b" / SPARSITY).is_file()
    torch.testing.assert_close(read_density(tmp_path / "b"), density, rtol=1e-4, atol=1e-8)
    ours = making.made("topk")
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    save_file({name: getattr(ours, name).detach().contiguous() for name in names}, tmp_path / "bare.safetensors")
    hints = Hints(k=making.K, subtract_b_dec=True)
    assert convert(tmp_path / "bare.safetensors", tmp_path / "c", "sparsify", hints=hints, peers=False)["equal"]


def test_half_precision_stays_exact(tmp_path, making):
    for kind in ("topk", "jump_relu"):
        dictionary = making.made(kind)
        if kind == "jump_relu":
            kept = dictionary.activation.threshold.bfloat16()
        dictionary = dictionary.to(torch.bfloat16)
        if kind == "jump_relu":
            dictionary.activation.log_threshold.data = kept.double().log()
        start = save_dictionary(SavedDictionary(dictionary=dictionary), tmp_path / kind)
        proof = convert(start, tmp_path / f"{kind}-to", "saelens", peers=False)
        assert all(row["error"] == 0 and row["switched"] == 0 for row in proof["comparisons"].values())


def test_a_comparison_sees_each_kind_of_difference(making):
    ours = making.made("topk")
    x = random_inputs(ours)
    assert compare(ours, ours.like(), x).equal
    for name, change in (("W_enc", 1e-3), ("b_enc", 1e-2), ("W_dec", 1e-4), ("b_dec", 1e-3)):
        other = ours.like()
        getattr(other, name).data.mul_(1 + change * torch.linspace(0, 1, getattr(other, name).shape[-1]))
        assert not compare(ours, other, x).equal, name
    shifted = ours.like()
    shifted.activation.k += 1
    assert compare(ours, shifted, x).switched > 0.5
    silent = making.made("relu")
    silent.b_enc.fill_(-1e6)
    found = compare(silent, silent.like(), torch.zeros(5, making.D))
    assert found.error == 0 and not found.equal  # nothing fired, so nothing was shown


@pytest.mark.parametrize("kind", ["relu", "topk", "batch_topk", "jump_relu", "gated"])
def test_random_inputs_make_some_latents_fire_and_not_all(making, kind):
    ours = making.made(kind, scale=0.01)
    l0 = ours.encode(random_inputs(ours).float()).l0().float()
    assert 0 < float(l0.mean()) < making.M


@pytest.mark.parametrize("target", ["saelens", "sparsify", "plain", "interp"])
def test_a_crosscoder_of_several_sites_is_converted_and_keeps_their_names(tmp_path, making, target):
    """`site` is a list there: no library has a hook name for it."""
    ours = making.made("topk", subtract_b_dec=False)
    about = {"model": "tiny", "weight_hash": "abc", "site": ["resid_post.0", "resid_post.1"]}
    start = save_dictionary(SavedDictionary(dictionary=ours, about=about), tmp_path / "from")
    place = tmp_path / "to" / PLACES.get(target, "d")
    assert convert(start, place, target, peers=False)["equal"]
    assert load_dictionary(place).about["site"] == about["site"]


@pytest.mark.needs_package("sparsify")
def test_the_peer_does_not_print_our_certificate(tmp_path, making, caplog):
    about = {"model": "tiny", "weight_hash": "abc", "site": "resid_post.2"}
    saved = SavedDictionary(dictionary=making.made("topk"), about=about, certificate={"l0": 3.0})
    start = save_dictionary(saved, tmp_path / "from")
    assert convert(start, tmp_path / "to", "sparsify")["judged_by"] is not None
    assert "Dropping" not in caplog.text
