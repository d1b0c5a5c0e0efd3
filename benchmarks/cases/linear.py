"""Linear layers on packed rows: with their activation, with their gather, with their scatter."""

from tokencache_kernels import ops

from .. import published
from .op import Op

OPS = (
    Op(
        "linear",
        lambda rows, fc1, fc1_bias, backend: ops.linear(
            rows, fc1, fc1_bias, activation="gelu_tanh", backend=backend
        ),
        published.linear_gelu,
        lambda s, size: (s.B * s.S * (s.D + s.M) + s.D * s.M) * size,
        lambda s: 2 * s.B * s.S * s.D * s.M,
        others={"addmm": published.linear_gelu_in_library},
        dense=published.dense_linear_gelu,
    ),
    Op(
        "linear_gathered",
        lambda x, indices, fc1, fc1_bias, backend: ops.linear(
            x, fc1, fc1_bias, activation="gelu_tanh", indices=indices, backend=backend
        ),
        published.linear_gathered,
        lambda s, size: (s.B * s.S * (s.D + s.M) + s.D * s.M) * size,
        lambda s: 2 * s.B * s.S * s.D * s.M,
        op="linear",
    ),
    Op(
        "linear_scatter_",
        lambda cache, indices, hidden, fc2, fc2_bias, backend: ops.linear_scatter_(
            cache, indices, hidden, fc2, fc2_bias, backend=backend
        ),
        published.linear_scatter_,
        lambda s, size: (s.B * s.S * (s.D + s.M + s.extra) + s.D * (s.M + s.extra)) * size,
        lambda s: 2 * s.B * s.S * s.D * (s.M + s.extra),
        others={"index": published.linear_scatter_by_index_},
    ),
)
