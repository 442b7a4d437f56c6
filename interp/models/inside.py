"""Values inside a module's forward: what a torch function returns while the module runs.

Many gates are no module: `torch.sigmoid(self.shared_gate(x))`, `F.softplus(dt + bias)`. While a module with such a
site runs, an `OpScope` sees every torch function that it calls and hands the n-th result of a name to whoever watches.
The result is the model's own tensor, so reading it is exact, changing it is an edit like any other, and gradients
flow. Only calls are counted that the module really makes: a fused kernel in their place never fires, which is an error.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Watch = Callable[[Tensor], Tensor | None]
"""Gets the function's result; returns another one, or `None` to leave it."""


class OpScope(TorchFunctionMode):
    """The torch functions one module calls, from when it starts until it returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.watched: dict[tuple[str, int], Watch] = {}
        self._counts: Counter[str] = Counter()
        self._running = False
        self._hooks = (
            module.register_forward_pre_hook(lambda _m, _a: self.start()),
            module.register_forward_hook(lambda _m, _a, _o: self.stop(), always_call=True),
        )

    def start(self) -> None:
        """The module begins."""
        self.stop()
        self._counts.clear()
        self._running = True
        self.__enter__()

    def stop(self) -> None:
        """The module has returned, or failed."""
        if self._running:
            self._running = False
            self.__exit__(None, None, None)

    def remove(self) -> None:
        """Take the hooks away."""
        self.stop()
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        number = self._counts[name]
        self._counts[name] += 1
        watch = self.watched.get((name, number))
        if watch is None:
            return result
        changed = watch(result)
        return result if changed is None else changed
