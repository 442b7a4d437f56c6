"""Hooks of others while a store is written: may a hook that this project did not set change what is stored?

A store is named by the weights, the input and the sites. A user's hook that changes an activation is in none of them,
so what it made would be found later under the untouched model's name. Hooks that only look are harmless and common
(counters, timers), so they are not forbidden: `watched` wraps each for the duration, and the first one that returns
another value or writes into what it was given is an error. Hooks with which torch itself computes a weight
(`torch.nn.utils.weight_norm`, `spectral_norm`) belong to the model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from interp.core.errors import InterpError

Hook = Callable[..., Any]


@contextmanager
def watched(module: nn.Module) -> Generator[int, None, None]:
    """Inside, a hook that is there already raises InterpError when it changes something. Yields how many there are."""
    found = [(hooks, key, hook, path) for hooks, path in _places(module) for key, hook in hooks.items()]
    foreign = [entry for entry in found if not (getattr(entry[2], "__module__", None) or "").startswith("torch.nn.")]
    for hooks, key, hook, path in foreign:
        hooks[key] = _checked(hook, path)
    try:
        yield len(foreign)
    finally:
        for hooks, key, hook, _ in foreign:
            if key in hooks:
                hooks[key] = hook


def _places(module: nn.Module) -> Iterator[tuple[MutableMapping[int, Hook], str]]:
    """Every dict of forward hooks, those of all modules together last."""
    for path, child in module.named_modules():
        own: Any = child
        for hooks in (own._forward_pre_hooks, own._forward_hooks):
            yield hooks, path or "the model"
    every: Any = torch.nn.modules.module
    for hooks in (every._global_forward_pre_hooks, every._global_forward_hooks):
        yield hooks, "every module"


def _checked(hook: Hook, path: str) -> Hook:
    def checked(*args: Any) -> Any:
        given = [(tensor, tensor._version) for tensor in _tensors(args[1:])]
        result = hook(*args)
        wrote = any(tensor._version != version for tensor, version in given)
        if wrote or (result is not None and not _same(result, args[1:])):
            raise InterpError(
                f"a hook of yours on {path} ({getattr(hook, '__qualname__', type(hook).__name__)}) changes what the "
                "model computes; it would be stored under the untouched model's name. Remove the hook; edit sites with "
                "interp.edited and capture in memory, or load the changed model as a module of its own"
            )
        return result

    return checked


def _same(result: Any, given: tuple[Any, ...]) -> bool:
    """Whether a hook returned what it was handed: the output, or the arguments."""
    known = {id(tensor) for tensor in _tensors(given)}
    return all(id(tensor) in known for tensor in _tensors((result,)))


def _tensors(values: tuple[Any, ...]) -> list[Tensor]:
    leaves = pytree.tree_leaves(values)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and not leaf.is_inference()]
