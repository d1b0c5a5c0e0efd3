"""Selection of tokens: combined scores, exact top-k, updated staleness."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import split_empty


def select_tokens_(
    scores: Tensor,
    staleness: Tensor,
    num_fresh: Tensor | None,
    max_fresh: int,
    staleness_weight: float,
    normalize: bool,
    grid: tuple[int, int] | None,
    tile: int,
    bonus: float,
) -> tuple[Tensor, Tensor]:
    """For each step of a cycle in turn: combine the scores, take the top tokens, update the
    staleness.

    Takes scores (L, B, N), staleness (L, B, N) int32, which is updated in place, and num_fresh (P,
    L) int32, or None for ``max_fresh`` everywhere. Returns indices (P, L, B, max_fresh) int32,
    ascending, padded with -1, and positions (P, L, B, N) int32, the slot of each token or -1.
    """
    base = combine_base(scores, normalize)
    num_steps = 1 if num_fresh is None else num_fresh.shape[0]
    indices, positions = [], []
    for step in range(num_steps):
        combined = base + staleness_weight * staleness.float()
        if grid is not None:
            combined = add_tile_bonus(combined, grid, tile, bonus)
        count = max_fresh if num_fresh is None else num_fresh[step][:, None, None]
        step_indices, step_positions = _top_tokens(combined, count, max_fresh)
        staleness.copy_(torch.where(step_positions >= 0, 0, staleness + 1))
        indices.append(step_indices)
        positions.append(step_positions)
    if not indices:
        L, B, N = scores.shape
        return staleness.new_empty(0, L, B, max_fresh), staleness.new_empty(0, L, B, N)
    return torch.stack(indices), torch.stack(positions)


def combine_base(scores: Tensor, normalize: bool) -> Tensor:
    """The score in float32, over its L2 norm over the tokens (NaN left out) if ``normalize``."""
    base = scores.float()
    if normalize:
        known = base.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        norm = known.norm(dim=-1, keepdim=True)
        # squares beyond float32: everything smaller by a power of two
        factor = torch.where(norm.isinf(), 2.0**-80, 1.0)
        norm = torch.where(norm.isinf(), (known * factor).norm(dim=-1, keepdim=True), norm)
        base = base * factor / norm.clamp_min(1e-12)
    return base


def add_tile_bonus(scores: Tensor, grid: tuple[int, int], tile: int, bonus: float) -> Tensor:
    """Multiply the best score of every tile x tile square by (1 + bonus); ties: the lowest."""
    height, width = grid
    lead = scores.shape[:-1]
    ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    squares = ranked.reshape(-1, 1, height, width)
    squares = F.pad(squares, (0, -width % tile, 0, -height % tile), value=-torch.inf)
    rows, columns = squares.shape[-2] // tile, squares.shape[-1] // tile
    squares = squares.reshape(-1, rows, tile, columns, tile).transpose(2, 3).flatten(-2)
    # argmax does not promise the first of equals; a stable sort does
    winner = squares.sort(dim=-1, descending=True, stable=True).indices[..., :1]
    won = torch.zeros_like(squares).scatter(-1, winner, 1.0)
    won = won.unflatten(-1, (tile, tile)).transpose(2, 3).reshape(-1, rows * tile, columns * tile)
    won = won[:, :height, :width].reshape(*lead, height * width)
    return torch.where(won > 0, scores * (1.0 + bonus), scores)


def _top_tokens(scores: Tensor, count: int | Tensor, max_fresh: int) -> tuple[Tensor, Tensor]:
    """The ``count`` highest scores: ties go to the lowest index, NaN ranks below everything."""
    N = scores.shape[-1]
    ranked = scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    places = torch.arange(N, device=scores.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(-1, order, places)
    fresh = (rank < count) & (rank < max_fresh)
    positions = torch.where(fresh, fresh.cumsum(-1) - 1, -1).int()
    slots = torch.where(fresh, positions, max_fresh).long()
    indices = torch.full(
        (*scores.shape[:-1], max_fresh + 1), -1, dtype=torch.int32, device=scores.device
    )
    indices = indices.scatter(-1, slots, places.int())[..., :max_fresh]
    return indices.contiguous(), positions


def invert_indices(indices: Tensor, num_tokens: int) -> Tensor:
    """positions[b, indices[b, s]] = s, and -1 for every token that is not selected."""
    safe, live = split_empty(indices, num_tokens)
    target = torch.where(live, safe, num_tokens)
    slots = torch.arange(indices.shape[1], dtype=torch.int32, device=indices.device)
    positions = slots.new_full((indices.shape[0], num_tokens + 1), -1)
    return positions.scatter(1, target, slots.expand_as(target))[:, :num_tokens].contiguous()
