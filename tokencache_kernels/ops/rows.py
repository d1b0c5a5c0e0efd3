"""Move rows of selected tokens: from a feature tensor into packed rows, and back."""

import torch
from torch import Tensor

from ..backends import reference
from ._checks import expect, expect_indices, expect_no_grad, expect_writable
from ._library import define, no_result, run, without_autocast

_gather_rows = define(
    "gather_rows(Tensor hidden_states, Tensor indices, str backend) -> Tensor",
    lambda hidden_states, indices, backend: run("gather_rows", hidden_states, backend)(
        hidden_states, indices
    ),
    lambda hidden_states, indices, backend: hidden_states.new_empty(
        *indices.shape, hidden_states.shape[2]
    ),
)


def _run_scatter_rows_(cache: Tensor, indices: Tensor, rows: Tensor, backend: str) -> None:
    run("scatter_rows_", cache, backend)(cache, indices, rows)


def _run_scatter_rows(cache: Tensor, indices: Tensor, rows: Tensor, backend: str) -> Tensor:
    out = cache.clone(memory_format=torch.contiguous_format)
    _run_scatter_rows_(out, indices, rows, backend)
    return out


_scatter_rows_ = define(
    "scatter_rows_(Tensor(a!) cache, Tensor indices, Tensor rows, str backend) -> ()",
    _run_scatter_rows_,
    no_result,
)
_scatter_rows = define(
    "scatter_rows(Tensor cache, Tensor indices, Tensor rows, str backend) -> Tensor",
    _run_scatter_rows,
    lambda cache, indices, rows, backend: cache.clone(memory_format=torch.contiguous_format),
)


def gather_rows(hidden_states: Tensor, indices: Tensor, *, backend: str = "auto") -> Tensor:
    """Pack the selected tokens of each batch element into consecutive rows.

    ``out[b, s] = hidden_states[b, indices[b, s]]``; an empty slot gives zeros.

    Args:
        hidden_states: (B, N, D), float16, bfloat16, float32 or float64; stride 1 along D.
        indices: (B, S) int32 on the same device, S <= N. -1 (and any value outside [0, N)) is an
            empty slot; values are not read on the host. Repeats are allowed.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``.

    Returns:
        (B, S, D), contiguous, with the dtype and device of ``hidden_states``.

    Raises:
        ValueError: a shape, stride, device or backend name does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: an input requires grad and ``backend`` is not ``"reference"``.
        BackendUnavailableError: the backend named cannot run here.

    Source:
        The selection step of ToCa (arXiv:2410.05317, algorithm 1).
    """
    expect("gather_rows", "hidden_states", hidden_states, (None, None, None), "(B, N, D)")
    expect_indices("gather_rows", indices, hidden_states, may_repeat=True)
    if backend == "reference":
        return without_autocast(reference.gather_rows)(hidden_states, indices)
    expect_no_grad("gather_rows", hidden_states)
    return _gather_rows(hidden_states, indices, backend)


def scatter_rows_(cache: Tensor, indices: Tensor, rows: Tensor, *, backend: str = "auto") -> Tensor:
    """Write packed rows to their tokens' places in the cache.

    ``cache[b, indices[b, s]] = rows[b, s]``; an empty slot writes nothing, and every other row
    keeps its value.

    Args:
        cache: (B, N, D), written in place, not expanded; any float dtype; stride 1 along D.
        indices: (B, S) int32, unique per sample; see ``gather_rows``. With repeats, one of the
            rows stays.
        rows: (B, S, D), dtype and device of ``cache``; stride 1 along D. They may be rows of
            ``cache`` itself, which are copied first.
        backend: see ``gather_rows``.

    Returns:
        ``cache``.

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``gather_rows``.

    Source:
        The cache update of ToCa (arXiv:2410.05317, algorithm 1).
    """
    _check_scatter_rows("scatter_rows_", cache, indices, rows)
    expect_writable("scatter_rows_", "cache", cache)
    if backend == "reference":
        without_autocast(reference.scatter_rows_)(cache, indices, rows)
        return cache
    expect_no_grad("scatter_rows_", cache, rows)
    _scatter_rows_(cache, indices, rows, backend)
    return cache


def scatter_rows(cache: Tensor, indices: Tensor, rows: Tensor, *, backend: str = "auto") -> Tensor:
    """Like ``scatter_rows_``, into a new tensor; ``cache`` keeps its value."""
    _check_scatter_rows("scatter_rows", cache, indices, rows)
    if backend == "reference":
        out = cache.clone()
        without_autocast(reference.scatter_rows_)(out, indices, rows)
        return out
    expect_no_grad("scatter_rows", cache, rows)
    return _scatter_rows(cache, indices, rows, backend)


def _check_scatter_rows(op: str, cache: Tensor, indices: Tensor, rows: Tensor) -> None:
    expect(op, "cache", cache, (None, None, None), "(B, N, D)")
    expect_indices(op, indices, cache)
    expect(op, "rows", rows, (*indices.shape, cache.shape[2]), "(B, S, D)", like=cache)
