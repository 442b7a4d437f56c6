"""Values inside a module's forward: what a torch function returns while the module runs.

Many gates are no module: `torch.sigmoid(self.shared_gate(x))`, `F.softplus(dt + bias)`. While a module with such a
site runs, an `OpScope` sees every torch function that it calls and hands the n-th result of a name to whoever watches.
The result is the model's own tensor, so reading it is exact, changing it is an edit like any other, and gradients
flow. Only calls are counted that the module really makes: a fused kernel in their place never fires, which is an error.

A branch may call the same function first. So a call can be told by what it is given: `of` names a child (or parameter)
of the module, and only calls count whose argument is its output, or follows from that alone and from constants. `only`
refuses a second such call: which of the two is meant cannot be told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from interp.core.errors import SiteError

Watch = Callable[[Tensor], Tensor | None]
"""Gets the function's result; returns another one, or `None` to leave it."""


@dataclass(frozen=True)
class OpCall:
    """Which call of which function."""

    op: str
    nth: int = 0
    of: str | None = None
    only: bool = False


class OpScope(TorchFunctionMode):
    """The torch functions one module calls, from when it starts until it returns."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.watched: dict[OpCall, Watch] = {}
        self._counts: Counter[tuple[str, str | None]] = Counter()
        self._derived: dict[str, dict[int, Tensor]] = {}
        """By child: its outputs and what follows from them, held while the module runs."""
        self._running = False
        self._hooks = (
            module.register_forward_pre_hook(lambda _m, _a: self.start()),
            module.register_forward_hook(lambda _m, _a, _o: self.stop(), always_call=True),
        )
        self._sources: dict[str, Callable[[], None]] = {}

    def watch(self, call: OpCall, watch: Watch) -> Callable[[], None]:
        """Watch a call from now on; returns what undoes it, and whose scope is empty then is removed."""
        self.watched[call] = watch
        if call.of is not None and call.of not in self._sources:
            source, of = getattr(self.module, call.of), call.of
            if isinstance(source, nn.Module):
                handle = source.register_forward_hook(lambda _m, _a, output: self._add(of, output))
                self._sources[of] = handle.remove
            else:
                self._sources[of] = lambda: None

        def undo() -> None:
            del self.watched[call]
            if not any(other.of == call.of for other in self.watched):
                self._sources.pop(str(call.of), lambda: None)()

        return undo

    @property
    def undecided(self) -> bool:
        """Whether a second call may still come that makes the first one ambiguous."""
        return self._running and any(call.only for call in self.watched)

    def start(self) -> None:
        """The module begins."""
        self.stop()
        self._counts.clear()
        self._running = True
        for of in self._sources:
            source = getattr(self.module, of)
            self._derived[of] = {id(source): source} if isinstance(source, Tensor) else {}
        self.__enter__()

    def stop(self) -> None:
        """The module has returned, or failed."""
        if self._running:
            self._running = False
            self._derived.clear()
            self.__exit__(None, None, None)

    def remove(self) -> None:
        """Take the hooks away."""
        self.stop()
        for hook in self._hooks:
            hook.remove()

    def follow(self, old: Any, new: Any) -> None:
        """An edit put another value in the place of one."""
        for of, derived in self._derived.items():
            if any(id(tensor) in derived for tensor in _tensors((old,))):
                self._add(of, new)

    def _add(self, of: str, output: Any) -> None:
        if self._running:
            self._derived[of] |= {id(tensor): tensor for tensor in _tensors((output,))}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        result = self._called(name, None, result)
        for of, derived in self._derived.items():
            given = list(_tensors((*args, *(kwargs or {}).values())))
            known = [tensor for tensor in given if id(tensor) in derived]
            if not known:
                continue
            if any(call.op == name and call.of == of for call in self.watched):
                result = self._called(name, of, result)
            elif all(id(t) in derived or isinstance(t, nn.Parameter) or t.numel() == 1 for t in given):
                self._add(of, result)
        return result

    def _called(self, name: str, of: str | None, result: Any) -> Any:
        number = self._counts[name, of]
        self._counts[name, of] += 1
        for call, watch in self.watched.items():
            if (call.op, call.of) != (name, of):
                continue
            if call.only and number > call.nth:
                raise SiteError(
                    f"{type(self.module).__name__} calls {name}() more than once{f' on {of}' if of else ''}, so which "
                    "one is the gate cannot be told; name it: register_block(function_gate(CLASS, part=..., nth=...))"
                )
            if call.nth == number:
                changed = watch(result)
                return result if changed is None else changed
        return result


def _tensors(values: tuple[Any, ...]) -> Iterator[Tensor]:
    """The tensors among values, and in lists and tuples of them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple | list):
            yield from _tensors(tuple(cast("tuple[Any, ...]", value)))
