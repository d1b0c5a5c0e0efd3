"""Registers the ops with PyTorch: one namespace, schemas by hand, a fake for each.

An exported program calls a registered op without the public function's checks. The registration
therefore handles autocast, strides, shared memory and versions itself.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import backends
from ._checks import expect_writable, fail

NAMESPACE = "tokencache_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Function = TypeVar("Function", bound=Callable[..., Any])


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define one op and return its overload; the schema's last argument is ``str backend``."""
    name, arguments = schema.split(" -> ")[0].rstrip(")").split("(", 1)
    words = [argument.split() for argument in re.split(r",\s*", arguments)]
    written = {place: word[1] for place, word in enumerate(words) if "!)" in word[0]}
    lists = [place for place, word in enumerate(words) if word[0].endswith("[]")]
    _LIBRARY.define(schema)
    run_exactly = without_autocast(implementation)

    @functools.wraps(implementation)
    def run_safely(*given: Any) -> Any:
        usable = [_with_unit_stride(value) for value in given]
        for place in lists:
            # a program compiled ahead of time gives None for a list that is empty
            usable[place] = usable[place] or []
        return run_apart(usable, given)

    def run_apart(usable: list[Any], given: Sequence[Any]) -> Any:
        for place, argument in written.items():
            expect_writable(name, argument, given[place])
            for earlier, other in written.items():
                if earlier < place and share_memory(given[place], given[earlier]):
                    fail(name, argument, f"share no memory with {other}", "a part of it")
            _keep_apart(given[place], usable)
        result = run_exactly(*usable)
        for place in written:
            torch.autograd.graph.increment_version(given[place])
        return result

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run_safely, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default

    @functools.wraps(implementation)
    def call(*given: Any) -> Any:
        # the public functions refuse strides that would have to be copied
        return overload(*given) if _is_watched(given) else run_apart([*given], given)

    return call


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_watched(given: Sequence[Any]) -> bool:
    """Tell whether a call must go by PyTorch's dispatcher: for a gradient, a compiler, a mode, a
    profiler.

    Else the dispatcher would only call back, at the cost of a small op.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
        or torch._C._functorch.maybe_current_level() is not None
    ):
        return True
    has_grad = torch.is_grad_enabled()
    for value in given:
        if isinstance(value, Tensor):
            if (
                type(value) not in _PLAIN
                or not (value.is_cpu or value.is_cuda)
                or (has_grad and value.requires_grad)
            ):
                return True
        elif type(value) is list:
            for one in value:
                if isinstance(one, Tensor) and type(one) not in _PLAIN:
                    return True
    return False


def without_autocast(function: Function) -> Function:
    """Make a function work in the dtype of its inputs, also under ``torch.autocast``."""

    # the compiler makes a guard of an annotation by a ParamSpec that it then fails
    @functools.wraps(function)
    def run_without(*arguments: Any, **named: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return function(*arguments, **named)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*arguments, **named)

    return run_without  # type: ignore[return-value]


def _with_unit_stride(value: Any) -> Any:
    """Copy an input whose last stride is not 1; the public functions refuse it."""
    if isinstance(value, Tensor):
        has_it = value.is_contiguous() or value.shape[-1] <= 1 or value.stride(-1) == 1
        return value if has_it else value.contiguous()
    return [_with_unit_stride(one) for one in value] if isinstance(value, list) else value


def _keep_apart(written: Tensor, usable: list[Any]) -> None:
    """Copy each input that shares memory with an output, so that it is read as it was before."""
    for place, value in enumerate(usable):
        if isinstance(value, Tensor):
            if value is written or not torch._C._is_alias_of(written, value):  # type: ignore[attr-defined]
                continue
            if share_memory(written, value):
                usable[place] = value.clone()
        elif type(value) is list and value and type(value[0]) is not float:
            usable[place] = apart = [*value]
            _keep_apart(written, apart)


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Tell whether two tensors have elements in common.

    For other strides, tell whether they may have.
    """
    is_alias = torch._C._is_alias_of(a, b)  # type: ignore[attr-defined]
    if not is_alias or a.numel() == 0 or b.numel() == 0:
        return False
    (start, end), (other_start, other_end) = _span_of(a), _span_of(b)
    if start >= other_end or other_start >= end:
        return False
    steps = sorted(zip(a.stride(), a.shape, b.shape, strict=False), reverse=True)
    if a.stride() != b.stride() or a.dtype != b.dtype or steps[-1][0] == 0:
        return True
    return _can_reach((other_start - start) // a.itemsize, steps)


def _can_reach(distance: int, steps: Sequence[tuple[int, int, int]]) -> bool:
    """Tell whether an element of ``a`` and one of ``b``, which begins so much later, are the same.

    Steps are stride, size of ``a`` and size of ``b``, the longest stride first.
    """
    if not steps:
        return distance == 0
    (stride, size, other_size), *shorter = steps
    return any(
        -other_size < step < size and _can_reach(distance - step * stride, shorter)
        for step in (distance // stride, distance // stride + 1)
    )


def _span_of(x: Tensor) -> tuple[int, int]:
    """The addresses of its first byte and of the one behind its last."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (reach + 1) * x.itemsize


def run(
    op: str, anchor: Tensor, backend: str, preference: Iterable[str] | None = None
) -> Callable[..., Any]:
    """The function that runs ``op`` where ``anchor`` lies; only called inside a registered op."""
    launch = backends.resolve(op, anchor.device, anchor.dtype, backend, preference)
    if anchor.device.type != "cuda" or anchor.device.index == torch.cuda.current_device():
        return launch

    def launch_there(*arguments: Any) -> Any:
        with torch.cuda.device(anchor.device):
            return launch(*arguments)

    return launch_there


def no_result(*_: Any) -> None:
    """The fake implementation of every op that only writes in place."""
