"""The projection to query, key and value, which refreshes cached keys and values."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .rows import scatter_rows_, split_empty


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
        safe, _ = split_empty(indices, N)
        cosine, sine = (table[safe][:, :, None] for table in rotary)
        query, key = _rotate(query, cosine, sine), _rotate(key, cosine, sine)
    scatter_rows_(key_cache.flatten(2), indices, key.flatten(2))
    scatter_rows_(value_cache.flatten(2), indices, value.flatten(2))
    return query.contiguous()


def _rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return x * cosine + torch.stack((-odd, even), dim=-1).flatten(-2) * sine
