"""The MLP of the selected tokens."""

from torch import Tensor

from ..reference import RowNorm
from .linear import linear, linear_scatter_
from .modulate import gather_modulate


def mlp_(
    cache: Tensor,
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    norm: RowNorm,
    vector_index: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> None:
    """cache[b, i] = fc2(hidden), of rows = norm(x[b, i]) * (1 + scale) + shift.

    hidden = activation(fc1(rows)), or with a gate, activation(gate(rows)) * fc1(rows).
    """
    rows = gather_modulate(hidden_states, indices, shift, scale, norm, vector_index)
    factor = None
    if gate_weight is not None:
        factor = linear(rows, gate_weight, gate_bias, activation, None)
        activation = "none"
    rows = linear(rows, fc1_weight, fc1_bias, activation, None, factor)
    linear_scatter_(cache, indices, rows, fc2_weight, fc2_bias, None, False)
