"""Attention of fresh queries over all keys."""

import torch
from torch import Tensor


def attention(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of fresh queries over all keys, and the log-sum-exp of each query's scores.

    query (B, S, H, E), key and value (B, N, H, E), key_lengths (B,) int32 or None. Returns (B, S,
    H, E) and (B, H, S); a query without any key gives zeros and -inf.
    """
    logits = attention_logits(query, key, key_lengths, softmax_scale)
    lse = torch.logsumexp(logits, dim=-1)
    weights = torch.exp(logits - torch.where(lse.isinf(), 0, lse)[..., None])
    return torch.einsum("bhsn,bnhe->bshe", weights, value).contiguous(), lse


def attention_logits(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> Tensor:
    """The scaled scores (B, H, S, N); -inf for a key beyond its sample's length."""
    logits = torch.einsum("bshe,bnhe->bhsn", query, key) * softmax_scale
    if key_lengths is not None:
        beyond = torch.arange(key.shape[1], device=key.device) >= key_lengths[:, None]
        logits = logits.masked_fill(beyond[:, None, None], -torch.inf)
    return logits
