"""The public functional API, one file per family: check, then hand over to a backend.

Every op is registered with PyTorch under ``torch.ops.tokencache_kernels`` with a fake
implementation; in-place ops end in ``_`` and return their argument. No op synchronises with the
host.
"""

from ..backends.native.linear import drop_packed_weights
from ..backends.reference import QkNorm, RowNorm
from .attention import attention, attention_with_entropy
from .blend import blend
from .linear import linear, linear_scatter, linear_scatter_
from .mlp import mlp, mlp_
from .modulate import add_branches, add_branches_, gather_modulate, row_pass, row_pass_
from .project import project_qkv, project_qkv_
from .rows import gather_rows, scatter_rows, scatter_rows_
from .select import invert_indices, select_cycle, select_cycle_, select_tokens, select_tokens_
from .statistics import attention_entropy, attention_received, head_norms, token_change

__all__ = [
    "QkNorm",
    "RowNorm",
    "add_branches",
    "add_branches_",
    "attention",
    "attention_entropy",
    "attention_received",
    "attention_with_entropy",
    "blend",
    "drop_packed_weights",
    "gather_modulate",
    "gather_rows",
    "head_norms",
    "invert_indices",
    "linear",
    "linear_scatter",
    "linear_scatter_",
    "mlp",
    "mlp_",
    "project_qkv",
    "project_qkv_",
    "row_pass",
    "row_pass_",
    "scatter_rows",
    "scatter_rows_",
    "select_cycle",
    "select_cycle_",
    "select_tokens",
    "select_tokens_",
    "token_change",
]
