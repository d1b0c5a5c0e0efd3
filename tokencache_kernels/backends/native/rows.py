"""Gathering and scattering rows."""

from torch import Tensor

from .loading import OPS


def gather_rows(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """out[b, s] = hidden_states[b, indices[b, s]]; an empty slot: 0."""
    out: Tensor = OPS.gather_rows(hidden_states, indices)
    return out


def scatter_rows_(cache: Tensor, indices: Tensor, rows: Tensor) -> None:
    """cache[b, indices[b, s]] = rows[b, s]; an empty slot writes nothing."""
    OPS.scatter_rows_(cache, indices, rows)
