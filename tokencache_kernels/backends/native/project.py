"""The projection to queries, keys and values: oneDNN, then norm and rotation in one pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..reference import QkNorm
from .linear import linear
from .loading import OPS
from .rows import scatter_rows_


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
    """Project rows to query, key and value; key and value rows go to their place in the caches."""
    heads = key_cache.shape[2:]
    key_indices = None if all_keys else indices
    query, key, value = (
        linear(x, w, b, "none", rows).unflatten(-1, heads)
        for w, b, rows in zip(
            weight, bias or (None,) * 3, (indices if all_keys else None, None, None), strict=True
        )
    )
    if norm is not None or rotary is not None:
        gains = (norm.query_weight, norm.key_weight) if norm else (None, None)
        shifts = (norm.query_bias, norm.key_bias) if norm else (None, None)
        kind, eps = (norm.kind, norm.eps) if norm else ("rms", 0.0)
        wide = torch.promote_types(x.dtype, torch.float32)
        cosine, sine = (table.to(wide) for table in rotary) if rotary else (None, None)
        for rows, tokens, gain, shift in zip(
            (query, key), (indices, key_indices), gains, shifts, strict=True
        ):
            OPS.finish_heads_(
                rows, tokens, key_cache.shape[1], gain, shift, kind == "layer", eps, cosine, sine
            )
    for cache, rows in ((key_cache, key), (value_cache, value)):
        if key_indices is None:
            cache.copy_(rows)
        else:
            scatter_rows_(cache.flatten(2), key_indices, rows.flatten(2))
    return query
