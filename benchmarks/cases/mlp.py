"""The whole MLP of the selected tokens, beside that of all tokens."""

from tokencache_kernels import ops

from .. import published
from .op import Op


def _mlp(cache, x, indices, shift, scale, fc1, fc1_bias, fc2, fc2_bias, backend):
    return ops.mlp_(
        cache, x, indices, shift, scale, fc1, fc1_bias, fc2, fc2_bias,
        eps=published.EPS, backend=backend,
    )  # fmt: skip


OPS = (
    Op(
        "mlp_",
        _mlp,
        published.mlp_,
        lambda s, size: 2 * (s.B * s.S * s.D + s.D * s.M) * size,
        lambda s: 4 * s.B * s.S * s.D * s.M,
        fits=lambda s: s.extra == 0,
        on_cuda={"library": published.mlp_in_library},
        dense=published.dense_mlp,
    ),
)
