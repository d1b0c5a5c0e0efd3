"""The mix of cached and fresh features, and its gradients for training."""

import torch

from tokencache_kernels import ops

from .. import published
from .op import Op


def _blend_backward(mlp, cache, x, weight, backend):
    backward = torch.ops.tokencache_kernels.blend_backward
    return backward(mlp, cache, x, weight, True, backend)


OPS = (
    Op(
        "blend",
        lambda cache, x, weight, backend: ops.blend(cache, x, weight, backend=backend),
        published.blend,
        lambda s, size: 3 * s.B * s.N * s.D * size,
    ),
    Op(
        "blend_backward",
        _blend_backward,
        published.blend_backward,
        lambda s, size: 5 * s.B * s.N * s.D * size,
    ),
)
