"""Gated sums over all rows; the norm and the adaLN modulation of the selected ones."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import gather_rows, split_empty


class RowNorm(NamedTuple):
    """The norm of a row, before its modulation, or of a branch, before its gate.

    ``normalised * (weight_offset + weight) + bias``; ``normalised`` is the row over the root of its
    mean square (``"rms"``), the same of the row less its mean (``"layer"``), or the row as it is
    (``"none"``).

    Attributes:
        kind: ``"layer"``, ``"rms"`` or ``"none"``; a branch has ``"rms"``.
        weight: (D,), or None for a factor of 1.
        bias: (D,), or None.
        weight_offset: 1 where a model keeps ``weight - 1``, else 0.
        eps: added to the variance, or to the mean square.
    """

    kind: str = "layer"
    weight: Tensor | None = None
    bias: Tensor | None = None
    weight_offset: float = 0.0
    eps: float = 1e-6


def sum_branches(
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    branch_norms: Sequence[RowNorm | None] = (),
    vector_index: Tensor | None = None,
) -> Tensor:
    """hidden_states + sum_j gates[j] * norms[j](branches[j]), added in this order.

    A gate of None is 1; vectors are as ``vectors_of`` takes them.
    """
    total = hidden_states
    norms = branch_norms or (None,) * len(branches)
    for branch, gate, norm in zip(branches, gates, norms, strict=True):
        term = branch if norm is None else normalise(branch, norm)
        total = total + (term if gate is None else vectors_of(gate, vector_index) * term)
    return total


def add_branches(
    out: Tensor,
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    branch_norms: Sequence[RowNorm | None] = (),
    vector_index: Tensor | None = None,
) -> None:
    """out = hidden_states + sum_j gates[j] * norms[j](branches[j])."""
    out.copy_(sum_branches(hidden_states, branches, gates, branch_norms, vector_index))


def gather_modulate(
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    norm: RowNorm,
    vector_index: Tensor | None = None,
) -> Tensor:
    """out[b, s] = norm(hidden_states[b, i]) * (1 + scale[b, i]) + shift[b, i], i = indices[b, s].

    Vectors are as ``vectors_of`` takes them; a scale or shift of None is 0.
    """
    N = hidden_states.shape[1]
    rows = normalise(gather_rows(hidden_states, indices), norm)
    if scale is not None:
        rows = rows * (1 + _take(vectors_of(scale, vector_index), indices, N))
    if shift is not None:
        rows = rows + _take(vectors_of(shift, vector_index), indices, N)
    _, live = split_empty(indices, N)
    return torch.where(live[..., None], rows, 0)


def row_pass(
    out: Tensor,
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    indices: Tensor,
    positions: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    norm: RowNorm,
    branch_norms: Sequence[RowNorm | None] = (),
    vector_index: Tensor | None = None,
) -> Tensor:
    """``add_branches`` over all rows, then ``gather_modulate`` of the selected ones."""
    add_branches(out, hidden_states, branches, gates, branch_norms, vector_index)
    return gather_modulate(out, indices, shift, scale, norm, vector_index)


def normalise(rows: Tensor, norm: RowNorm) -> Tensor:
    """Rows (..., D), normalised."""
    shape, weight = rows.shape[-1:], norm.weight
    if weight is not None and norm.weight_offset != 0:
        weight = norm.weight_offset + weight
    if norm.kind == "layer":
        return F.layer_norm(rows, shape, weight, norm.bias, norm.eps)
    if norm.kind == "rms":
        rows = F.rms_norm(rows, shape, weight, norm.eps)
    elif weight is not None:
        rows = rows * weight
    return rows if norm.bias is None else rows + norm.bias


def vectors_of(vectors: Tensor, vector_index: Tensor | None) -> Tensor:
    """Each token's vector, (B, N, D) or (B, 1, D).

    (B, D) gives one vector to each sample, (B, N, D) one to each token. With ``vector_index`` (B,
    N), (B, K, D) gives the vector of that number, clipped to [0, K).
    """
    if vectors.dim() == 2:
        return vectors[:, None]
    if vector_index is None:
        return vectors
    _, K, D = vectors.shape
    return vectors.gather(1, vector_index.clamp(0, K - 1).long()[..., None].expand(-1, -1, D))


def _take(vectors: Tensor, indices: Tensor, num_tokens: int) -> Tensor:
    """Those of the selected tokens, where each token has one."""
    if vectors.shape[1] != num_tokens or num_tokens == 0:
        return vectors
    return gather_rows(vectors, indices)
