"""Scores of tokens: attention received, its entropy, norms, change."""

from tokencache_kernels import ops

from .. import published
from .op import Op


def _has_small_map(shape):
    # beyond, the map of the published way takes tens of gigabytes
    return shape.N <= 4608


OPS = (
    Op(
        "attention_received",
        lambda query, key, lse, backend: ops.attention_received(
            query, key, lse=lse, backend=backend
        ),
        published.attention_received,
        lambda s, size: 2 * s.B * s.N * s.D * size + 8 * s.B * s.heads * s.N,
        lambda s: 2 * s.B * s.N * s.N * s.D,
        fits=_has_small_map,
    ),
    Op(
        # which makes it twice the work
        "attention_received_without_lse",
        lambda query, key, backend: ops.attention_received(query, key, backend=backend),
        published.attention_received,
        lambda s, size: 2 * s.B * s.N * s.D * size + 4 * s.B * s.heads * s.N,
        lambda s: 4 * s.B * s.N * s.N * s.D,
        fits=_has_small_map,
        op="attention_received",
    ),
    Op(
        "attention_entropy",
        lambda query, text_key, text_lengths, backend: ops.attention_entropy(
            query, text_key, key_lengths=text_lengths, backend=backend
        ),
        published.attention_entropy,
        lambda s, size: s.B * (s.N + s.T) * s.D * size + 4 * s.B * s.N,
        lambda s: 2 * s.B * s.N * s.T * s.D,
        fits=lambda s: s.T > 0,
    ),
    Op(
        "head_norms",
        lambda value, backend: ops.head_norms(value, backend=backend),
        published.head_norms,
        lambda s, size: s.B * s.N * (s.D * size + 4),
    ),
    Op(
        "token_change",
        lambda x, cache, backend: ops.token_change(x, cache, backend=backend),
        published.token_change,
        lambda s, size: s.B * s.N * (2 * s.D * size + 4),
    ),
)
