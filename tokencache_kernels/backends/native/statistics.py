"""Scores of tokens from a few rows of an attention map at a time, never from the whole."""

import torch
from torch import Tensor

from .loading import OPS


def attention_received(
    query: Tensor, key: Tensor, lse: Tensor | None, softmax_scale: float
) -> Tensor:
    """out[b, h, n] = mean_s softmax(softmax_scale * query[b, s, h] @ key[b, :, h])[n]."""
    B, S, H, _ = query.shape
    out = _new_statistic(query, B, H, key.shape[1])
    if S * out.numel() == 0:
        return out.zero_()
    OPS.attention_received(query, key, lse, softmax_scale, out)
    return out


def attention_entropy(
    query: Tensor,
    key: Tensor,
    key_lengths: Tensor | None,
    softmax_scale: float,
    lse: Tensor | None = None,
) -> Tensor:
    """out[b, s] = -sum_n p log p, p[n] the map's mean over the heads; ``lse`` saves some work."""
    out = _new_statistic(query, *query.shape[:2])
    if key.shape[1] * out.numel() == 0:
        return out.zero_()
    OPS.attention_entropy(query, key, key_lengths, lse, softmax_scale, out)
    return out


def head_norms(x: Tensor) -> Tensor:
    """out[b, n] = mean_h |x[b, n, h]|."""
    out = _new_statistic(x, *x.shape[:2])
    OPS.head_norms(x, out)
    return out


def token_change(new: Tensor, old: Tensor, metric: str) -> Tensor:
    """out[b, n] = 1 - cos(new, old), or |new - old|_1 / |old|_1."""
    out = _new_statistic(new, *new.shape[:2])
    OPS.token_change(new, old, metric == "cosine", out)
    return out


def _new_statistic(x: Tensor, *shape: int) -> Tensor:
    return x.new_empty(shape, dtype=torch.promote_types(x.dtype, torch.float32))
