"""The MLP of the selected tokens."""

from torch import Tensor

from .linear import linear, linear_scatter_
from .modulate import gather_modulate


def mlp_(
    cache: Tensor,
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    eps: float,
) -> None:
    """cache[b, i] = fc2(activation(fc1(layer_norm(x[b, i]) * (1 + scale[b]) + shift[b])))."""
    rows = gather_modulate(hidden_states, indices, shift, scale, eps)
    rows = linear(rows, fc1_weight, fc1_bias, activation, None)
    linear_scatter_(cache, indices, rows, fc2_weight, fc2_bias, None, False)
