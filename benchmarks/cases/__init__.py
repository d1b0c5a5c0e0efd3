"""What is timed: the shapes, and of each op family our calls and what they are compared with."""

from . import attention, blend, linear, mlp, modulate, project, rows, select, statistics
from .op import Inputs, Op, bind
from .shapes import (
    ATTENTION_SHAPES,
    CPU_ATTENTION_SHAPES,
    CPU_LEADING,
    CPU_SHAPES,
    LEADING,
    RATIOS,
    SHAPES,
    TINY,
    Shape,
)

# the most telling first
FAMILIES = (modulate, select, mlp, linear, project, statistics, rows, blend, attention)
OPS = {op.name: op for family in FAMILIES for op in family.OPS}

__all__ = [
    "ATTENTION_SHAPES",
    "CPU_ATTENTION_SHAPES",
    "CPU_LEADING",
    "CPU_SHAPES",
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
