"""Queries, keys and values of the selected tokens, the latter two into their caches."""

from tokencache_kernels import ops

from .. import published
from .op import Op


def _project_qkv(key_cache, value_cache, rows, indices, qkv, qkv_bias, norm, rotary, backend):
    query = ops.project_qkv_(
        key_cache, value_cache, rows, indices, qkv, qkv_bias, norm=norm, rotary=rotary,
        backend=backend,
    )  # fmt: skip
    return query, key_cache, value_cache


OPS = (
    Op(
        "project_qkv_",
        _project_qkv,
        published.project_qkv_,
        lambda s, size: (4 * s.B * s.S * s.D + 3 * s.D * s.D) * size,
        lambda s: 6 * s.B * s.S * s.D * s.D,
        dense=published.dense_project_qkv,
    ),
)
