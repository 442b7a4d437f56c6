"""Models with tokenizers of several kinds around one tiny network: aligning prompts asks nothing of the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from interp.models.load import load
from interp.models.model import LoadedModel
from interp.models.tiny import tiny_model
from interp.tasks import agreement, colored_objects, docstring, facts, greater_than, ioi, pronoun

REAL = {"smollm2": "smollm2-135m", "gemma": "gemma3-270m"}
LEFT_OUT = 9
"""Every so many words are kept from the trained tokenizers, which then split them."""


def strings(value: object) -> Iterator[str]:
    """Every text in a constant."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings(tuple(value.items()))
    elif isinstance(value, tuple):
        for item in value:
            yield from strings(item)


@cache
def trained(digits: str) -> Any:
    """A byte-level BPE in the manner of GPT-2, trained on the tasks' words; `digits`: how numbers are cut."""
    modules = (agreement, colored_objects, docstring, facts, greater_than, ioi, pronoun)
    constants = [value for module in modules for name, value in vars(module).items() if name.isupper()]
    words = [word for value in constants for text in strings(value) for word in text.replace("{", " ").split()]
    kept = [word for i, word in enumerate(dict.fromkeys(words)) if i % LEFT_OUT]
    kept += [word.capitalize() for word in kept] + [agreement.in_number(word, plural=True) for word in kept]
    numbers = [f"{i:0{width}d}" for width in (1, 2, 3) for i in range(10**width)]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(digits), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=30_000, min_frequency=1, special_tokens=["<|end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    texts = [f"the {w} {w} isn't :param" for w in [*kept, *numbers, " is are was were has have he she"]]
    texts += [f"year 17{i:02d}" for i in range(100)]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


@cache
def tokenizer(name: str) -> Any:
    if name in REAL:
        return load(REAL[name], check=False).tokenizer
    return trained({"bpe": r" ?\d{2}", "threes": r"\d{1,3}"}[name])


@pytest.fixture(scope="session")
def reader() -> Callable[[str], LoadedModel]:
    """A tiny network with the named tokenizer: bytes, bpe (years as two and two), threes, smollm2, gemma."""

    @cache
    def make(name: str) -> LoadedModel:
        tiny = tiny_model("llama", n_layers=1, d_model=8, n_heads=1, n_kv_heads=1, d_mlp=8)
        return tiny if name == "bytes" else LoadedModel(module=tiny.module, tokenizer=tokenizer(name), source=name)

    return make
