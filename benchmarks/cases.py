"""What is timed: the shapes, and of each op our call, what it is compared with, and its size.

A timed function names the inputs that it wants as its parameters, as a pytest test does.
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor

from tokencache_kernels import ops

from . import published

# rotating over more than the L2 of today's GPUs finds it cold, as the layers of a model do
COLD_BYTES = 128 * 2**20
MAX_SETS = 256


@dataclass(frozen=True)
class Shape:
    """One cached layer: of ``N`` tokens ``S`` are fresh; ``B`` counts guidance's second half.

    ``extra``: what fc2 reads beside the hidden channels, in the single blocks of FLUX.
    """

    name: str
    B: int
    N: int
    S: int
    D: int
    M: int
    extra: int = 0

    def shrink(self, factor: int) -> "Shape":
        """The same layer with so many times fewer tokens and channels."""
        fewer = {name: max(getattr(self, name) // factor, 1) for name in ("N", "S", "D", "M")}
        name = f"{self.name}-over-{factor}"
        return replace(self, name=name, extra=self.extra // factor, **fewer)


# the most telling first
SHAPES = (
    Shape("dit-xl-256px-2", 2, 256, 43, 1152, 4608),
    Shape("flux-1024px-single", 1, 4608, 614, 3072, 12288, extra=3072),
    Shape("dit-xl-256px-16", 16, 256, 43, 1152, 4608),
    Shape("flux-1024px-double", 1, 4096, 191, 3072, 12288),
    Shape("dit-xl-256px-32", 32, 256, 43, 1152, 4608),
    Shape("pixart-1024px-2", 2, 4096, 1024, 1152, 4608),
    Shape("opensora-480p-2", 2, 23850, 3565, 1152, 4608),
    Shape("dit-xl-256px-2-109", 2, 256, 109, 1152, 4608),
    Shape("pixart-256px-32", 32, 256, 111, 1152, 4608),
    Shape("dit-xl-512px-8", 8, 1024, 172, 1152, 4608),
    Shape("wan-1.3b-480p", 1, 32760, 4914, 1536, 8960),
    Shape("hunyuan-720p", 1, 118800, 11880, 3072, 12288),
    Shape("wan-14b-720p", 1, 75600, 30240, 5120, 13824),
)
LEADING = SHAPES[:4]
TINY = Shape("tiny", 2, 9, 4, 32, 64)


@dataclass(frozen=True)
class Op:
    """An op, against the published way (the first of ``baselines``) and against others.

    ``name`` is what the backends call it. ``ours`` and the first baseline return the same tensor.
    ``count_bytes`` takes a shape and the bytes of an element: each input read once, each output
    written once. ``count_flops`` counts matrix products alone.
    """

    name: str
    ours: Callable[..., Tensor]
    baselines: dict[str, Callable[..., Tensor]]
    count_bytes: Callable[[Shape, int], int]
    count_flops: Callable[[Shape], int] = lambda shape: 0
    fits: Callable[[Shape], bool] = lambda shape: True

    def make_inputs(
        self, shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
    ) -> dict[str, Any]:
        """Random inputs, all that ``ours`` and the baselines name."""
        functions = (self.ours, *self.baselines.values())
        return make_inputs(set().union(*map(_wanted, functions)), shape, dtype, device, seed)

    def num_sets(self, shape: Shape, dtype: torch.dtype) -> int:
        """How many sets of inputs to rotate over on a GPU."""
        return min(max(ceil(COLD_BYTES / self.count_bytes(shape, dtype.itemsize)), 2), MAX_SETS)


def bind(function: Callable[..., Tensor], inputs: dict[str, Any], **options: Any) -> partial:
    """The call of ``function`` on those of the inputs that it names."""
    return partial(function, **{name: inputs[name] for name in _wanted(function)}, **options)


def _wanted(function: Callable[..., Tensor]) -> set[str]:
    return set(inspect.signature(function).parameters) - {"backend"}


def make_inputs(
    names: Iterable[str], shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Any]:
    """The inputs with these names."""
    B, N, S, D, M, wide = shape.B, shape.N, shape.S, shape.D, shape.M, shape.M + shape.extra
    generator = torch.Generator(device).manual_seed(seed)
    random = {"device": device, "generator": generator}

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=dtype, **random)

    # the head dims of DiT and of FLUX; the last is for the tiny layer
    E = next(head_dim for head_dim in (72, 128, 8) if D % head_dim == 0)
    fresh = torch.rand(B, N, **random).argsort(-1)[:, :S].sort(-1).values
    makers = {
        **dict.fromkeys(("x", "cache", "attention", "mlp"), lambda: normal(B, N, D)),
        **dict.fromkeys(("gate", "shift", "scale"), lambda: normal(B, D)),
        **dict.fromkeys(("query", "key"), lambda: normal(B, N, D // E, E)),
        "rows": lambda: normal(B, S, D),
        "hidden": lambda: normal(B, S, wide),
        "fc1": lambda: normal(M, D) / D**0.5,
        "fc1_bias": lambda: normal(M),
        "fc2": lambda: normal(D, wide) / wide**0.5,
        "fc2_bias": lambda: normal(D),
        "fresh": lambda: fresh,
        "indices": lambda: fresh.int(),
        "positions": lambda: ops.invert_indices(fresh.int(), N, backend="reference"),
        "scores": lambda: torch.rand(B, N, **random),
        "staleness": lambda: torch.randint(0, 4, (B, N), dtype=torch.int32, **random),
        "num_fresh": lambda: S,
        "staleness_weight": lambda: 0.25 / N,
    }
    # sorted: the same seed gives the same inputs in every process
    return {name: makers[name]() for name in sorted(names)}


def _select(scores, staleness, num_fresh, staleness_weight, backend):
    ops.select_tokens_(
        scores, staleness, num_fresh, staleness_weight=staleness_weight, backend=backend
    )
    # what was selected shows here, in whatever order
    return staleness


def _row_pass(x, attention, mlp, gate, indices, positions, shift, scale, backend):
    return ops.row_pass_(
        x, (attention, mlp), (gate, gate), indices, shift, scale, positions=positions,
        eps=published.EPS, backend=backend,
    )  # fmt: skip


def _mlp(cache, x, indices, shift, scale, fc1, fc1_bias, fc2, fc2_bias, backend):
    return ops.mlp_(
        cache, x, indices, shift, scale, fc1, fc1_bias, fc2, fc2_bias,
        eps=published.EPS, backend=backend,
    )  # fmt: skip


OPS = {
    op.name: op
    for op in (
        Op(
            "row_pass",
            _row_pass,
            {"eager": published.row_pass},
            lambda s, size: (4 * s.N + s.S) * s.B * s.D * size,
        ),
        Op(
            "select_tokens_",
            _select,
            {"argsort": published.select_by_argsort, "topk": published.select_by_topk},
            # scores, staleness twice and positions; indices. Four bytes each
            lambda s, _: 4 * s.B * (4 * s.N + s.S),
        ),
        Op(
            "linear",
            lambda rows, fc1, fc1_bias, backend: ops.linear(
                rows, fc1, fc1_bias, activation="gelu_tanh", backend=backend
            ),
            {"eager": published.linear_gelu, "addmm": published.linear_gelu_in_library},
            lambda s, size: (s.B * s.S * (s.D + s.M) + s.D * s.M) * size,
            lambda s: 2 * s.B * s.S * s.D * s.M,
        ),
        Op(
            "linear_scatter_",
            lambda cache, indices, hidden, fc2, fc2_bias, backend: ops.linear_scatter_(
                cache, indices, hidden, fc2, fc2_bias, backend=backend
            ),
            {"eager": published.linear_scatter_},
            lambda s, size: (s.B * s.S * (s.D + s.M + s.extra) + s.D * (s.M + s.extra)) * size,
            lambda s: 2 * s.B * s.S * s.D * (s.M + s.extra),
        ),
        Op(
            "mlp_",
            _mlp,
            {"eager": published.mlp_, "dense": published.dense_mlp},
            lambda s, size: 2 * (s.B * s.S * s.D + s.D * s.M) * size,
            lambda s: 4 * s.B * s.S * s.D * s.M,
            fits=lambda s: s.extra == 0,
        ),
        Op(
            # without a forward's log-sum-exp, which makes it twice the work
            "attention_received",
            lambda query, key, backend: ops.attention_received(query, key, backend=backend),
            {"eager": published.attention_received},
            lambda s, size: 2 * s.B * s.N * s.D * size,
            lambda s: 4 * s.B * s.N * s.N * s.D,
            # beyond, the map of the baseline takes tens of gigabytes
            fits=lambda s: s.N <= 4608,
        ),
        Op(
            "gather_rows",
            lambda x, indices, backend: ops.gather_rows(x, indices, backend=backend),
            {"eager": published.gather_rows},
            lambda s, size: 2 * s.B * s.S * s.D * size,
        ),
        Op(
            "scatter_rows_",
            lambda cache, indices, rows, backend: ops.scatter_rows_(
                cache, indices, rows, backend=backend
            ),
            {"eager": published.scatter_rows_},
            lambda s, size: 2 * s.B * s.S * s.D * size,
        ),
    )
}
