"""Attention of packed queries over all keys, with the log-sum-exp and the entropy for scores."""

import torch
from torch import Tensor

from .loading import OPS
from .statistics import attention_entropy


def attention(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out = softmax(softmax_scale * query @ key.T) @ value, and the scores' log-sum-exp."""
    out, lse = _new_outputs(query)
    OPS.attention(query, key, value, key_lengths, softmax_scale, out, lse, None)
    return out, lse


def attention_with_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    softmax_scale: float,
    head_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``attention`` and the entropy of each head's map; with ``head_mean``, a pass more, of all."""
    if head_mean:
        out, lse = attention(query, key, value, key_lengths, softmax_scale)
        return out, lse, attention_entropy(query, key, key_lengths, softmax_scale, lse)
    out, lse = _new_outputs(query)
    entropy = torch.empty_like(lse)
    OPS.attention(query, key, value, key_lengths, softmax_scale, out, lse, entropy)
    return out, lse, entropy


def _new_outputs(query: Tensor) -> tuple[Tensor, Tensor]:
    """For the output and the log-sum-exp."""
    B, S, H, E = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(B, S, H, E), query.new_empty(B, H, S, dtype=wide)
