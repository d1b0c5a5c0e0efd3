"""Selection of tokens: combined scores, exact top-k, updated staleness."""

from torch import Tensor

from .loading import OPS


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
    """Combine the scores, take the top tokens, update the staleness, for each step in turn."""
    L, B, N = scores.shape
    P = 1 if num_fresh is None else num_fresh.shape[0]
    indices = staleness.new_empty(P, L, B, max_fresh)
    positions = staleness.new_empty(P, L, B, N)
    if num_fresh is not None:
        num_fresh = num_fresh.contiguous()
    OPS.select_tokens_(
        scores.float().contiguous(), staleness, num_fresh, max_fresh, staleness_weight, normalize,
        *(grid or (0, 0)), tile, bonus, indices, positions,
    )  # fmt: skip
    return indices, positions


def invert_indices(indices: Tensor, num_tokens: int) -> Tensor:
    """positions[b, indices[b, s]] = s, and -1 for every token that is not selected."""
    positions = indices.new_empty(indices.shape[0], num_tokens)
    OPS.invert_indices(indices, positions)
    return positions
