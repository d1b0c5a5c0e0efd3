"""Attention of fresh queries over all keys.

Scores, softmax, log-sum-exp and entropy are computed in float32 at least, whatever the inputs are.
"""

import torch
from torch import Tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of fresh queries over all keys, and the log-sum-exp of each query's scores.

    query (B, S, H, E), key and value (B, N, H, E), key_lengths (B,) int32 or None. Returns (B, S,
    H, E) and (B, H, S), this in float32 at least; a query without any key gives zeros and -inf.
    """
    weights, lse = _attention_weights(query, key, key_lengths, softmax_scale)
    return _mix_values(weights, value), lse


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
    weights, lse = _attention_weights(query, key, key_lengths, softmax_scale)
    rows = weights.mean(dim=1) if head_mean else weights
    # a weight of 0 adds nothing, and must not make the gradient infinite
    entropy = -(rows * torch.where(rows > 0, rows, 1).log()).sum(dim=-1)
    return _mix_values(weights, value), lse, entropy


def attention_logits(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> Tensor:
    """The scaled scores (B, H, S, N), in float32 at least; -inf beyond a sample's length."""
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = torch.einsum("bshe,bnhe->bhsn", query.to(wide), key.to(wide)) * softmax_scale
    if key_lengths is not None:
        beyond = torch.arange(key.shape[1], device=key.device) >= key_lengths[:, None]
        logits = logits.masked_fill(beyond[:, None, None], -torch.inf)
    return logits


def _attention_weights(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """The attention map (B, H, S, N), and the log-sum-exp of its scores (B, H, S)."""
    logits = attention_logits(query, key, key_lengths, softmax_scale)
    lse = torch.logsumexp(logits, dim=-1)
    # no key at all: exp(-inf - 0) is the 0 that exp(-inf + inf) is not
    return torch.exp(logits - torch.where(lse.isinf(), 0, lse)[..., None]), lse


def _mix_values(weights: Tensor, value: Tensor) -> Tensor:
    out = torch.einsum("bhsn,bnhe->bshe", weights, value.to(weights.dtype))
    return out.to(value.dtype).contiguous()
