"""The specification: every op in plain PyTorch, by which each fast path is judged.

Runs on any device and in any floating dtype, and is differentiable. Every function computes in the
dtype it is given, so that float64 inputs give the exact result and low-precision inputs the
rounding of eager PyTorch. But attention maps with their log-sum-exps, statistics and the weights of
a blend are float32, float64 of float64; and selection is float32, whatever it is given. An index
outside [0, N) is an empty slot: it reads zeros and writes nothing.

The backends share one contract: functions named like the ops, inputs already checked, in-place
functions return nothing, and ``out`` may be the input itself.
"""

import torch

from .attention import attention, attention_with_entropy
from .blend import blend, blend_backward
from .linear import linear, linear_scatter_
from .mlp import mlp_
from .modulate import RowNorm, add_branches, gather_modulate, row_pass, sum_branches
from .project import QkNorm, finish_heads, project_qkv_
from .rows import gather_rows, scatter_rows_
from .select import add_tile_bonus, combine_base, invert_indices, select_tokens_
from .statistics import attention_entropy, attention_received, head_norms, token_change

__all__ = [
    "QkNorm",
    "RowNorm",
    "add_branches",
    "add_tile_bonus",
    "attention",
    "attention_entropy",
    "attention_received",
    "attention_with_entropy",
    "blend",
    "blend_backward",
    "combine_base",
    "finish_heads",
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
    "sum_branches",
    "token_change",
    "unavailable",
]


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain PyTorch runs everywhere."""
    return None
