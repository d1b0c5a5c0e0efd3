"""Random inputs by name, for any timed function."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from tokencache_kernels import ops

from .shapes import Shape

# partial steps that follow a full one, in the published schedules at most
CYCLE = 5


def make_inputs(
    names: Iterable[str], shape: Shape, dtype: torch.dtype, device: torch.device, seed: int
) -> dict[str, Any]:
    """The inputs with these names."""
    B, N, S, D, M, L, T = (getattr(shape, name) for name in "BNSDMLT")
    H, E, wide = shape.heads, shape.head_dim, shape.M + shape.extra
    generator = torch.Generator(device).manual_seed(seed)
    random = {"device": device, "generator": generator}

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=dtype, **random)

    def staleness() -> Tensor:
        return torch.randint(0, 4, (L, B, N), dtype=torch.int32, **random)

    def rotary() -> tuple[Tensor, Tensor] | None:
        # the models with wide heads turn and normalise them
        if E != 128:
            return None
        angles = torch.rand(N, E // 2, **random).repeat_interleave(2, dim=-1)
        return angles.cos(), angles.sin()

    def norm() -> ops.QkNorm | None:
        return ops.QkNorm(normal(E), normal(E)) if E == 128 else None

    fresh = torch.rand(B, N, **random).argsort(-1)[:, :S].sort(-1).values
    makers = {
        **dict.fromkeys(("x", "cache", "attention", "mlp"), lambda: normal(B, N, D)),
        **dict.fromkeys(("gate", "shift", "scale"), lambda: normal(B, D)),
        **dict.fromkeys(
            ("query", "key", "value", "key_cache", "value_cache"), lambda: normal(B, N, H, E)
        ),
        **dict.fromkeys(("text_key", "text_value"), lambda: normal(B, T, H, E)),
        "text_lengths": lambda: torch.randint(T // 2, T + 1, (B,), dtype=torch.int32, **random),
        "fresh_query": lambda: normal(B, S, H, E),
        "rows": lambda: normal(B, S, D),
        "hidden": lambda: normal(B, S, wide),
        "fc1": lambda: normal(M, D) / D**0.5,
        "fc1_bias": lambda: normal(M),
        "fc2": lambda: normal(D, wide) / wide**0.5,
        "fc2_bias": lambda: normal(D),
        "qkv": lambda: normal(3 * D, D) / D**0.5,
        "qkv_bias": lambda: normal(3 * D),
        "norm": norm,
        "rotary": rotary,
        "weight": lambda: torch.rand(B, N, **random),
        "fresh": lambda: fresh,
        "flat_fresh": lambda: (fresh + N * torch.arange(B, device=device)[:, None]).flatten(),
        "indices": lambda: fresh.int(),
        "positions": lambda: ops.invert_indices(fresh.int(), N, backend="reference"),
        "scores": lambda: torch.rand(L, B, N, **random),
        "staleness": staleness,
        "num_fresh": lambda: S,
        "cycle_num_fresh": lambda: torch.full((CYCLE, L), S, dtype=torch.int32, device=device),
        "num_tokens": lambda: N,
        "staleness_weight": lambda: 0.25 / N,
        "grid": lambda: shape.grid,
    }
    # sorted: the same seed gives the same inputs in every process
    made = {name: makers[name]() for name in sorted(set(names) - {"lse"})}
    if "lse" in names:
        made["lse"] = log_sum_exp(made["query"], made["key"])
    return made


def log_sum_exp(query: Tensor, key: Tensor) -> Tensor:
    """Compute the log-sum-exp of an attention's forward, (B, H, N) in float32."""
    logits = (
        torch.einsum("qhe,khe->hqk", q.float(), k.float()) for q, k in zip(query, key, strict=True)
    )
    return torch.stack([(x * query.shape[-1] ** -0.5).logsumexp(-1) for x in logits])
