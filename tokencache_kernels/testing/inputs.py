"""Inputs for tests: seeded, odd, and never zeros."""

from typing import Any

import torch
from torch import Tensor


def randn(
    *shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> Tensor:
    """Normal values that do not depend on the device."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return values.to(device=device, dtype=dtype)


def random_indices(
    B: int, N: int, S: int, device: str = "cpu", seed: int = 0, num_empty: int = 0
) -> Tensor:
    """(B, S) int32: for each sample ``S - num_empty`` distinct tokens, ascending, then -1."""
    generator = torch.Generator().manual_seed(seed + B + N + S)
    rows = [torch.randperm(N, generator=generator)[: S - num_empty].sort().values for _ in range(B)]
    indices = torch.full((B, S), -1, dtype=torch.int32)
    for row, chosen in zip(indices, rows, strict=True):
        row[: S - num_empty] = chosen.int()
    return indices.to(device)


def distinct_scores(*shape: int, device: str = "cpu", seed: int = 0) -> Tensor:
    """Float32 scores no two of which are near each other: a shuffled 1 .. N per row."""
    *lead, N = shape
    generator = torch.Generator().manual_seed(seed + sum(shape))
    rows = torch.rand(*lead, N, generator=generator).argsort(-1)
    return (rows.float() + 1.0).to(device)


def in_float64(*inputs: Any) -> list[Any]:
    """The same inputs with every floating tensor in float64."""
    return [
        value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for value in inputs
    ]
