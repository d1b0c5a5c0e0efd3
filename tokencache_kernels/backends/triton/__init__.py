"""Triton kernels with their launchers, one file per family."""

import torch

from ._device import INTERPRETED
from .attention import attention, attention_with_entropy
from .blend import blend, blend_backward
from .linear import linear, linear_scatter_
from .mlp import mlp_
from .modulate import add_branches, gather_modulate, row_pass
from .project import project_qkv_
from .rows import gather_rows, scatter_rows_
from .select import invert_indices, select_tokens_
from .statistics import attention_entropy, attention_received, head_norms, token_change

__all__ = [
    "add_branches",
    "attention",
    "attention_entropy",
    "attention_received",
    "attention_with_entropy",
    "blend",
    "blend_backward",
    "gather_modulate",
    "gather_rows",
    "head_norms",
    "invert_indices",
    "linear",
    "linear_scatter_",
    "mlp_",
    "project_qkv_",
    "row_pass",
    "scatter_rows_",
    "select_tokens_",
    "token_change",
    "unavailable",
]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The reason why no kernel can run on ``device`` in ``dtype``, or None."""
    if dtype == torch.float64:
        return "it accumulates in float32 and does not take float64"
    if INTERPRETED.value:
        return None if device.type == "cpu" else f"TRITON_INTERPRET=1 needs the CPU, got {device}"
    if device.type == "cuda":
        return None
    return f"it needs a CUDA device (or TRITON_INTERPRET=1), got {device}"
