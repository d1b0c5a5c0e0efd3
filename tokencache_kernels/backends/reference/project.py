"""The projection of rows to queries, keys and values, which refreshes cached keys and values."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import gather_rows, scatter_rows_, split_empty


class QkNorm(NamedTuple):
    """The norm of each head of queries and keys, between projection and rotation.

    Attributes:
        query_weight: (E,).
        key_weight: (E,).
        query_bias: (E,), or None; both biases or neither.
        key_bias: (E,), the key's bias, or None.
        kind: ``"rms"`` or ``"layer"``.
        eps: added to the mean square, or to the variance.
    """

    query_weight: Tensor
    key_weight: Tensor
    query_bias: Tensor | None = None
    key_bias: Tensor | None = None
    kind: str = "rms"
    eps: float = 1e-6


def project_qkv_(
    key_cache: Tensor,
    value_cache: Tensor,
    x: Tensor,
    indices: Tensor | None,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    norm: QkNorm | None,
    rotary: tuple[Tensor, Tensor] | None,
    all_keys: bool,
) -> Tensor:
    """Project rows to query, key and value; key and value rows go to their place in the caches.

    The caches are (B, N, H, E); indices are (B, S), or None for every token. Weights are (H * E, K)
    and biases (H * E,), in the order query, key, value. ``x`` (B, S, K) holds the rows of those
    tokens. With ``all_keys``, ``x`` (B, N, K) holds every token's row, and keys and values are made
    for all. Returns the packed query (B, S, H, E).
    """
    B, N, H, E = key_cache.shape
    every = torch.arange(N, dtype=torch.int32, device=x.device).expand(B, N)
    query_tokens = every if indices is None else indices
    key_tokens = every if all_keys else query_tokens
    query_rows = gather_rows(x, query_tokens) if all_keys else x
    query, key, value = (
        F.linear(rows, w, b).unflatten(-1, (H, E))
        for rows, w, b in zip((query_rows, x, x), weight, bias or (None,) * 3, strict=True)
    )
    query, key = finish_heads(query, key, query_tokens, key_tokens, norm, rotary)
    scatter_rows_(key_cache.flatten(2), key_tokens, key.flatten(2))
    scatter_rows_(value_cache.flatten(2), key_tokens, value.flatten(2))
    return query.contiguous()


def finish_heads(
    query: Tensor,
    key: Tensor,
    query_tokens: Tensor,
    key_tokens: Tensor,
    norm: QkNorm | None,
    rotary: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor]:
    """Projected queries and keys (B, S, H, E) of the tokens (B, S), normalised and rotated."""
    if norm is not None:
        query = _normalise(query, norm.query_weight, norm.query_bias, norm.kind, norm.eps)
        key = _normalise(key, norm.key_weight, norm.key_bias, norm.kind, norm.eps)
    if rotary is not None:
        query = _rotate(query, query_tokens, *rotary)
        key = _rotate(key, key_tokens, *rotary)
    return query, key


def _normalise(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str, eps: float) -> Tensor:
    if kind == "layer":
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    normed = F.rms_norm(x, weight.shape, weight, eps)
    return normed if bias is None else normed + bias


def _rotate(x: Tensor, tokens: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Pairs (x[2i], x[2i + 1]) turned by the angle in column 2i of the token's row.

    Tables (T, E) or (B, T, E); column 2i + 1 repeats column 2i, and is not read.
    """
    safe, _ = split_empty(tokens, cosine.shape[-2])
    batch = torch.arange(len(safe), device=safe.device)[:, None]
    cosine, sine = (
        table.expand(len(safe), -1, -1)[batch, safe, None, ::2] for table in (cosine, sine)
    )
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cosine - odd * sine, odd * cosine + even * sine), dim=-1)
    return turned.flatten(-2).to(x.dtype)
