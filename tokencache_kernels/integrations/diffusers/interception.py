"""Calls of modules that are answered by the token cache, whatever else is put around the modules.

An intercepted module gets a subclass of its own class, as ``torch.nn.utils.parametrize`` does. Its
``__call__`` goes to an interceptor; ``forward`` is left alone, so that offloading, quantisation,
LoRA and ``torch.compile`` can replace, wrap and restore it at any time.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from functools import cache, partial, wraps
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import nn

_ATTRIBUTE = "_token_cache"
Original = Callable[..., Any]
Function = TypeVar("Function", bound=Callable[..., Any])


def eager(function: Function) -> Function:
    """Keep a function, and everything that it calls, away from a compiler."""
    return cast(Function, torch.compiler.disable(function))


def transparent(function: Function) -> Function:
    """Keep a function away from a compiler, which compiles the model's own code below it."""
    return cast(Function, torch.compiler.disable(function, recursive=False))


class Interceptor(Protocol):
    """The part of the cache that answers the calls of one module."""

    def call(self, module: Any, original: Original, *arguments: Any, **named: Any) -> Any:
        """Answer a call; ``original`` is the module's own, with all that is around it."""


class RootInterceptor(Interceptor, Protocol):
    """The part of the cache that answers the calls of a whole transformer."""

    def context(self, name: str, **place: Any) -> AbstractContextManager[None]:
        """Name the caller of the calls inside."""

    def forget_runs(self) -> None:
        """End all runs under way."""

    def forward(self, module: Any, own: Original, *arguments: Any, **named: Any) -> Any:
        """Answer a call of the model's forward, within a call of the model or by itself."""


class _Intercepted:
    """A module whose calls go to its interceptor."""

    @transparent
    def __call__(self, *arguments: Any, **named: Any) -> Any:
        original = super().__call__  # type: ignore[misc]
        interceptor = self.__dict__.get(_ATTRIBUTE)
        if interceptor is None:
            return original(*arguments, **named)
        return interceptor.call(self, original, *arguments, **named)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the subclass cannot be found by its name
        mixin, base = type(self).__bases__
        return _restore, (mixin, base), self.__dict__


class _Root(_Intercepted):
    """A transformer whose calls go to its interceptor, and which pipelines tell about runs."""

    @contextmanager
    def cache_context(self, name: str, **place: Any) -> Any:
        """Name the caller of the calls inside; diffusers' pipelines do."""
        interceptor = self.__dict__[_ATTRIBUTE]
        own = getattr(super(), "cache_context", None)
        with interceptor.context(name, **place):
            if own is None:
                yield
            else:
                with own(name, **place):
                    yield

    def enable_cache(self, config: Any) -> None:
        """Refuse another cache on the same model."""
        raise ValueError(
            f"enable_cache: the transformer already has a token cache, so {type(config).__name__} "
            "cannot be enabled; call remove_token_cache first"
        )

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """End all runs; diffusers' pipelines call this behind each image."""
        self.__dict__[_ATTRIBUTE].forget_runs()
        own = getattr(super(), "_reset_stateful_cache", None)
        if own is not None:
            own(recurse)


class _Equal(type):
    """A class that counts as its base where classes are compared, as diffusers' pipelines do."""

    def __eq__(cls, other: object) -> bool:
        return cls is other or other is cls.__bases__[1] or super().__eq__(other)

    def __hash__(cls) -> int:
        return hash(cls.__bases__[1])


def intercept(module: nn.Module, interceptor: Interceptor) -> None:
    """Let ``interceptor`` answer the calls of ``module`` from now on."""
    _adopt(module, interceptor, _Intercepted)


def intercept_root(transformer: nn.Module, interceptor: RootInterceptor) -> None:
    """Let ``interceptor`` answer the calls of a transformer, of its forward, and of pipelines."""
    _adopt(transformer, interceptor, _Root)


def _adopt(module: nn.Module, interceptor: Interceptor, mixin: type) -> None:
    if not is_intercepted(module):
        module.__class__ = _subclass_of(mixin, cast(Any, type(module)))
    module.__dict__[_ATTRIBUTE] = interceptor


def release(module: nn.Module) -> None:
    """Give a module its own class back; without an interceptor this does nothing."""
    if is_intercepted(module):
        module.__class__ = type(module).__bases__[1]
        module.__dict__.pop(_ATTRIBUTE, None)


def is_intercepted(module: object) -> bool:
    """Tell whether the calls of a module go to an interceptor."""
    return isinstance(module, _Intercepted)


def interceptor_of(module: nn.Module) -> Any:
    """The interceptor of a module, or None."""
    return module.__dict__.get(_ATTRIBUTE)


def class_of(module: nn.Module) -> type[nn.Module]:
    """The module's own class."""
    return (
        cast("type[nn.Module]", type(module).__bases__[1])
        if is_intercepted(module)
        else type(module)
    )


@cache
def _subclass_of(mixin: Any, base: Any) -> Any:
    # the same name: many things go by it
    attributes: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
    }
    if mixin is _Root:
        attributes["forward"] = _answered_forward(base.forward)
    metaclass = type("_Equal", (_Equal, type(base)), {}) if type(base) is not type else _Equal
    return metaclass(base.__name__, (mixin, base), attributes)


def _answered_forward(own: Any) -> Any:
    """A transformer's forward by way of its interceptor, with the same signature."""

    @transparent
    @wraps(own)
    def forward(self: Any, *arguments: Any, **named: Any) -> Any:
        interceptor = self.__dict__.get(_ATTRIBUTE)
        if interceptor is None:
            return own(self, *arguments, **named)
        return interceptor.forward(self, partial(own, self), *arguments, **named)

    return forward


def _restore(mixin: type, base: Any) -> Any:
    """An empty module of the subclass of ``base``, for copies and pickles."""
    module = base.__new__(base)
    module.__class__ = _subclass_of(mixin, base)
    return module
