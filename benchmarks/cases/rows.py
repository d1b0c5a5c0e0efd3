"""Rows of selected tokens: gathered into packed rows, and scattered back."""

from tokencache_kernels import ops

from .. import published
from .op import Op


def _bytes_of_rows(s, size):
    return 2 * s.B * s.S * s.D * size


OPS = (
    Op(
        "gather_rows",
        lambda x, indices, backend: ops.gather_rows(x, indices, backend=backend),
        published.gather_rows,
        _bytes_of_rows,
        others={"index": published.gather_rows_by_index},
    ),
    Op(
        "scatter_rows_",
        lambda cache, indices, rows, backend: ops.scatter_rows_(
            cache, indices, rows, backend=backend
        ),
        published.scatter_rows_,
        _bytes_of_rows,
        others={"index": published.scatter_rows_by_index_},
    ),
)
