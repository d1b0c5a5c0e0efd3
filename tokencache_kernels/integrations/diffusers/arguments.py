"""The arguments of a module's call, by name and by place."""

import inspect
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from torch import Tensor

from .interception import Original, class_of, eager, transparent

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclass(frozen=True)
class ModuleCall:
    """A call of a module that the cache may answer.

    Attributes:
        module: the module.
        original: its own call, with all that other libraries have put around it.
        positional: the arguments that were given by place.
        named: those that were given by name.
    """

    module: Any
    original: Original
    positional: tuple[Any, ...]
    named: dict[str, Any]

    @transparent
    def run(self) -> Any:
        """Make the call as it was."""
        return self.original(*self.positional, **self.named)

    @transparent
    def run_on(self, tokens: Tensor) -> Any:
        """Make the call with other tokens in the first argument."""
        if self.positional:
            return self.original(tokens, *self.positional[1:], **self.named)
        return self.original(**{**self.named, self._first_name: tokens})

    @property
    def tokens(self) -> Tensor:
        """The first argument, which holds the tokens, whatever it is called; stride 1 along D."""
        tokens: Tensor = self.positional[0] if self.positional else self.named[self._first_name]
        return tokens if tokens.stride(-1) == 1 else tokens.contiguous()

    @property
    def given(self) -> dict[str, Any]:
        """The arguments by name, without those that ``forward`` takes by place as ``*args``."""
        return name_arguments(self.module, self.positional, self.named)

    @transparent
    def run_with(self, given: dict[str, Any]) -> Any:
        """Make the call with other values of ``given``, and with its ``*args`` as they were."""
        by_place, named = self._place(given)
        return self.original(*by_place, **named)

    @eager
    def _place(self, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        names = _positional_names(cast(Any, class_of(self.module)))[: len(self.positional)]
        by_place = [given[name] for name in names] + list(self.positional[len(names) :])
        return by_place, {name: value for name, value in given.items() if name not in names}

    @property
    def _first_name(self) -> str:
        names = _positional_names(cast(Any, class_of(self.module)))
        return names[0] if names and names[0] in self.named else next(iter(self.named))


@eager
def name_arguments(
    module: Any, positional: tuple[Any, ...], named: dict[str, Any]
) -> dict[str, Any]:
    """Return a call's arguments by name, without those that ``forward`` takes as ``*args``."""
    if not positional:
        return dict(named)
    names = _positional_names(cast(Any, class_of(module)))
    return {**dict(zip(names, positional, strict=False)), **named}


@eager
@cache
def _positional_names(kind: Any) -> tuple[str, ...]:
    """List the positional parameters of a class's ``forward``, without ``self``."""
    parameters = list(inspect.signature(kind.forward).parameters.values())[1:]
    return tuple(one.name for one in parameters if one.kind in _POSITIONAL)
