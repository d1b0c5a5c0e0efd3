"""Selection: of all layers and samples of a step, and of all steps of a cycle."""

from tokencache_kernels import ops

from .. import published
from .inputs import CYCLE
from .op import Op


def _select(scores, staleness, num_fresh, staleness_weight, grid, backend):
    ops.select_tokens_(
        scores, staleness, num_fresh, staleness_weight=staleness_weight, grid=grid,
        bonus=published.BONUS, backend=backend,
    )  # fmt: skip
    # the selection shows here, in whatever order
    return staleness


def _select_cycle(
    scores, staleness, cycle_num_fresh, num_fresh, staleness_weight, grid, backend
):  # fmt: skip
    ops.select_cycle_(
        scores, staleness, cycle_num_fresh, num_fresh, staleness_weight=staleness_weight, grid=grid,
        bonus=published.BONUS, backend=backend,
    )  # fmt: skip
    return staleness


OPS = (
    Op(
        "select_tokens_",
        _select,
        published.select_by_argsort,
        # scores, staleness twice and positions; indices. Four bytes each
        lambda s, _: 4 * s.L * s.B * (4 * s.N + s.S),
        eager="argsort",
        others={"topk": published.select_by_topk},
        compiled="topk",
        max_sets=16,
    ),
    Op(
        "select_cycle_",
        _select_cycle,
        published.select_cycle_by_argsort,
        lambda s, _: 4 * s.L * s.B * (3 * s.N + CYCLE * (s.N + s.S)),
        fits=lambda s: s.N <= 4608,
        op="select_tokens_",
        eager="argsort",
        others={"topk": published.select_cycle_by_topk},
        compiled="topk",
        max_sets=4,
    ),
    Op(
        "invert_indices",
        lambda indices, num_tokens, backend: ops.invert_indices(
            indices, num_tokens, backend=backend
        ),
        published.invert_indices,
        lambda s, _: 4 * s.B * (s.N + s.S),
        max_sets=16,
    ),
)
