"""Linear layers on packed rows: the activation fused, the result scattered to its tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import reference
from ._checks import (
    expect,
    expect_activation,
    expect_indices,
    expect_no_grad,
    expect_writable,
    fail,
    is_plain,
)
from ._library import define, no_result, run, without_autocast
from .rows import gather_rows, scatter_rows_


def _run_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    indices: Tensor | None,
    backend: str,
) -> Tensor:
    out: Tensor = run("linear", x, backend)(x, weight, bias, activation, indices)
    return out


def _run_linear_scatter_(
    cache: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: bool,
    features: Tensor | None,
    backend: str,
) -> None:
    launch = run("linear_scatter_", cache, backend)
    launch(cache, indices, x, weight, bias, gate, residual, features)


def _run_linear_scatter(cache: Tensor, *arguments: object) -> Tensor:
    out = cache.clone(memory_format=torch.contiguous_format)
    _run_linear_scatter_(out, *arguments)  # type: ignore[arg-type]
    return out


_linear = define(
    "linear(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? indices, str backend)"
    " -> Tensor",
    _run_linear,
    lambda x, weight, bias, activation, indices, backend: x.new_empty(
        *(x if indices is None else indices).shape[:2], weight.shape[0]
    ),
)
_linear_scatter_ = define(
    "linear_scatter_(Tensor(a!) cache, Tensor indices, Tensor x, Tensor weight, Tensor? bias,"
    " Tensor? gate, bool residual, Tensor? features, str backend) -> ()",
    _run_linear_scatter_,
    no_result,
)
_linear_scatter = define(
    "linear_scatter(Tensor cache, Tensor indices, Tensor x, Tensor weight, Tensor? bias,"
    " Tensor? gate, bool residual, Tensor? features, str backend) -> Tensor",
    _run_linear_scatter,
    lambda cache, *_: cache.clone(memory_format=torch.contiguous_format),
)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    indices: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Apply a linear layer and its activation to packed rows, or to rows gathered on the way in.

    ``out[b, s] = activation(x[b, s] @ weight.T + bias)``; with ``indices`` the rows are
    ``x[b, indices[b, s]]``, and an empty slot is a row of zeros.

    Args:
        x: (B, S, K) packed rows, or (B, N, K) when ``indices`` is given; any float dtype; stride 1
            along K.
        weight: (O, K), dtype and device of ``x``; stride 1 along K. By a weight of its own class
            (quantised, say) PyTorch multiplies, whatever the backend.
        bias: (O,), likewise, or None.
        activation: ``"none"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        indices: (B, S) int32 or None; see ``gather_rows``.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``.

    Returns:
        (B, S, O), contiguous, with the dtype and device of ``x``.

    Raises:
        ValueError: a shape, stride, device, activation or backend name does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: an input requires grad and ``backend`` is not ``"reference"``.
        BackendUnavailableError: the backend named cannot run here.
    """
    expect("linear", "x", x, (None, None, None), "(B, S, K)")
    expect("linear", "weight", weight, (None, x.shape[2]), "(O, K)", like=x)
    if bias is not None:
        expect("linear", "bias", bias, (weight.shape[0],), "(O,)", like=x)
    expect_activation("linear", activation)
    if indices is not None:
        expect_indices("linear", indices, x, may_repeat=True)
    if backend == "reference" or not is_plain(weight):
        return without_autocast(reference.linear)(x, weight, bias, activation, indices)
    expect_no_grad("linear", x, weight, bias)
    out: Tensor = _linear(x, weight, bias, activation, indices, backend)
    return out


def linear_scatter_(
    cache: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    residual: bool = False,
    features: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Apply a linear layer to packed rows and store each result in its token's row of the cache.

    ``cache[b, indices[b, s]] = x[b, s] @ weight.T + bias``, times ``gate[b]`` if given, and added
    to the row's old value with ``residual``. With ``features`` the product is that of
    ``cat(features[b, indices[b, s]], x[b, s])``, which is never put together. An empty slot writes
    nothing, and every other row keeps its value.

    Args:
        cache: (B, N, O), written in place, not expanded; any float dtype; stride 1 along O. An
            input that shares memory with it is copied first.
        indices: (B, S) int32, unique per sample; see ``gather_rows``.
        x: (B, S, K) packed rows, dtype and device of ``cache``; stride 1 along K.
        weight: (O, K), or (O, F + K) with ``features``, likewise.
        bias: (O,), likewise, or None.
        gate: (B, O), likewise, or None.
        residual: whether to add to the old value instead of replacing it.
        features: (B, N, F), features of all tokens that come before ``x``, likewise, or None.
        backend: see ``linear``.

    Returns:
        ``cache``.

    Raises:
        ValueError, TypeError, RuntimeError, BackendUnavailableError: see ``linear``.

    Source:
        The cached tensor is the sub-layer's output before the gate (ToCa, arXiv:2410.05317), so
        ``gate`` and ``residual`` stay off there. ``features`` are the cached attention in front of
        the MLP in a single block of FLUX.
    """
    _check_linear_scatter("linear_scatter_", cache, indices, x, weight, bias, gate, features)
    expect_writable("linear_scatter_", "cache", cache)
    if backend == "reference":
        without_autocast(reference.linear_scatter_)(
            cache, indices, x, weight, bias, gate, residual, features
        )
        return cache
    if not is_plain(weight):
        _scatter_product_(cache, indices, x, weight, bias, gate, residual, features, backend)
        return cache
    expect_no_grad("linear_scatter_", cache, x, weight, bias, gate, features)
    _linear_scatter_(cache, indices, x, weight, bias, gate, residual, features, backend)
    return cache


def linear_scatter(
    cache: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    residual: bool = False,
    features: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Like ``linear_scatter_``, into a new tensor; ``cache`` keeps its value."""
    _check_linear_scatter("linear_scatter", cache, indices, x, weight, bias, gate, features)
    if backend == "reference":
        out = cache.clone()
        without_autocast(reference.linear_scatter_)(
            out, indices, x, weight, bias, gate, residual, features
        )
        return out
    if not is_plain(weight):
        out = cache.clone()
        _scatter_product_(out, indices, x, weight, bias, gate, residual, features, backend)
        return out
    expect_no_grad("linear_scatter", cache, x, weight, bias, gate, features)
    out = _linear_scatter(cache, indices, x, weight, bias, gate, residual, features, backend)
    return out


def _scatter_product_(
    cache: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: bool,
    features: Tensor | None,
    backend: str,
) -> None:
    """``linear_scatter_`` by a weight that PyTorch alone multiplies by."""
    if features is not None:
        x = torch.cat([gather_rows(features, indices, backend=backend), x], dim=-1)
    rows = without_autocast(F.linear)(x, weight, bias)
    if gate is not None:
        rows = gate[:, None] * rows
    if residual:
        rows = gather_rows(cache, indices, backend=backend) + rows
    scatter_rows_(cache, indices, rows, backend=backend)


def _check_linear_scatter(
    op: str,
    cache: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    features: Tensor | None,
) -> None:
    expect(op, "cache", cache, (None, None, None), "(B, N, O)")
    expect_indices(op, indices, cache)
    B, N, O = cache.shape  # noqa: E741
    expect(op, "x", x, (*indices.shape, None), "(B, S, K)", like=cache)
    if features is None:
        expect(op, "weight", weight, (O, x.shape[2]), "(O, K)", like=cache)
    else:
        expect(op, "features", features, (B, N, None), "(B, N, F)", like=cache)
        columns = features.shape[2] + x.shape[2]
        expect(op, "weight", weight, (O, columns), "(O, F + K)", like=cache)
    if bias is not None:
        expect(op, "bias", bias, (O,), "(O,)", like=cache)
    if gate is not None:
        expect(op, "gate", gate, (B, O), "(B, O)", like=cache)
    if x.shape[2] == 0:
        fail(op, "x", "have at least one channel", 0)
