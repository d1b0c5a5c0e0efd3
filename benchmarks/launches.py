"""What a program launches, found by running it on tensors of the device ``meta``, which hold none.

Every op that reaches PyTorch's dispatcher becomes a kernel with its bytes and products, ours like
PyTorch's; views cost nothing. A whole model of any size is traced in a fraction of a second a step,
by its own code: nothing is counted a second time.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from math import prod
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
    "aten::new_empty", "aten::promote_types", "prim::device",
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
        name = op._schema.name
        if name == "aten::_local_scalar_dense":
            # a check that values are right: there are none, and they are
            return True
        result = op(*arguments, **(named or {}))
        if not (op.is_view or name in _FREE):
            self._kernels += _COUNTED.get(name, _count_pass)(name, arguments, result)
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


def _count_pass(name: str, arguments: Any, result: Any) -> list[Kernel]:
    """All inputs read; all results written, which are an input where the op works in place."""
    written = result
    if result is None:
        # our ops in place return nothing; the first argument is what they write
        written = arguments[0]
    elif name == f"{_OURS}row_pass_":
        written = (arguments[0], result)
    return [_make(name, count_bytes(arguments) + count_bytes(written))]


def _count_gather(name: str, arguments: Any, result: Any) -> list[Kernel]:
    """The rows of the result, read and written."""
    return [_make(name, 2 * count_bytes(result))]


def _count_scatter(name: str, arguments: Any, result: Any) -> list[Kernel]:
    """The rows of the last tensor, read and written."""
    rows = [value for value in arguments if isinstance(value, Tensor)][-1]
    return [_make(name, 2 * count_bytes(rows))]


def _count_fill(name: str, arguments: Any, result: Any) -> list[Kernel]:
    """What is copied, if anything, and the result, which is not read."""
    return [_make(name, count_bytes(arguments[1:]) + count_bytes(result))]


def _count_product(name: str, arguments: Any, result: Tensor) -> list[Kernel]:
    """A library's product; the last two arguments are its factors."""
    a, b = arguments[-2:]
    sizes = a.shape[:-2].numel(), a.shape[-2], b.shape[-1], a.shape[-1]
    return [_make(name, count_bytes((arguments, result)), product=sizes)]


def _count_convolution(name: str, arguments: Any, result: Tensor) -> list[Kernel]:
    """Of patches that do not overlap: a product."""
    weight = arguments[1]
    columns, depth = weight.shape[0], weight[0].numel()
    sizes = 1, result.numel() // columns, columns, depth
    return [_make(name, count_bytes((arguments, result)), product=sizes)]


def _count_linear(name: str, arguments: Any, result: Tensor) -> list[Kernel]:
    """Our product of packed rows, or of rows that it gathers; two of a gated layer."""
    x, weight, _, _, indices, gate_weight, *_ = arguments
    rows = x.shape[:-1].numel() if indices is None else indices.numel()
    weights = [weight] if gate_weight is None else [gate_weight, weight]
    return [_make_product(name, rows, *one.shape) for one in weights]


def _count_linear_scatter(name: str, arguments: Any, result: None) -> list[Kernel]:
    """Our product whose rows are scattered."""
    _, _, x, weight, *_ = arguments
    return [_make_product(name, x.shape[:-1].numel(), *weight.shape)]


def _count_mlp(name: str, arguments: Any, result: None) -> list[Kernel]:
    """The rows, then the two products, and a gate's."""
    _, _, indices, _, _, fc1, _, fc2, *_, gate, _, _ = arguments
    rows = indices.numel()
    weights = [weight for weight in (gate, fc1, fc2) if weight is not None]
    packed = 2 * rows * fc1.shape[1] * fc1.element_size()
    products = [_make_product(name, rows, *weight.shape) for weight in weights]
    return [_make(name, packed), *products]


def _count_projection(name: str, arguments: Any, result: Tensor) -> list[Kernel]:
    """Queries, keys and values in one product."""
    _, _, x, indices, weights, *_ = arguments
    rows = x.shape[:-1].numel() if indices is None else indices.numel()
    columns = sum(weight.shape[0] for weight in weights)
    return [_make_product(name, rows, columns, weights[0].shape[1])]


def _count_attention(name: str, arguments: Any, result: Any) -> list[Kernel]:
    """Our attention, (B, S, H, E)."""
    query, key = arguments[:2]
    flops = 4 * query.numel() * key.shape[1]
    return [_make(name, count_bytes((arguments, result)), flops, rate="attention_flops")]


def _count_received(name: str, arguments: Any, result: Any) -> list[Kernel]:
    """The products of queries and keys: once more after a forward, twice without its sums."""
    query, key, lse = arguments[:3]
    flops = (4 if lse is None else 2) * query.numel() * key.shape[1]
    return [_make(name, count_bytes((arguments, result)), flops, rate="received_flops")]


def _make_product(name: str, rows: int, columns: int, depth: int) -> Kernel:
    return replace(make_product(name, rows, columns, depth), is_ours=True)


def _make(
    name: str, num_bytes: int, flops: int = 0, product: Any = None, rate: str = "flops"
) -> Kernel:
    if product is not None:
        flops = 2 * prod(product)
    return Kernel(name, num_bytes, flops, product, rate, is_ours=name.startswith(_OURS))


_COUNTED: dict[str, Callable[[str, Any, Any], list[Kernel]]] = {
    **dict.fromkeys(
        ("aten::mm", "aten::addmm", "aten::bmm", "aten::_addmm_activation"), _count_product
    ),
    "aten::convolution": _count_convolution,
    **dict.fromkeys(("aten::gather", "aten::embedding", "aten::index_select"), _count_gather),
    **dict.fromkeys(("aten::scatter_", "aten::index_copy_"), _count_scatter),
    **dict.fromkeys(("aten::copy_", "aten::fill_", "aten::zero_"), _count_fill),
    f"{_OURS}gather_rows": _count_gather,
    f"{_OURS}gather_modulate": _count_gather,
    f"{_OURS}scatter_rows_": _count_scatter,
    f"{_OURS}linear": _count_linear,
    f"{_OURS}linear_scatter_": _count_linear_scatter,
    f"{_OURS}mlp_": _count_mlp,
    f"{_OURS}project_qkv_": _count_projection,
    f"{_OURS}attention": _count_attention,
    f"{_OURS}attention_with_entropy": _count_attention,
    f"{_OURS}attention_received": _count_received,
}
