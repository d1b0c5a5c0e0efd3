"""Registers the ops with PyTorch: one namespace, schemas by hand, a fake for each.

Behind the registration stands only what an exported program, which leaves the public functions'
checks behind, must get right as well: no autocast, strides, memory that is shared, versions.
"""

import functools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from .. import backends
from ._checks import expect_writable, fail

NAMESPACE = "tokencache_kernels"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def define(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define one op and return its overload; the schema's last argument is ``str backend``."""
    name, arguments = schema.split(" -> ")[0].rstrip(")").split("(", 1)
    words = [argument.split() for argument in re.split(r",\s*", arguments)]
    written = {place: word[1] for place, word in enumerate(words) if "!)" in word[0]}
    _LIBRARY.define(schema)
    run_exactly = without_autocast(implementation)

    @functools.wraps(implementation)
    def run_safely(*given: Any) -> Any:
        usable = [_with_unit_stride(value) for value in given]
        for place, argument in written.items():
            expect_writable(name, argument, given[place])
            for earlier, other in written.items():
                if earlier < place and share_memory(given[place], given[earlier]):
                    fail(name, argument, f"share no memory with {other}", "a part of it")
        if written:
            _keep_apart([given[place] for place in written], usable)
        result = run_exactly(*usable)
        for place in written:
            torch.autograd.graph.increment_version(given[place])
        return result

    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run_safely, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def without_autocast(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function work in the dtype of its inputs, also under ``torch.autocast``."""

    @functools.wraps(function)
    def run_without(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        if not torch._C._is_any_autocast_enabled():
            return function(*arguments, **named)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*arguments, **named)

    return run_without


def _with_unit_stride(value: Any) -> Any:
    """What an op reads, copied where its last stride is not 1; the public functions refuse it."""
    if isinstance(value, Tensor):
        has_it = value.is_contiguous() or value.shape[-1] <= 1 or value.stride(-1) == 1
        return value if has_it else value.contiguous()
    return [_with_unit_stride(one) for one in value] if isinstance(value, list) else value


def _keep_apart(written: Sequence[Tensor], usable: list[Any]) -> None:
    """Copy each input that shares memory with what is written: it is read as it was before."""
    for place, value in enumerate(usable):
        if isinstance(value, list):
            _keep_apart(written, value)
        elif isinstance(value, Tensor) and all(value is not one for one in written):
            is_shared = any(share_memory(one, value) for one in written)
            usable[place] = value.clone() if is_shared else value


def share_memory(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have elements in common; of other strides, whether they may have."""
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
    """Whether an element of ``a`` and one of ``b``, which begins so much later, are the same.

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
