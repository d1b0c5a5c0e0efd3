"""Timed cases: the shapes, and for each op family our calls and their baselines."""

from . import attention, blend, linear, mlp, modulate, project, rows, select, statistics
from .op import Inputs, Op, bind
from .shapes import (
    ATTENTION_SHAPES,
    CPU_ATTENTION_SHAPES,
    CPU_SHAPES,
    LEADING,
    RATIOS,
    SHAPES,
    TINY,
    Shape,
)

FAMILIES = (modulate, select, mlp, linear, project, statistics, rows, blend, attention)
OPS = {op.name: op for family in FAMILIES for op in family.OPS}
# the ops of a partial step, and the scores of a full one
KEY_OPS = tuple(
    OPS[name]
    for name in (
        "row_pass_", "select_tokens_", "mlp_", "linear", "linear_scatter_", "attention_received",
    )
)  # fmt: skip

__all__ = [
    "ATTENTION_SHAPES",
    "CPU_ATTENTION_SHAPES",
    "CPU_SHAPES",
    "KEY_OPS",
    "LEADING",
    "OPS",
    "RATIOS",
    "SHAPES",
    "TINY",
    "Inputs",
    "Op",
    "Shape",
    "bind",
]
