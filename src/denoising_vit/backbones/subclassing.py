"""Change the behaviour of one module by a subclass of its class, and undo the change."""

from __future__ import annotations

import copy
import functools
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


class Specialised:
    """Base of mixins for :func:`specialise`: copies and pickles like the class it is mixed into."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        cls = type(self)
        return _blank, (cls.__bases__[0], cls.__bases__[1]), self.__dict__


def specialise(module: nn.Module, mixin: type[Specialised]) -> None:
    """Insert a mixin before the class of one module, in place. Parameters, buffers and submodules are unchanged."""
    module.__class__ = _subclass(mixin, type(module))


def generalise(module: nn.Module) -> None:
    """Undo :func:`specialise`."""
    if isinstance(module, Specialised):
        module.__class__ = type(module).__bases__[1]


@functools.cache
def _subclass(mixin: type[Specialised], base: type[nn.Module]) -> Any:
    # The same name and module as the original, because other libraries look classes up by them. `forward` keeps its
    # signature, which transformers inspects.
    names: dict[str, Any] = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    if "forward" in vars(mixin):

        @functools.wraps(base.forward)
        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            return vars(mixin)["forward"](self, *args, **kwargs)

        names["forward"] = forward
    return type(base.__name__, (mixin, base), names)


def _blank(mixin: type[Specialised], base: type[nn.Module]) -> nn.Module:
    cls = _subclass(mixin, base)
    return cls.__new__(cls)


def shallow(module: M) -> M:
    """A copy with its own table of submodules and of pre-hooks; parameters, buffers and submodules are shared."""
    other = copy.copy(module)
    for table in ("_modules", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"):
        other.__dict__[table] = type(module.__dict__[table])(module.__dict__[table])
    return other
