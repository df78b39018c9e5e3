"""torch's compiler, imported when somebody compiles: a fifth of a server's memory, a third of its start.

transformers' models import `torch._dynamo` to mark functions for it, and `torch.distributed.tensor` to ask of
each weight whether it is one of those. Both bring SymPy, with which nobody computes here: 72 MB, and one
second of three from the start to a loaded model (torch 2.13, transformers 5.24).

`wait`, called by who owns the process before it imports transformers, puts a module in the place of
`torch._dynamo` that keeps the marks, and gives way to the real one, which gets these marks, when anything
else is asked of it, by `torch.compile` or by a later transformers. transformers is told that torch was built
without `torch.distributed`, as some builds are; who asks torch hears the truth. What is not as it is expected
to be here stays as it was, and is imported as ever.
"""

import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any

_NAME = "torch._dynamo"
_ALONE = "_trace_wrapped_higher_order_op"
"""The module of it that transformers imports from; itself it needs nothing of its package."""
_MARKS = ("allow_in_graph", "assume_constant_result", "disallow_in_graph")
"""Take a function, note something about it for when it is compiled, and return it."""


def wait() -> bool:
    """Whether the compiler waits from now on; not where it is there already, or a model's modules are."""
    if _NAME in sys.modules or "transformers.modeling_utils" in sys.modules:
        return False
    import torch

    spec, postpone = find_spec(_NAME), getattr(torch, "_disable_dynamo", None)
    if spec is None or postpone is None:
        return False
    waiting = Waiting(spec, postpone)
    sys.modules[_NAME] = torch._dynamo = waiting
    sys.meta_path.insert(0, waiting.finder)
    try:
        import_module(f"{_NAME}.{_ALONE}")
    except Exception:  # noqa: BLE001 -- in this torch it is not alone: as if nothing had been tried
        waiting.leave()
        sys.modules.pop(f"{_NAME}.{_ALONE}", None)
        return False
    waiting.may_load = True
    _deny_distributed()
    return True


def is_waiting() -> bool:
    """Whether nobody has needed the compiler so far."""
    return isinstance(sys.modules.get(_NAME), Waiting)


class Waiting(ModuleType):
    """In the place of `torch._dynamo`."""

    def __init__(self, spec: ModuleSpec, postpone: Callable[..., Any]) -> None:
        """spec: the real one's. postpone: torch's own `disable` for functions that are not called yet."""
        super().__init__(_NAME)
        self._postpone = postpone
        self.__spec__ = spec
        self.__file__ = spec.origin
        self.__path__ = list(spec.submodule_search_locations or ())
        self.finder = _Finder(self)
        self.may_load = False
        self._marks: list[tuple[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        """What only the real one has."""
        if name.startswith("__") and name != "__all__":
            raise AttributeError(name)  # asked of every module there is
        if name in _MARKS and self._is_in_place:
            return partial(self._mark, name)
        return getattr(self.load(), name)

    def disable(self, fn: Any = None, recursive: bool = True, **options: Any) -> Any:
        """As `torch._dynamo.disable`, but that it is carried out when the function is first called."""
        # Which is when `postpone` asks for it, without wrapping.
        if not self._is_in_place or options.get("wrapping") is False:
            return self.load().disable(fn, recursive, **options)
        return self._postpone(fn, recursive)

    def load(self) -> Any:
        """The real module, with the marks."""
        if self._is_in_place:
            if not self.may_load:
                raise ImportError(f"{_NAME} is needed")
            self.leave()
        real = import_module(_NAME)
        setattr(real, _ALONE, sys.modules[f"{_NAME}.{_ALONE}"])
        while self._marks:
            name, function = self._marks.pop()
            getattr(real, name)(function)
        return real

    def leave(self) -> None:
        """Make way."""
        import torch

        sys.modules.pop(_NAME, None)
        if vars(torch).get("_dynamo") is self:
            del torch._dynamo
        if self.finder in sys.meta_path:
            sys.meta_path.remove(self.finder)

    @property
    def _is_in_place(self) -> bool:
        return sys.modules.get(_NAME) is self

    def _mark(self, name: str, *functions: Any, **options: Any) -> Any:
        if options or len(functions) != 1:
            return getattr(self.load(), name)(*functions, **options)
        self._marks.append((name, functions[0]))
        return functions[0]


class _Finder(MetaPathFinder):
    """Sees to it that the real package is there before a module of it, but the one that is alone."""

    def __init__(self, waiting: Waiting) -> None:
        self._waiting = waiting

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """None, for other finders to find it, unless the package has imported it in the meantime."""
        if not name.startswith(f"{_NAME}.") or name == f"{_NAME}.{_ALONE}":
            return None
        self._waiting.load()
        imported = sys.modules.get(name)
        if imported is None:
            return None
        spec = spec_from_loader(name, _Imported(imported))
        # Whose loader Python takes, and not the module's own a second time. Some allow no attributes.
        vars(imported)["__spec__"] = spec
        return spec


class _Imported(Loader):
    """Of a module that is there."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """The same."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Not again; what was changed for it is put back."""
        vars(module)["__spec__"] = self._spec


def _deny_distributed() -> None:
    """To transformers, which remembers the answer."""
    import torch
    from transformers.utils import import_utils

    ask: Any = getattr(import_utils, "is_torch_distributed_available", None)
    if not hasattr(ask, "cache_clear"):
        return
    tell = torch.distributed.is_available
    ask.cache_clear()
    torch.distributed.is_available = lambda: False
    try:
        ask()
    finally:
        torch.distributed.is_available = tell
