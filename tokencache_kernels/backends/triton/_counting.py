"""Count kernel launches, compiled or interpreted: a fused op is one that takes few."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from triton.runtime.interpreter import GridExecutor
from triton.runtime.jit import JITFunction

from ._device import INTERPRETED


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
