"""The native library: C++ loops registered as torch ops of their own, loaded on first use."""

import torch

from .attention import attention, attention_with_entropy
from .blend import blend, blend_backward
from .linear import linear, linear_scatter_
from .loading import (
    build_info,
    cpu_instructions,
    library_path,
    load_cuda_library,
    load_library,
    refuse_gpu,
)
from .mlp import mlp_
from .modulate import add_branches, gather_modulate, row_pass
from .project import project_qkv_
from .resources import read_resources, summarise_resources
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
    "build_info",
    "cpu_instructions",
    "gather_modulate",
    "gather_rows",
    "head_norms",
    "invert_indices",
    "library_path",
    "linear",
    "linear_scatter_",
    "mlp_",
    "project_qkv_",
    "read_resources",
    "row_pass",
    "scatter_rows_",
    "select_tokens_",
    "summarise_resources",
    "token_change",
    "unavailable",
]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """The library must be there, and on a GPU its CUDA half."""
    if device.type == "cpu":
        return load_library()
    if device.type == "cuda" and dtype == torch.float64:
        return "its CUDA half computes in float32 and does not take float64"
    if device.type == "cuda":
        return load_library() or load_cuda_library() or refuse_gpu(device)
    return f"it needs a CPU or CUDA tensor, got {device.type}"
