"""`interp sae convert` and `interp sae health` on tiny models: what they say, write and refuse."""

from __future__ import annotations

import json

import pytest
import torch
import typer
from safetensors.torch import save_file
from typer.testing import CliRunner

from interp.cli.sae_convert import convert
from interp.cli.sae_health import health
from interp.core.errors import InterpError
from interp.dictionaries.activations.topk import TopK
from interp.dictionaries.baselines import fit_pca
from interp.dictionaries.dictionary import SparseDictionary
from interp.dictionaries.formats.table import load_dictionary
from interp.dictionaries.health_sample import HealthText, place_of, read_text, sample
from interp.dictionaries.saved import SavedDictionary, load, save
from interp.models.tiny import tiny_model

SITE = "resid_post.1"


@pytest.fixture
def call():
    app = typer.Typer()
    app.command("convert")(convert)
    app.command("health")(health)

    def run(*arguments):
        return CliRunner().invoke(app, [str(item) for item in arguments], catch_exceptions=False)

    return run


@pytest.fixture(scope="module")
def principal():
    """Signed principal directions as a top-k dictionary: healthy without training."""
    model = tiny_model("llama")
    place = place_of(model, SITE, None)
    x = sample(model, read_text(model, HealthText()), [place], 10.0)[place].x
    pca = fit_pca(x, 32)
    directions = torch.cat([pca.features, -pca.features])
    made = SparseDictionary(32, 64, TopK(12))
    with torch.no_grad():
        made.W_dec.copy_(directions)
        made.W_enc.copy_(directions.t())
        made.b_dec.copy_(x.mean(0))
    return SavedDictionary(dictionary=made.requires_grad_(False), about={"model": "tiny-llama", "site": SITE})


def test_convert_prints_and_stores_the_proof(call, tmp_path, principal):
    path = save(principal, tmp_path / "own")
    done = call("convert", path, tmp_path / "theirs", "--format", "saelens", "--model", "tiny-llama", "--no-peers")
    assert done.exit_code == 0 and "and back, real" in done.stdout and "proof.json" in done.stdout
    proof = json.loads((tmp_path / "theirs" / "proof.json").read_text())
    assert proof["equal"] and proof["comparisons"]["there, real"]["n_tokens"] > 1000
    done = call("convert", tmp_path / "theirs", tmp_path / "d.safetensors", "-f", "plain", "--no-peers", "--json")
    answer = json.loads(done.stdout)
    assert answer["equal"] and answer["proof_path"].endswith("d.proof.json") and (tmp_path / "d.proof.json").is_file()
    assert load_dictionary(tmp_path / "d.safetensors").about["site"] == SITE


def test_convert_refuses_what_cannot_be_and_asks_for_what_is_open(call, tmp_path, principal):
    path = save(principal, tmp_path / "own")
    for arguments, message in (
        ((path, tmp_path / "layer_0.safetensors", "-f", "circuit-tracer"), "would be run as a relu"),
        ((path, tmp_path / "d", "-f", "novel"), "unknown format"),
        ((path, tmp_path / "d", "-f", "saelens", "-m", "tiny-llama", "--site", "neurons.1"), "48 wide"),
        ((path, tmp_path / "d", "-f", "saelens", "--turned", "left"), "unknown --turned"),
        ((path, tmp_path / "d", "-f", "saelens", "--input-scale", "0"), "must be positive"),
    ):
        with pytest.raises(InterpError, match=message):
            call("convert", *arguments)
    own = principal.dictionary
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    save_file({name: getattr(own, name).contiguous() for name in names}, tmp_path / "bare.safetensors")
    with pytest.raises(InterpError, match="pass activation="):
        call("convert", tmp_path / "bare.safetensors", tmp_path / "d", "-f", "saelens")
    done = call("convert", tmp_path / "bare.safetensors", tmp_path / "d", "-f", "sparsify", "--no-peers",
                "--activation", "topk", "--k", "12", "--subtract-b-dec")  # fmt: skip
    assert done.exit_code == 0 and load_dictionary(tmp_path / "d").dictionary.activation.k == 12


def test_health_says_what_is_wrong_and_certifies_what_is_right(call, tmp_path, principal):
    path = save(principal, tmp_path / "own")
    done = call("health", path)
    assert done.exit_code == 0 and "nothing speaks against using it" in done.stdout and "no-certificate" in done.stdout
    assert load(path).certificate is None
    done = call("health", path, "--certify", "--n-sequences", 8)
    assert done.exit_code == 0 and "certificate was saved" in done.stdout
    assert load(path).certificate["text"]["n_sequences"] == 8
    done = call("health", path, "--json")
    answer = json.loads(done.stdout)
    assert answer["healthy"] and answer["findings"] == [] and answer["measured"]["l0"] <= 12
    done = call("health", path, "--site", "resid_post.2", "--json")
    answer = json.loads(done.stdout)
    assert done.exit_code == 1 and not answer["healthy"]
    assert {"wrong-layer", "wrong-site"} <= {finding["code"] for finding in answer["findings"]}
    done = call("health", path, "--model", "tiny-gpt2")
    assert done.exit_code == 1 and "wrong-model" in done.stdout and "do not use it as it is" in done.stdout


def test_health_asks_for_a_model_and_a_site(call, tmp_path, principal):
    path = save(SavedDictionary(dictionary=principal.dictionary), tmp_path / "own")
    with pytest.raises(InterpError, match="pass --model"):
        call("health", path)
    with pytest.raises(InterpError, match="pass site="):
        call("health", path, "--model", "tiny-llama")
    assert call("health", path, "--model", "tiny-llama", "--site", SITE).exit_code == 0
