"""Linear layers on packed rows: one launch on a GPU; on the CPU oneDNN, which fuses the activation.

Packing a weight costs about as much as one small product. It is done when the weight is first used,
and again after it was written to; the packed copy lives as long as the weight's memory.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import settings
from ..reference.linear import ACTIVATIONS
from .loading import OPS
from .rows import gather_rows, scatter_rows_

# oneDNN's name of each activation, and its kind
_FUSED = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"),
          "silu": ("swish", "")}  # fmt: skip

# a weight of fewer elements is not packed: looking after its copy takes longer than its product
_SMALL = 128 * 128

# of a weight, compared at each use: elements of it, and one of so many pieces
_SAMPLES, _PIECES = 509, 64


@dataclass
class _Packed:
    """A packed copy of a weight, and the marks by which a change of the weight is noticed.

    Attributes:
        packed: in oneDNN's layout.
        version: the weight's version counter, which most writes move.
        sample: some elements of it, far apart.
        sums: of each of its ``_PIECES`` pieces, as integers.
        num_uses: so far; the pieces take turns.
    """

    packed: Tensor
    version: int
    sample: Tensor
    sums: list[int]
    num_uses: int = 0

    @classmethod
    def of(cls, weight: Tensor) -> "_Packed":
        """Pack a weight."""
        return cls(
            packed=torch.ops.mkldnn._reorder_linear_weight(weight.contiguous()),
            version=weight._version,
            sample=_sample(weight).clone(),
            sums=[_sum_piece(weight, piece) for piece in range(_PIECES)],
        )

    def is_of(self, weight: Tensor) -> bool:
        """Tell whether the weight seems unchanged: by version, by sample, by one whole piece."""
        self.num_uses += 1
        piece = self.num_uses % _PIECES
        return (
            self.version == weight._version
            and torch.equal(self.sample, _sample(weight))
            and self.sums[piece] == _sum_piece(weight, piece)
        )


def _span(weight: Tensor) -> int:
    """Count the elements from its first to its last, gaps included."""
    O, K = weight.shape  # noqa: E741
    return (O - 1) * weight.stride(0) + K


def _sample(weight: Tensor) -> Tensor:
    """A view of about ``_SAMPLES`` elements, evenly spread."""
    step = max(_span(weight) // _SAMPLES, 1)
    return weight.as_strided(((_span(weight) - 1) // step + 1,), (step,))


def _sum_piece(weight: Tensor, piece: int) -> int:
    """The sum of the bits in one piece of the memory that a weight spans, 8 bytes at a time."""
    storage = weight.untyped_storage()
    first = weight.storage_offset() * weight.itemsize // 8
    last = ((weight.storage_offset() + _span(weight)) * weight.itemsize + 7) // 8
    size = (last - first) // _PIECES + 1
    start = first + piece * size
    end = min(start + size, last, storage.nbytes() // 8)
    if end <= start:
        return 0
    numbers = torch.empty(0, dtype=torch.int64, device="cpu")
    return int(numbers.set_(storage, start, (end - start,), (1,)).sum())


class _PackedWeights:
    """Packed copies by the storage that holds the weight, and by the part of it.

    Parts that are kept never overlap, so they never take more memory than the weight. They go as
    soon as the storage does: when the weight dies, or moves to another device or dtype. It is the
    storage that is watched, since tensors with a weak reference cannot be swapped.
    """

    def __init__(self) -> None:
        self._parts_of: dict[int, dict[Any, _Packed]] = {}
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def find(self, weight: Tensor) -> Tensor:
        """The packed copy of ``weight`` as it is now."""
        weight = weight.detach()
        storage = weight.untyped_storage()
        parts = self._parts_in(storage)
        start = weight.data_ptr()
        end = start + _span(weight) * weight.itemsize
        part = (start, weight.shape, weight.stride(), weight.dtype, end)
        found = parts.get(part)
        if found is None or not found.is_of(weight):
            for other in [other for other in parts if _overlap(part, other)]:
                del parts[other]
            found = parts[part] = _Packed.of(weight)
        return found.packed

    def drop(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Forget the copies of these weights, or all."""
        if tensors is None:
            self._parts_of.clear()
            self._storages.clear()
            return
        for tensor in tensors:
            if type(tensor).__torch_dispatch__ is Tensor.__torch_dispatch__:
                self._forget(tensor.untyped_storage()._cdata)

    def _parts_in(self, storage: torch.UntypedStorage) -> dict[Any, _Packed]:
        key = storage._cdata
        known = self._storages.get(key)
        if known is None or known() is not storage:
            self._forget(key)
            self._parts_of[key] = {}
            self._storages[key] = weakref.ref(storage, lambda _: self._forget(key))
        return self._parts_of[key]

    def _forget(self, key: int) -> None:
        self._parts_of.pop(key, None)
        self._storages.pop(key, None)


def _overlap(part: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Tell whether two parts of a storage share memory, from the first byte of each to its last."""
    (start, *_, end), (other_start, *_, other_end) = part, other
    return bool(start < other_end and other_start < end)


_weights = _PackedWeights()


def drop_packed_weights(module: nn.Module | None = None) -> None:
    """Forget the packed copies of a module's weights, or of all weights.

    On the CPU a weight is packed for oneDNN when an op first uses it. Whatever writes to the weight
    afterwards is seen: by its version counter where it moves that, else by its address, dtype and
    a sample of some 500 elements compared at each use. A smaller write than that, by a way that
    moves no version counter (``weight.data[3, 5] = 0``), may go unseen for up to 64 uses, after
    which all of the weight has been compared: drop the copies after such a write.

    Args:
        module: whose parameters and buffers; None: all.
    """
    if module is None:
        _weights.drop()
    else:
        _weights.drop([*module.parameters(), *module.buffers()])


def _can_pack(weight: Tensor) -> bool:
    """Tell whether oneDNN multiplies in this dtype on this processor, with packing turned on."""
    if weight.numel() < _SMALL or weight.is_inference() or not settings.packs_weights():
        return False
    if not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32


def _has_kernel(x: Tensor) -> bool:
    """Tell whether the library itself multiplies."""
    return x.is_cuda


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    indices: Tensor | None,
    factor: Tensor | None = None,
) -> Tensor:
    """activation(rows @ weight.T + bias) [* factor], rows = x, or x gathered by ``indices``."""
    if _has_kernel(x):
        fused: Tensor = OPS.linear(x, weight, bias, activation, indices, factor)
        return fused
    rows = x if indices is None else gather_rows(x, indices)
    if rows.numel() == 0 or not _can_pack(weight):
        out = ACTIVATIONS[activation](F.linear(rows, weight, bias))
        return out if factor is None else out.mul_(factor)
    packed = _weights.find(weight)
    if factor is not None:
        gated: Tensor = torch.ops.mkldnn._linear_pointwise.binary(rows, factor, packed, bias, "mul")
        return gated
    name, kind = _FUSED[activation]
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, name, [], kind)
    return result


def linear_scatter_(
    cache: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: bool,
    features: Tensor | None = None,
) -> None:
    """cache[b, indices[b, s]] = [its old value +] [gate[b] *] (row[b, s] @ weight.T + bias).

    row = x, or with features, those of the token and then x.
    """
    if features is not None:
        x = torch.cat([gather_rows(features, indices), x], dim=-1)
    if _has_kernel(x):
        OPS.linear_scatter_(cache, indices, x, weight, bias, gate, residual)
        return
    rows = linear(x, weight, bias, "none", None)
    if gate is not None:
        rows *= gate[:, None]
    if residual:
        rows += gather_rows(cache, indices)
    scatter_rows_(cache, indices, rows)
