"""Gated sums over all rows; the norm and the adaLN modulation of the selected ones."""

from collections.abc import Sequence

from torch import Tensor

from ..reference import RowNorm
from .loading import OPS


def add_branches(
    out: Tensor,
    hidden_states: Tensor,
    branches: list[Tensor],
    gates: list[Tensor | None],
    branch_norms: Sequence[RowNorm | None] = (),
    vector_index: Tensor | None = None,
) -> None:
    """out = hidden_states + sum_j gates[j] * norms[j](branches[j])."""
    OPS.add_branches(
        out, hidden_states, branches, gates, *_flatten_norms(branch_norms), vector_index
    )


def gather_modulate(
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    norm: RowNorm,
    vector_index: Tensor | None = None,
) -> Tensor:
    """out[b, s] = norm(hidden_states[b, indices[b, s]]) * (1 + scale) + shift."""
    packed: Tensor = OPS.gather_modulate(
        hidden_states, indices, shift, scale, *_flatten_norm(norm), vector_index
    )
    return packed


def row_pass(
    out: Tensor,
    hidden_states: Tensor,
    branches: list[Tensor],
    gates: list[Tensor | None],
    indices: Tensor,
    positions: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    norm: RowNorm,
    branch_norms: Sequence[RowNorm | None] = (),
    vector_index: Tensor | None = None,
) -> Tensor:
    """``add_branches`` over all rows, then ``gather_modulate`` of the selected ones."""
    packed: Tensor = OPS.row_pass(
        out, hidden_states, branches, gates, *_flatten_norms(branch_norms), indices, positions,
        shift, scale, *_flatten_norm(norm), vector_index,
    )  # fmt: skip
    return packed


def _flatten_norm(norm: RowNorm) -> tuple[str, Tensor | None, Tensor | None, float, float]:
    return norm.kind, norm.weight, norm.bias, norm.weight_offset, norm.eps


def _flatten_norms(
    norms: Sequence[RowNorm | None],
) -> tuple[list[Tensor | None], list[float], list[float]]:
    """Weights, offsets and eps of the branches' norms; an ``eps`` below 0 stands for none."""
    if not norms:
        return [], [], []
    return (
        [None if norm is None else norm.weight for norm in norms],
        [0.0 if norm is None else norm.weight_offset for norm in norms],
        [-1.0 if norm is None else norm.eps for norm in norms],
    )
