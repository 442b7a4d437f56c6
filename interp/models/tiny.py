"""Tiny random language models, built from configs: for tests, examples and timing, with nothing to download.

Weights are drawn large enough (`std` 0.35 instead of 0.02) that every site moves the logits. Text is tokenised byte
by byte: 256 byte tokens and `<bos>`, `<eos>`, `<pad>`, so that any text has known tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from interp.core.errors import InterpError, unknown
from interp.core.seed import torch_generator
from interp.models.experts import fit_dtype
from interp.models.families import families
from interp.models.family import Tiny
from interp.models.model import LoadedModel

SPECIALS = ("<bos>", "<eos>", "<pad>")
D_VOCAB = 256 + len(SPECIALS)


def tiny_model(
    family: str = "llama",
    *,
    seed: int = 0,
    n_layers: int = 3,
    d_model: int = 32,
    n_heads: int = 4,
    n_kv_heads: int | None = 2,
    d_mlp: int = 48,
    n_ctx: int = 256,
    std: float = 0.35,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    overrides: Mapping[str, Any] | None = None,
) -> LoadedModel:
    """A random `llama`, `gemma3`, `gpt2`, ...: see `tiny_names`. Equal arguments give equal weights in any dtype.

    `n_kv_heads`: equal to `n_heads` for full attention, fewer for grouped, 1 for multi-query (GPT-2 has full only).
    `overrides` are config fields that replace the tiny model's own.
    """
    import transformers

    tinies = _tinies()
    if family not in tinies:
        raise unknown("tiny model", f"tiny-{family}", [f"tiny-{name}" for name in tinies])
    n_kv = n_heads if n_kv_heads is None else n_kv_heads
    if d_model % n_heads or n_heads % n_kv:
        raise InterpError(f"d_model={d_model}, n_heads={n_heads}, n_kv_heads={n_kv}: each must divide the one before")
    sizes = {
        "n_layers": n_layers, "d_model": d_model, "n_heads": n_heads, "n_kv_heads": n_kv, "d_mlp": d_mlp,
        "d_head": d_model // n_heads, "n_ctx": n_ctx, "d_vocab": D_VOCAB,
    }  # fmt: skip
    tiny, takes = tinies[family]
    bos, eos, pad = range(256, D_VOCAB)
    specials = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad} if takes == "tokens" else {}
    fields = {**specials, **tiny.fields(sizes), **(overrides or {})}
    with torch.random.fork_rng(devices=[]):  # step sizes and decays start from random numbers, which are kept
        torch.set_rng_state(torch_generator(seed, "build").get_state())
        module: nn.Module = getattr(transformers, tiny.model)(getattr(transformers, tiny.config)(**fields))
    _fill(module, seed, std)
    module.to(device=device, dtype=dtype).eval()
    fit_dtype(module, dtype)
    tokenizer = byte_tokenizer() if takes == "tokens" else None
    return LoadedModel(module=module, tokenizer=tokenizer, source=f"tiny-{family}")


def tiny_names() -> list[str]:
    """Every tiny model there is, without its `tiny-`."""
    return list(_tinies())


def _tinies() -> dict[str, tuple[Tiny, str]]:
    """Each with what its family takes: tokens or pixels."""
    return {name: (tiny, family.inputs) for family in families().values() for name, tiny in family.tiny.items()}


def byte_tokenizer() -> Any:
    """One token per UTF-8 byte, ids 0 to 255, then the specials. Adds nothing by itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = _byte_letters()
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens(list(SPECIALS))
    bos, eos, pad = SPECIALS
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)


def _byte_letters() -> list[str]:
    """The printable letter that byte-level tokenizers write for each byte (GPT-2's table)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in plain}
    for shift, byte in enumerate(byte for byte in range(256) if byte not in letters):
        letters[byte] = chr(256 + shift)
    return [letters[byte] for byte in range(256)]


def _fill(module: nn.Module, seed: int, std: float) -> None:
    """Draw each weight in float32 from a generator of its own, named after it: adding one does not move the others."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=torch_generator(seed, name))
            if parameter.ndim > 1:
                parameter.copy_(noise * std)
            else:  # norms and biases: near what they start from, but not trivial
                parameter.add_(noise * 0.1)
