"""Gated sums over all rows; LayerNorm and adaLN modulation of the selected ones."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import gather_rows, split_empty


def sum_branches(
    hidden_states: Tensor, branches: list[Tensor], gates: list[Tensor | None]
) -> Tensor:
    """hidden_states + sum_j gates[j] * branches[j], added in this order; a gate of None is 1."""
    total = hidden_states
    for branch, gate in zip(branches, gates, strict=True):
        total = total + (branch if gate is None else gate[:, None] * branch)
    return total


def add_branches(
    out: Tensor, hidden_states: Tensor, branches: list[Tensor], gates: list[Tensor | None]
) -> None:
    """out = hidden_states + sum_j gates[j] * branches[j]."""
    out.copy_(sum_branches(hidden_states, branches, gates))


def gather_modulate(
    hidden_states: Tensor, indices: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """out[b, s] = layer_norm(hidden_states[b, indices[b, s]]) * (1 + scale[b]) + shift[b]."""
    _, N, D = hidden_states.shape
    rows = gather_rows(hidden_states, indices)
    rows = F.layer_norm(rows, (D,), eps=eps) * (1 + scale[:, None]) + shift[:, None]
    _, live = split_empty(indices, N)
    return torch.where(live[..., None], rows, 0)


def row_pass(
    out: Tensor,
    hidden_states: Tensor,
    branches: list[Tensor],
    gates: list[Tensor | None],
    indices: Tensor,
    positions: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> Tensor:
    """``add_branches`` over all rows, then ``gather_modulate`` of the selected ones."""
    add_branches(out, hidden_states, branches, gates)
    return gather_modulate(out, indices, shift, scale, eps)
