"""Linear layers on packed rows: one launch on a GPU; on the CPU oneDNN, which fuses the activation.

Packing a weight costs about as much as one small product. It is done once, when the weight is first
used, and the packed copy lives as long as the weight itself.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ... import settings
from ..reference.linear import ACTIVATIONS
from .loading import OPS
from .rows import gather_rows, scatter_rows_

# what oneDNN calls an activation, and which kind of it
_FUSED = {"none": ("none", ""), "gelu": ("gelu", "none"), "gelu_tanh": ("gelu", "tanh"),
          "silu": ("swish", "")}  # fmt: skip


class _PackedWeights:
    """Packed copies by weight: by the tensor that owns the memory, and the view of it."""

    def __init__(self) -> None:
        self._views_of = WeakTensorKeyDictionary()

    def find(self, weight: Tensor) -> Tensor:
        """The packed copy of ``weight`` as it is now."""
        owner = weight if weight._base is None else weight._base
        views: dict[Any, tuple[int, Tensor]] = self._views_of.setdefault(owner, {})
        view = (weight.storage_offset(), weight.shape, weight.stride())
        version = weight._version  # grows with every write, through whatever view
        if view not in views or views[view][0] != version:
            packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
            views[view] = (version, packed)
        return views[view][1]


_weights = _PackedWeights()


def _can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies in this dtype on this processor, and packing is not turned off."""
    if not settings.packs_weights() or weight.is_inference() or weight.numel() == 0:
        return False
    if not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32


def _has_kernel(x: Tensor) -> bool:
    """Whether the library itself multiplies."""
    return x.is_cuda


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, indices: Tensor | None
) -> Tensor:
    """activation(rows @ weight.T + bias), where rows = x, or x gathered by ``indices``."""
    if _has_kernel(x):
        fused: Tensor = OPS.linear(x, weight, bias, activation, indices)
        return fused
    rows = x if indices is None else gather_rows(x, indices)
    if rows.numel() == 0 or not _can_pack(weight):
        return ACTIVATIONS[activation](F.linear(rows, weight, bias))
    packed = _weights.find(weight)
    name, kind = _FUSED[activation]
    out: Tensor = torch.ops.mkldnn._linear_pointwise(rows, packed, bias, name, [], kind)
    return out


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
