"""Gates that are bare parameters: a ReZero factor, ConViT's `gating_param`, a layer scale.

Such a gate is no module's output. While its module runs, the parameter's name stands for an alias of it that readers
see and writers replace: the module's own code uses it wherever it would have used the parameter, however often. The
parameter itself is never written to, and the name is its own again when the module has returned or failed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def shadow(module: nn.Module, name: str, look: Callable[[Tensor], Any]) -> Callable[[], None]:
    """Hand the parameter to `look` in every forward of the module; what it returns (if not `None`) is used instead."""

    def before(module: nn.Module, _args: Any) -> None:
        own = module.get_parameter(name)
        alias = own.view_as(own) if own.requires_grad and torch.is_grad_enabled() else own.detach()
        new = look(alias)
        vars(module)[name] = alias if new is None else new  # found before the parameters of the module are

    def after(module: nn.Module, _args: Any, _output: Any) -> None:
        vars(module).pop(name, None)

    hooks = (
        module.register_forward_pre_hook(before),
        module.register_forward_hook(after, prepend=True, always_call=True),
    )

    def remove() -> None:
        for hook in hooks:
            hook.remove()
        vars(module).pop(name, None)

    return remove
