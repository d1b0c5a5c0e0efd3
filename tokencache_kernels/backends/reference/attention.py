"""Attention of fresh queries over all keys.

Scores, softmax, log-sum-exp and entropy are computed in float32 at least, whatever the inputs are.
The map is made for some of the queries at a time: without gradients, scratch grows with the number
of tokens and not with its square.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# of the map at a time: 4 MiB, but at least so many queries that the keys are worth reading
_BLOCK_ELEMENTS = 1 << 20
_MIN_BLOCK_QUERIES = 32


def attention(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of fresh queries over all keys, and the log-sum-exp of each query's scores.

    query (B, S, H, E), key and value (B, N, H, E), key_lengths (B,) int32 or None. Returns (B, S,
    H, E) and (B, H, S), this in float32 at least; a query without any key gives zeros and -inf.
    """
    out, lse = _new_outputs(query)
    value = _without_padding(value, key_lengths)
    for queries, weights, sums in _weight_blocks(query, key, key_lengths, softmax_scale):
        out[:, queries], lse[:, :, queries] = _mix_values(weights, value), sums
    return out, lse


def attention_with_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    softmax_scale: float,
    head_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """As ``attention``, and the entropy, in nats, of each query's row of the attention map.

    (B, H, S), of each head's map; with ``head_mean`` (B, S), of the map averaged over the heads. A
    query without any key gives 0.
    """
    out, lse = _new_outputs(query)
    entropy = torch.zeros_like(lse[:, 0] if head_mean else lse)
    value = _without_padding(value, key_lengths)
    for queries, weights, sums in _weight_blocks(query, key, key_lengths, softmax_scale):
        rows = weights.mean(dim=1) if head_mean else weights
        # a weight of 0 adds nothing, and must not make the gradient infinite
        entropy[..., queries] = -(rows * torch.where(rows > 0, rows, 1).log()).sum(dim=-1)
        out[:, queries], lse[:, :, queries] = _mix_values(weights, value), sums
    return out, lse, entropy


def attention_logits(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> Tensor:
    """The scaled scores (B, H, S, N), in float32 at least; -inf beyond a sample's length."""
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = torch.einsum("bshe,bnhe->bhsn", query.to(wide), key.to(wide)) * softmax_scale
    if key_lengths is not None:
        beyond = _beyond(key, key_lengths)
        logits = logits.masked_fill(beyond[:, None, None], -torch.inf)
    return logits


def _beyond(key: Tensor, key_lengths: Tensor) -> Tensor:
    """Mark the tokens (B, N) beyond a sample's length."""
    return torch.arange(key.shape[1], device=key.device) >= key_lengths[:, None]


def _without_padding(value: Tensor, key_lengths: Tensor | None) -> Tensor:
    """The values, with zeros beyond the lengths: a weight of 0 times a NaN there would be NaN."""
    if key_lengths is None:
        return value
    return value.masked_fill(_beyond(value, key_lengths)[..., None, None], 0)


def _new_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """Made before the blocks, which would otherwise be cut up to hold their parts."""
    B, S, H, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_zeros(query.shape), query.new_zeros(B, H, S, dtype=wide)


def _weight_blocks(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Some queries at a time: which, their map (B, H, ., N), and its log-sum-exp (B, H, .)."""
    B, N, H, _ = key.shape
    block = max(_BLOCK_ELEMENTS // max(B * H * N, 1), _MIN_BLOCK_QUERIES)
    for first in range(0, query.shape[1], block):
        queries = slice(first, first + block)
        logits = attention_logits(query[:, queries], key, key_lengths, softmax_scale)
        lse = torch.logsumexp(logits, dim=-1)
        # no key at all: exp(-inf - 0) is the 0 that exp(-inf + inf) is not
        yield queries, torch.exp(logits - torch.where(lse.isinf(), 0, lse)[..., None]), lse


def _mix_values(weights: Tensor, value: Tensor) -> Tensor:
    out = torch.einsum("bhsn,bnhe->bshe", weights, value.to(weights.dtype))
    return out.to(value.dtype)
