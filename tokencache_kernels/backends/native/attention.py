"""Attention of fresh queries over all keys, on a GPU."""

import torch
from torch import Tensor

from .loading import OPS


def attention(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """out = softmax(softmax_scale * query @ key.T) @ value, and the scores' log-sum-exp."""
    B, S, H, E = query.shape
    out = query.new_empty(B, S, H, E)
    lse = query.new_empty(B, H, S, dtype=torch.float32)
    OPS.attention(query, key, value, key_lengths, softmax_scale, out, lse)
    return out, lse
