"""Linear layers on packed rows."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import gather_rows, scatter_rows_

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    indices: Tensor | None,
    factor: Tensor | None = None,
) -> Tensor:
    """activation(rows @ weight.T + bias) [* factor], rows = x, or x gathered by ``indices``.

    The factor (B, S, O) of a gated layer is the other product, activated.
    """
    rows = x if indices is None else gather_rows(x, indices)
    out = ACTIVATIONS[activation](F.linear(rows, weight, bias))
    return out if factor is None else factor * out


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
    rows = F.linear(x, weight, bias)
    if gate is not None:
        rows = gate[:, None] * rows
    if residual:
        rows = gather_rows(cache, indices) + rows
    scatter_rows_(cache, indices, rows)
