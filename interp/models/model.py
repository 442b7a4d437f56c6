"""`LoadedModel`: an untouched `nn.Module` with its tokenizer, its family table and its hook hub."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from interp.core.errors import InterpError
from interp.core.hash import hash_json, hash_tensors
from interp.core.manifest import ModelRecord
from interp.core.sites import Site
from interp.models.families import bind
from interp.models.family import Dims
from interp.models.hub import HookHub, StopForward
from interp.models.table import FamilyTable


@runtime_checkable
class Tokens(Protocol):
    """What a token record looks like from below."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor: ...


class Stopped:
    """Stands where the logits would be when a capture ended the forward early."""

    def __getattr__(self, name: str) -> Any:
        raise InterpError(
            f"there are no logits to take {name!r} from: the forward stopped after the last captured site; "
            "pass capture(..., stop=False) to run it to the end"
        )

    def __getitem__(self, index: Any) -> Any:
        return self.__getattr__(f"[{index!r}]")

    def __repr__(self) -> str:
        return "Stopped(the forward ended after the last captured site; capture(..., stop=False) gives logits)"


class LoadedModel:
    """A model ready for instrumentation. Calling it gives logits, without gradients unless a capture wants them."""

    def __init__(
        self,
        module: nn.Module,
        tokenizer: Any = None,
        source: str | None = None,
        weight_hash: str | Callable[[], str] | None = None,
        table: FamilyTable | None = None,
    ) -> None:
        self.module = module
        self.tokenizer = tokenizer
        self.source = source or type(module).__name__
        self.table = table or bind(module)
        self.hub = HookHub(module, self.table)
        self.wants_grad = 0
        """Open captures that want gradients."""
        self._weight_hash = weight_hash
        self._hashed = _state(module) if weight_hash is not None else None
        """State of the weights that the hash belongs to."""

    @property
    def dims(self) -> Dims:
        return self.table.dims

    @property
    def n_layers(self) -> int:
        """Number of blocks; an error for a network without known blocks."""
        if self.dims.n_layers is None:
            raise InterpError(f"{self.source} has no table of blocks; use module paths (interp sites {self.source})")
        return self.dims.n_layers

    @property
    def layers(self) -> list[nn.Module]:
        """The blocks, in order."""
        if self.table.family is None:
            raise InterpError(f"{self.source} has no table of blocks; use module paths (interp sites {self.source})")
        return list(self.module.get_submodule(self.table.family.blocks).children())

    @property
    def device(self) -> torch.device:
        """Where inputs go: the device of the first parameter, or the one accelerate brings offloaded weights to."""
        own = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        hook = getattr(self.module, "_hf_hook", None)
        return torch.device(getattr(hook, "execution_device", None) or "cpu") if own.type == "meta" else own

    @property
    def dtype(self) -> torch.dtype:
        return next((p.dtype for p in self.module.parameters()), torch.float32)

    @property
    def weight_hash(self) -> str:
        """Content hash of the weights; computed when first asked for, and again after they were written to.

        Trap: what is written through `parameter.data` is not noticed.
        """
        now = _state(self.module)
        if now != self._hashed:
            self._weight_hash, self._hashed = None, now
        if not isinstance(self._weight_hash, str):
            make = self._weight_hash or (lambda: hash_tensors(self.module.state_dict()))
            self._weight_hash = make()
        return self._weight_hash

    @property
    def config_hash(self) -> str:
        """Hash of what the weights do not say: the configuration, or the modules' own descriptions without one."""
        config = getattr(self.module, "config", None)
        if self.is_transformers and config is not None:
            return hash_json(_meaning(config.to_dict()))
        return hash_json(re.sub(r" at 0x[0-9a-f]+", "", repr(self.module)))

    def sites(self, pattern: str = "*") -> list[Site]:
        """Every site the pattern stands for, in the order in which the model computes them."""
        return list(self.table.sites) if pattern == "*" else self.table.resolve(pattern)

    def resolve(self, wanted: str | Site | Iterable[str | Site]) -> list[Site]:
        """Sites from names, aliases, module paths and patterns. Raises SiteError with the nearest names."""
        return self.table.resolve(wanted)

    def weight(self, name: str, layer: int | None = None) -> Tensor:
        """A weight as `x @ W`, e.g. `W_down` (d_mlp, d_model); `W_O` is (head, d_head, d_model)."""
        return self.table.weight(name, layer)

    def record(self) -> ModelRecord:
        """Which model this is, for a manifest."""
        attention = getattr(getattr(self.module, "config", None), "_attn_implementation", None)
        return ModelRecord(
            source=self.source,
            family=self.table.name,
            weight_hash=self.weight_hash,
            dtype=str(self.dtype).removeprefix("torch."),
            device=str(self.device),
            attention=str(attention or "own"),
        )

    def __call__(self, inputs: Tokens | Any, **kwargs: Any) -> Any:
        """Run the model. Token ids `Int[Tensor, "batch pos"]` or a token record give logits (batch, pos, d_vocab);
        anything else is handed to the module as it is. Ends early, with a `Stopped`, if open captures are content.
        """
        args, named = self.arguments(inputs, kwargs)
        before, self.hub.stoppable = self.hub.stoppable, True
        try:
            with torch.set_grad_enabled(self.wants_grad > 0):
                output = self.module(*args, **named)
        except StopForward:
            return Stopped()
        finally:
            self.hub.stoppable = before
            self.hub.abort()
        logits = getattr(output, "logits", None)
        return output if logits is None else logits

    def arguments(self, inputs: Any, more: Mapping[str, Any] | None = None) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the module is called with: token ids and mask by keyword, pixels by keyword, anything else as it is."""
        kwargs = dict(more or {})
        if not self.is_transformers:
            return (inputs.ids if hasattr(inputs, "ids") else inputs,), kwargs
        if self.takes_pixels:
            return (), {"pixel_values": inputs.to(self.device, self.dtype), **kwargs}
        ids, mask = (
            (inputs.ids, inputs.mask) if hasattr(inputs, "ids") else (inputs, kwargs.pop("attention_mask", None))
        )
        if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
            shown = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
            raise InterpError(
                f"the model takes token ids of shape (batch, pos), got {shown}; use tokenize(model, texts)"
            )
        if ids.numel() == 0:
            raise InterpError(f"the input has no tokens (shape {tuple(ids.shape)})")
        named: dict[str, Any] = {"input_ids": ids.to(self.device), "use_cache": False, **kwargs}
        if mask is not None and not bool(mask.all()):
            self._check_padding(mask)
            named["attention_mask"] = mask.to(self.device).long()
            named.setdefault("position_ids", (named["attention_mask"].cumsum(-1) - 1).clamp_min(0))
        return (), named

    def _check_padding(self, mask: Tensor) -> None:
        """Refuse padding on the left where the model reads it like text."""
        if self.table.family is not None and not self.table.family.left_padding and not bool(mask[:, 0].all()):
            raise InterpError(
                f"{self.source} has no mask for padding: on the left it would change every value after it; pad on the "
                "right (pad='right'), or give texts of equal length or one at a time"
            )

    @property
    def is_transformers(self) -> bool:
        """Whether the module is a Hugging Face model, which is called by keyword and can generate."""
        return any(base.__name__ == "PreTrainedModel" for base in type(self.module).__mro__)

    @property
    def takes_pixels(self) -> bool:
        """Whether it is a Hugging Face model of images, of a known family or not."""
        return self.is_transformers and getattr(self.module, "main_input_name", "") == "pixel_values"

    def generate(
        self, inputs: Tokens | Int[Tensor, "batch pos"], *, n_new: int, use_cache: bool = True, **kwargs: Any
    ) -> Int[Tensor, "batch total"]:
        """Greedy continuation by `n_new` tokens (always that many), prompt included. Left-pad unequal prompts.

        `kwargs` go to transformers' generate, but for those that would make it something else, e.g. `num_beams`.
        """
        if not self.is_transformers or self.takes_pixels:
            raise InterpError(f"{self.source} cannot generate: it is not a transformers causal language model")
        if n_new < 1:
            raise InterpError(f"n_new={n_new} must be at least 1")
        if fixed := sorted(_FIXED & set(kwargs)):
            raise InterpError(
                f"generate({fixed[0]}={kwargs[fixed[0]]!r}): decoding here is greedy, one row per prompt, n_new tokens "
                "long, so that each forward is one position of one text; for anything else call model.module.generate "
                "and capture model(tokens) on what it wrote"
            )
        _, named = self.arguments(inputs, {})
        mask = named.get("attention_mask")
        if mask is not None and not bool(mask[:, -1].all()):
            raise InterpError("generation needs left padding: the last position of some prompt is padding")
        mask = torch.ones_like(named["input_ids"]) if mask is None else mask
        if len(mask) > 1 and self.table.family is not None:
            use_cache = use_cache and self.table.family.batch_cache
        _forget(self.module, named["input_ids"])
        with self._generating(named["input_ids"].shape[1]), torch.no_grad():
            return cast(Any, self.module).generate(
                input_ids=named["input_ids"], attention_mask=mask, max_new_tokens=n_new, min_new_tokens=n_new,
                do_sample=False, num_beams=1, use_cache=use_cache, **_greedy(self.module), **kwargs,
            )  # fmt: skip

    @contextmanager
    def _generating(self, prompt: int) -> Generator[None, None, None]:
        before, self.hub.prompt = self.hub.prompt, prompt
        self.hub.generation, self.hub.seen = self.hub.generation + 1, 0
        try:
            yield
        finally:
            self.hub.prompt = before
            self.hub.abort()

    def __repr__(self) -> str:
        shape = ", ".join(f"{k}={v}" for k, v in vars(self.dims).items() if v is not None)
        return f"LoadedModel({self.source}, {self.table.name}, {len(self.table.sites)} sites, {shape})"


def _state(module: nn.Module) -> list[tuple[str, int, int]]:
    """Where each weight lies and how often it was written to: equal states mean equal weights."""
    return [
        (name, value.data_ptr(), 0 if value.is_inference() else value._version)
        for name, value in module.state_dict().items()
        if isinstance(value, Tensor)
    ]


_LABELS = {
    "_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "return_dict",
    "output_attentions", "output_hidden_states", "id2label", "label2id",
}  # fmt: skip
"""Entries of a configuration that no activation follows from."""


def _meaning(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    items = cast("dict[str, Any]", config).items()
    return {name: _meaning(value) for name, value in items if name not in _LABELS}


_FIXED = {
    "input_ids", "attention_mask", "max_new_tokens", "min_new_tokens", "max_length", "min_length", "do_sample",
    "num_beams", "num_beam_groups", "num_return_sequences", "temperature", "top_p", "top_k", "pad_token_id",
    "assistant_model", "prompt_lookup_num_tokens", "penalty_alpha", "generation_config",
}  # fmt: skip
"""Arguments of transformers' generate that are decided here."""


def _forget(module: nn.Module, ids: Tensor) -> None:
    """RecurrentGemma keeps its state in its modules, and takes a prompt of one token for one more step."""
    begin = getattr(module, "_setup_cache", None)
    if begin is not None:
        begin(module.config, len(ids), ids.device, next(module.parameters()).dtype)


def _greedy(module: nn.Module) -> dict[str, Any]:
    """Sampling settings of the model's own generation config that greedy decoding would only warn about."""
    config = getattr(module, "generation_config", None)
    pad = getattr(config, "pad_token_id", None)
    end = getattr(config, "eos_token_id", None)
    end = end[0] if isinstance(end, list) else end  # pyright: ignore[reportUnknownVariableType]
    return {"temperature": None, "top_p": None, "top_k": None, "pad_token_id": end if pad is None else pad}
