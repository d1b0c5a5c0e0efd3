"""Passes over the residual stream: gated branches added, selected rows modulated."""

from tokencache_kernels import ops

from .. import published
from .op import Op


def _row_pass(x, attention, mlp, gate, indices, positions, shift, scale, backend):
    packed = ops.row_pass_(
        x, (attention, mlp), (gate, gate), indices, shift, scale, positions=positions,
        eps=published.EPS, backend=backend,
    )  # fmt: skip
    return packed, x


OPS = (
    Op(
        "row_pass_",
        _row_pass,
        published.row_pass,
        lambda s, size: (4 * s.N + s.S) * s.B * s.D * size,
        op="row_pass",
    ),
    Op(
        "add_branches_",
        lambda x, attention, mlp, gate, backend: ops.add_branches_(
            x, (attention, mlp), (gate, gate), backend=backend
        ),
        published.add_branches,
        lambda s, size: 4 * s.N * s.B * s.D * size,
        op="add_branches",
    ),
    Op(
        "gather_modulate",
        lambda x, indices, shift, scale, backend: ops.gather_modulate(
            x, indices, shift, scale, eps=published.EPS, backend=backend
        ),
        published.gather_modulate,
        lambda s, size: 2 * s.B * s.S * s.D * size,
    ),
)
