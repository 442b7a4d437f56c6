"""What cannot be instrumented, said before it goes wrong in silence.

Compiled code does not look at hooks again once it is compiled, replicas run in threads of their own, and gradient
checkpointing runs a block a second time during the backward pass, perhaps after an edit has gone.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from interp.core.errors import InterpError
from interp.models.model import LoadedModel


def check_instrumentable(model: LoadedModel, *, grad: bool) -> None:
    """Raise InterpError for a compiled, replicated or (with gradients) checkpointed model, saying what to do."""
    for path, module in (("", model.module), *model.table.modules.items()):
        name = path or "the model"
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:  # pyright: ignore[reportPrivateUsage]
            raise InterpError(
                f"{name} is compiled: compiled code does not see hooks that come later, so a capture would be empty "
                "and an edit without effect; load the module as it was before torch.compile"
            )
        if isinstance(module, nn.DataParallel):
            raise InterpError(f"{name} is nn.DataParallel, which runs copies in threads; load its .module instead")
        if grad and module.training and getattr(module, "gradient_checkpointing", False):
            raise InterpError(
                f"{name} checkpoints its gradients: the backward pass would run it, and every edit, a second time; "
                "call eval() or gradient_checkpointing_disable()"
            )


def in_backward() -> bool:
    """Whether this runs inside a backward pass: a checkpoint is computing its values again."""
    return cast(Any, torch)._C._current_graph_task_id() != -1


@contextmanager
def frozen(module: nn.Module) -> Generator[None, None, None]:
    """No parameter takes part in graphs that are built inside."""
    thawed = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)
