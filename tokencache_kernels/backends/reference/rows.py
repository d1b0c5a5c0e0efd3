"""Gathering and scattering rows."""

import torch
import torch.nn.functional as F
from torch import Tensor


def split_empty(indices: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Indices that are safe to use, and which slots hold a token."""
    live = (indices >= 0) & (indices < num_tokens)
    return torch.where(live, indices, 0).long(), live


def gather_rows(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """out[b, s] = hidden_states[b, indices[b, s]]; an empty slot: 0."""
    B, N, D = hidden_states.shape
    if N == 0:
        return hidden_states.new_zeros(B, indices.shape[1], D)
    safe, live = split_empty(indices, N)
    rows = hidden_states.gather(1, safe[..., None].expand(-1, -1, D))
    return torch.where(live[..., None], rows, 0)


def scatter_rows_(cache: Tensor, indices: Tensor, rows: Tensor) -> None:
    """cache[b, indices[b, s]] = rows[b, s]; an empty slot writes nothing."""
    _, N, D = cache.shape
    safe, live = split_empty(indices, N)
    # empty slots are sent to one row past the end, which is then dropped: no host synchronisation
    target = torch.where(live, safe, N)
    padded = F.pad(cache, (0, 0, 0, 1))
    padded = padded.scatter(1, target[..., None].expand(-1, -1, D), rows)
    cache.copy_(padded[:, :N])
