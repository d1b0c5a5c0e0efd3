"""What a program launches, found by running it on tensors of the device ``meta``, which hold none.

Every op that reaches PyTorch's dispatcher becomes a kernel with its bytes and products, ours like
PyTorch's; views cost nothing. A whole model of any size is traced in a fraction of a second a step,
by its own code: nothing is counted a second time.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from .roofline import Kernel, make_product

_OURS = "tokencache_kernels::"
# what allocates, or tells the trace of a view from another
_FREE = {
    "aten::_unsafe_view", "aten::empty", "aten::empty_like", "aten::empty_strided",
    "aten::new_empty", "aten::promote_types",
}  # fmt: skip


@contextmanager
def trace():
    """Collect the kernels of what runs inside."""
    kernels: list[Kernel] = []
    with _Functions(kernels), _Dispatch(kernels):
        yield kernels


class _Dispatch(TorchDispatchMode):
    def __init__(self, kernels: list[Kernel]):
        super().__init__()
        self._kernels = kernels

    def __torch_dispatch__(self, op, types, arguments=(), named=None):
        result = op(*arguments, **(named or {}))
        name = op._schema.name
        if not (op.is_view or name in _FREE):
            self._kernels.append(_PRICED.get(name, _pass)(name, arguments, result))
        return result


class _Functions(TorchFunctionMode):
    """Takes fused attention before PyTorch spells it out, as it does on ``meta``."""

    def __init__(self, kernels: list[Kernel]):
        super().__init__()
        self._kernels = kernels

    def __torch_function__(self, function, types, arguments=(), named=None):
        if function is F.scaled_dot_product_attention:
            return self._attend(*arguments, **(named or {}))
        return function(*arguments, **(named or {}))

    def _attend(self, query, key, value, *_, **__):
        with torch._C._DisableTorchDispatch():
            result = torch.empty_like(query)
        B, H, S, E = query.shape
        flops = 4 * B * H * S * key.shape[2] * E
        num_bytes = count_bytes((query, key, value, result))
        self._kernels.append(Kernel("attention", num_bytes, flops, rate="attention_flops"))
        return result


def count_bytes(values: Any) -> int:
    """The bytes of all tensors in a structure, those of an expanded one counted once."""
    tensors = (value for value in tree_iter(values) if isinstance(value, Tensor))
    return sum(
        min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())
        for tensor in tensors
    )


def _pass(name: str, arguments: Any, result: Any) -> Kernel:
    """All inputs read; all results written, which are an input where the op works in place."""
    written = result
    if result is None:
        # our ops in place return nothing; the first argument is what they write
        written = arguments[0]
    elif name == f"{_OURS}row_pass_":
        written = (arguments[0], result)
    num_bytes = count_bytes(arguments) + count_bytes(written)
    return Kernel(name, num_bytes, is_ours=name.startswith(_OURS))


def _take(name: str, arguments: Any, result: Any) -> Kernel:
    """The rows of the result, read and written."""
    return Kernel(name, 2 * count_bytes(result), is_ours=name.startswith(_OURS))


def _put(name: str, arguments: Any, result: Any) -> Kernel:
    """The rows of the last tensor, read and written."""
    rows = [value for value in arguments if isinstance(value, Tensor)][-1]
    return Kernel(name, 2 * count_bytes(rows), is_ours=name.startswith(_OURS))


def _fill(name: str, arguments: Any, result: Any) -> Kernel:
    """What is copied, if anything, and the result, which is not read."""
    return Kernel(name, count_bytes(arguments[1:]) + count_bytes(result))


def _multiply(name: str, arguments: Any, result: Tensor) -> Kernel:
    """A library's product; the last two arguments are its factors."""
    a, b = arguments[-2:]
    return _product(name, (a.shape[:-2].numel(), *a.shape[-2:], b.shape[-1]), arguments, result)


def _convolve(name: str, arguments: Any, result: Tensor) -> Kernel:
    """Of patches that do not overlap: a product."""
    weight = arguments[1]
    rows, columns = result.numel() // weight.shape[0], weight.shape[0]
    return _product(name, (1, rows, weight[0].numel(), columns), arguments, result)


def _linear(name: str, arguments: Any, result: Any) -> Kernel:
    """Our product of packed rows, whose weight is the second argument after them."""
    x, weight = arguments[2:4] if name.endswith("scatter_") else arguments[:2]
    indices = arguments[4] if name.endswith("::linear") else None
    rows = (x if indices is None else indices[..., None]).shape[:-1].numel()
    columns, depth = weight.shape
    return replace(make_product(name, rows, columns, depth), is_ours=True)


def _attend(name: str, arguments: Any, result: Any) -> Kernel:
    """Our attention, (B, S, H, E)."""
    query, key = arguments[:2]
    flops = 4 * query.numel() * key.shape[1]
    num_bytes = count_bytes((arguments, result))
    return Kernel(name, num_bytes, flops, rate="attention_flops", is_ours=True)


def _receive(name: str, arguments: Any, result: Any) -> Kernel:
    """The products of queries and keys: once more after a forward, twice without its sums."""
    query, key, lse = arguments[:3]
    flops = (4 if lse is None else 2) * query.numel() * key.shape[1]
    num_bytes = count_bytes((arguments, result))
    return Kernel(name, num_bytes, flops, rate="received_flops", is_ours=True)


def _product(name: str, sizes: tuple[int, ...], arguments: Any, result: Tensor) -> Kernel:
    """``sizes``: how many, rows, depth and columns of each."""
    count, rows, depth, columns = sizes
    flops = 2 * count * rows * depth * columns
    num_bytes = count_bytes((arguments, result))
    return Kernel(name, num_bytes, flops, product=(count, rows, columns, depth))


_PRICED: dict[str, Callable[[str, Any, Any], Kernel]] = {
    **dict.fromkeys(("aten::mm", "aten::addmm", "aten::bmm", "aten::_addmm_activation"), _multiply),
    "aten::convolution": _convolve,
    **dict.fromkeys(("aten::gather", "aten::embedding", "aten::index_select"), _take),
    **dict.fromkeys(("aten::scatter_", "aten::index_copy_"), _put),
    **dict.fromkeys(("aten::copy_", "aten::fill_", "aten::zero_"), _fill),
    f"{_OURS}gather_rows": _take,
    f"{_OURS}scatter_rows_": _put,
    f"{_OURS}linear": _linear,
    f"{_OURS}linear_scatter_": _linear,
    f"{_OURS}attention": _attend,
    f"{_OURS}attention_with_entropy": _attend,
    f"{_OURS}attention_received": _receive,
}
