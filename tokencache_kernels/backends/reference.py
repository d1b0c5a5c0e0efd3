"""What every op means, in plain PyTorch: the specification that each fast path is judged by.

Runs on any device and in any floating dtype, and is differentiable. Every function computes in the
dtype it is given, so that float64 inputs give the exact result and low-precision inputs the
rounding of eager PyTorch. An index outside [0, N) is an empty slot: it reads zeros and writes
nothing.

The backends share one contract: functions named like the ops, inputs already checked, in-place
functions return nothing, and ``out`` may be the input itself.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def unavailable(device: torch.device, dtype: torch.dtype) -> str | None:
    """Plain PyTorch runs everywhere."""
    return None


# rows


def _split_empty(indices: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Indices that are safe to use, and which slots hold a token."""
    live = (indices >= 0) & (indices < num_tokens)
    return torch.where(live, indices, 0).long(), live


def gather_rows(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """out[b, s] = hidden_states[b, indices[b, s]]; an empty slot: 0."""
    B, N, D = hidden_states.shape
    if N == 0:
        return hidden_states.new_zeros(B, indices.shape[1], D)
    safe, live = _split_empty(indices, N)
    rows = hidden_states.gather(1, safe[..., None].expand(-1, -1, D))
    return torch.where(live[..., None], rows, 0)


def scatter_rows_(cache: Tensor, indices: Tensor, rows: Tensor) -> None:
    """cache[b, indices[b, s]] = rows[b, s]; an empty slot writes nothing."""
    _, N, D = cache.shape
    safe, live = _split_empty(indices, N)
    # empty slots are sent to one row past the end, which is then dropped: no host synchronisation
    target = torch.where(live, safe, N)
    padded = F.pad(cache, (0, 0, 0, 1))
    padded = padded.scatter(1, target[..., None].expand(-1, -1, D), rows)
    cache.copy_(padded[:, :N])


# select


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

    scores (L, B, N); staleness (L, B, N) int32, updated in place; num_fresh (P, L) int32, or None
    for ``max_fresh`` everywhere. Returns indices (P, L, B, max_fresh) int32, ascending, filled up
    with -1, and positions (P, L, B, N) int32, the slot of each token or -1.
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
    return torch.stack(indices), torch.stack(positions)


def combine_base(scores: Tensor, normalize: bool) -> Tensor:
    """The score in float32, over its L2 norm over the tokens (NaN left out) if ``normalize``."""
    base = scores.float()
    if normalize:
        norm = base.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf).norm(
            dim=-1, keepdim=True
        )
        base = base / norm.clamp_min(1e-12)
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
    safe, live = _split_empty(indices, num_tokens)
    target = torch.where(live, safe, num_tokens)
    slots = torch.arange(indices.shape[1], dtype=torch.int32, device=indices.device)
    positions = slots.new_full((indices.shape[0], num_tokens + 1), -1)
    return positions.scatter(1, target, slots.expand_as(target))[:, :num_tokens].contiguous()


# modulate


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
    _, live = _split_empty(indices, N)
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


# linear and mlp


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, indices: Tensor | None
) -> Tensor:
    """activation(rows @ weight.T + bias), where rows = x, or x gathered by ``indices``."""
    rows = x if indices is None else gather_rows(x, indices)
    return ACTIVATIONS[activation](F.linear(rows, weight, bias))


def linear_scatter_(
    cache: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: bool,
) -> None:
    """cache[b, indices[b, s]] = [its old value +] [gate[b] *] (x[b, s] @ weight.T + bias)."""
    rows = F.linear(x, weight, bias)
    if gate is not None:
        rows = gate[:, None] * rows
    if residual:
        rows = gather_rows(cache, indices) + rows
    scatter_rows_(cache, indices, rows)


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


# attention


def attention(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of fresh queries over all keys, and the log-sum-exp of each query's scores.

    query (B, S, H, E), key and value (B, N, H, E), key_lengths (B,) int32 or None. Returns (B, S,
    H, E) and (B, H, S); a query without any key gives zeros and -inf.
    """
    logits = _attention_logits(query, key, key_lengths, softmax_scale)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - torch.where(lse.isinf(), 0, lse)[..., None])
    return torch.einsum("bhsn,bnhe->bshe", weights, value).contiguous(), lse


def _attention_logits(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> Tensor:
    logits = torch.einsum("bshe,bnhe->bhsn", query, key) * softmax_scale
    if key_lengths is not None:
        beyond = torch.arange(key.shape[1], device=key.device) >= key_lengths[:, None]
        logits = logits.masked_fill(beyond[:, None, None], -torch.inf)
    return logits


def project_qkv_(
    key_cache: Tensor,
    value_cache: Tensor,
    x: Tensor,
    indices: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    query_norm: Tensor | None,
    key_norm: Tensor | None,
    eps: float,
    rotary: tuple[Tensor, Tensor] | None,
) -> Tensor:
    """Project packed rows to query, key and value; key and value rows go to their place in the
    caches.

    x (B, S, D); weight (3 * H * E, D), rows ordered query, key, value; caches (B, N, H, E);
    query_norm and key_norm (E,) are the weights of an RMS norm over each head; rotary: cosine and
    sine, (N, E) each, pairs interleaved, applied at each token's own position. Returns the packed
    query (B, S, H, E).
    """
    _, N, H, E = key_cache.shape
    query, key, value = F.linear(x, weight, bias).unflatten(-1, (3, H, E)).unbind(2)
    if query_norm is not None:
        query = F.rms_norm(query, (E,), query_norm, eps)
    if key_norm is not None:
        key = F.rms_norm(key, (E,), key_norm, eps)
    if rotary is not None:
        safe, _ = _split_empty(indices, N)
        cosine, sine = (table[safe][:, :, None] for table in rotary)
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
    scatter_rows_(key_cache.flatten(2), indices, key.flatten(2))
    scatter_rows_(value_cache.flatten(2), indices, value.flatten(2))
    return query.contiguous()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack((-odd, even), dim=-1).flatten(-2) * sine


# statistics


def attention_received(
    query: Tensor, key: Tensor, lse: Tensor | None, softmax_scale: float
) -> Tensor:
    """The attention each key receives, averaged over the queries: (B, H, N), sums to 1."""
    out = query.new_empty(query.shape[0], query.shape[2], key.shape[1])
    if out.numel() == 0:
        return out
    received = []
    # one sample at a time: the maps of a whole batch would not fit into a cache
    for sample in range(query.shape[0]):
        one = slice(sample, sample + 1)
        logits = _attention_logits(query[one], key[one], None, softmax_scale)
        weights = logits.softmax(dim=-1) if lse is None else torch.exp(logits - lse[one, ..., None])
        received.append(weights.mean(dim=2))
    return torch.cat(received)


def attention_entropy(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> Tensor:
    """The entropy, in nats, of each query's row of the head-averaged attention map: (B, S)."""
    weights = _attention_logits(query, key, key_lengths, softmax_scale).softmax(dim=-1).mean(dim=1)
    return -torch.special.xlogy(weights, weights).sum(dim=-1)


def head_norms(x: Tensor) -> Tensor:
    """The mean over heads of the L2 norm of each token's head vectors: (B, N, H, E) -> (B, N)."""
    return torch.linalg.vector_norm(x, dim=-1).mean(dim=-1)


def token_change(new: Tensor, old: Tensor, metric: str) -> Tensor:
    """How far each token moved: 1 - cos(new, old), or |new - old|_1 / |old|_1."""
    if metric == "cosine":
        return 1 - F.cosine_similarity(new, old, dim=-1)
    return (new - old).abs().sum(-1) / old.abs().sum(-1).clamp_min(1e-12)
