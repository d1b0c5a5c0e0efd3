"""Recorders of kernel launches: their number, and the variants that would be compiled."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from triton.runtime.interpreter import GridExecutor, InterpretedFunction
from triton.runtime.jit import JITFunction

from ..backends.triton._device import INTERPRETED


@contextmanager
def count_launches() -> Iterator[list[str]]:
    """Collect the names of the kernels launched inside the ``with`` block, in order."""
    owner, method = (GridExecutor, "__call__") if INTERPRETED.value else (JITFunction, "run")
    launch = getattr(owner, method)
    names: list[str] = []

    def record(self: Any, *args: Any, **kwargs: Any) -> Any:
        names.append(self.fn.__name__)
        return launch(self, *args, **kwargs)

    setattr(owner, method, record)
    try:
        yield names
    finally:
        setattr(owner, method, launch)


@contextmanager
def record_specialisations() -> Iterator[set[tuple[str, Any, Any]]]:
    """Collect the programs that launches in the block would be compiled to; none of them runs.

    One is the name of a kernel, the values that cannot change at run time (constants, types,
    absences), and the properties of values that the compiler finds: multiples of 16, and ones. For
    kernels under the interpreter, which has no compiler of its own.
    """
    found: set[tuple[str, Any, Any]] = set()
    run = InterpretedFunction.run

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        parameters = inspect.signature(self.fn).parameters
        values = dict(zip(parameters, args, strict=False)) | kwargs
        never = self.kwargs.get("do_not_specialize") or ()
        unaligned = self.kwargs.get("do_not_specialize_on_alignment") or ()
        fixed, seen = [], []
        for name, parameter in parameters.items():
            if "constexpr" in str(parameter.annotation):
                fixed.append((name, values[name]))
            else:
                fixed.append((name, _type_of(values[name])))
                if name not in never:
                    seen.append((name, _value_of(values[name], name not in unaligned)))
        found.add((self.fn.__name__, tuple(fixed), tuple(seen)))

    InterpretedFunction.run = record
    try:
        yield found
    finally:
        InterpretedFunction.run = run


def _type_of(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_type_of, value))
    return str(value.dtype) if isinstance(value, Tensor) else type(value).__name__


def _value_of(value: Any, aligns: bool) -> Any:
    """The compiler's assumptions on an argument."""
    if isinstance(value, tuple):
        return tuple(_value_of(one, aligns) for one in value)
    if isinstance(value, Tensor):
        return aligns and value.data_ptr() % 16 == 0
    if isinstance(value, int):
        return 1 if value == 1 else (value % 16 == 0, value >= 2**31)
    return None
