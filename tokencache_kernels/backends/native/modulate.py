"""Gated sums over all rows; LayerNorm and adaLN modulation of the selected ones."""

from torch import Tensor

from .loading import OPS


def add_branches(
    out: Tensor, hidden_states: Tensor, branches: list[Tensor], gates: list[Tensor | None]
) -> None:
    """out = hidden_states + sum_j gates[j] * branches[j]."""
    OPS.add_branches(out, hidden_states, branches, gates)


def gather_modulate(
    hidden_states: Tensor, indices: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """out[b, s] = layer_norm(hidden_states[b, indices[b, s]]) * (1 + scale[b]) + shift[b]."""
    packed: Tensor = OPS.gather_modulate(hidden_states, indices, shift, scale, eps)
    return packed


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
    packed: Tensor = OPS.row_pass(
        out, hidden_states, branches, gates, indices, positions, shift, scale, eps
    )
    return packed
