"""The whole MLP of the selected tokens: gather, normalise, modulate, two linear layers, scatter."""

from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..backends.reference import RowNorm
from ._checks import expect, expect_activation, expect_no_grad, expect_writable, is_plain
from ._library import define, no_result, run, without_autocast
from .linear import linear, linear_scatter_, split_gate
from .modulate import check_modulate, flatten_norm, gather_modulate


def _run_mlp_(
    cache: Tensor,
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    norm_kind: str,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_offset: float,
    eps: float,
    vector_index: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    backend: str,
) -> None:
    norm = RowNorm(norm_kind, norm_weight, norm_bias, norm_offset, eps)
    run("mlp_", cache, backend)(
        cache, hidden_states, indices, shift, scale, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        activation, norm, vector_index, gate_weight, gate_bias,
    )  # fmt: skip


def _run_mlp(cache: Tensor, *arguments: Any) -> Tensor:
    out = cache.clone(memory_format=torch.contiguous_format)
    _run_mlp_(out, *arguments)
    return out


_ARGUMENTS = (
    "Tensor hidden_states, Tensor indices, Tensor? shift, Tensor? scale, Tensor fc1_weight,"
    " Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, str activation, str norm_kind,"
    " Tensor? norm_weight, Tensor? norm_bias, float norm_offset, float eps, Tensor? vector_index,"
    " Tensor? gate_weight, Tensor? gate_bias, str backend"
)
_mlp_ = define(f"mlp_(Tensor(a!) cache, {_ARGUMENTS}) -> ()", _run_mlp_, no_result)
_mlp = define(
    f"mlp(Tensor cache, {_ARGUMENTS}) -> Tensor",
    _run_mlp,
    lambda cache, *_: cache.clone(memory_format=torch.contiguous_format),
)


def mlp_(
    cache: Tensor,
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    glu: str | None = None,
    norm: RowNorm | None = None,
    vector_index: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Recompute the MLP of the selected tokens and store the results in the cache.

    ``cache[b, i] = fc2(activation(fc1(norm(hidden_states[b, i]) * (1 + scale[b]) + shift[b])))``
    for every ``i`` in ``indices[b]``; every other row keeps its value. In a gated MLP the first
    layer is the gated one of ``linear``. At most three launches (four if gated), or one persistent
    launch, whichever the launch setting says.

    Args:
        cache: (B, N, D), written in place, not expanded: the MLP's output before the gate; any
            float dtype. An input that shares memory with it is copied first.
        hidden_states: (B, N, D), the MLP's input before its norm; dtype and device of ``cache``.
        indices: (B, S) int32, unique per sample; see ``gather_rows``.
        shift: see ``gather_modulate``; None: 0.
        scale: see ``gather_modulate``; None: 0.
        fc1_weight: (M, D), or (2 * M, D) with ``glu``; dtype of ``cache``.
        fc1_bias: (M,), or (2 * M,) with ``glu``, or None.
        fc2_weight: (D, M), dtype of ``cache``.
        fc2_bias: (D,), or None.
        activation: ``"none"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``; of the gate where
            there is one.
        gate_weight: (M, D), the gate's weight of a gated MLP; see ``linear``.
        gate_bias: (M,), or None.
        glu: which half of ``fc1_weight`` is the gate; see ``linear``.
        norm: see ``gather_modulate``.
        vector_index: see ``add_branches_``.
        eps: see ``gather_modulate``.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``.

    Returns:
        ``cache``.

    Raises:
        ValueError: a shape, stride, device, activation or backend name does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: an input requires grad and ``backend`` is not ``"reference"``.
        BackendUnavailableError: the backend named cannot run here.

    Source:
        The partial MLP of ToCa (arXiv:2410.05317).
    """
    return _recompute_(
        "mlp_", cache, False, hidden_states, indices, shift, scale, fc1_weight, fc1_bias,
        fc2_weight, fc2_bias, activation, gate_weight, gate_bias, glu, norm, vector_index, eps,
        backend,
    )  # fmt: skip


def mlp(
    cache: Tensor,
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    glu: str | None = None,
    norm: RowNorm | None = None,
    vector_index: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Like ``mlp_``, into a new contiguous tensor; ``cache`` keeps its value."""
    return _recompute_(
        "mlp", cache, True, hidden_states, indices, shift, scale, fc1_weight, fc1_bias,
        fc2_weight, fc2_bias, activation, gate_weight, gate_bias, glu, norm, vector_index, eps,
        backend,
    )  # fmt: skip


def _recompute_(
    op: str,
    cache: Tensor,
    is_copied: bool,
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    glu: str | None,
    norm: RowNorm | None,
    vector_index: Tensor | None,
    eps: float,
    backend: str,
) -> Tensor:
    """Check all arguments and recompute into the cache, or into a copy of it."""
    expect(op, "cache", cache, (None, None, None), "(B, N, D)")
    expect(op, "hidden_states", hidden_states, cache.shape, "(B, N, D)", like=cache)
    check_modulate(op, hidden_states, indices, shift, scale, norm, vector_index)
    D = cache.shape[2]
    expect(op, "fc1_weight", fc1_weight, (None, D), "(M, D)", like=cache)
    if fc1_bias is not None:
        expect(op, "fc1_bias", fc1_bias, fc1_weight.shape[:1], "(M,)", like=cache)
    fc1_weight, fc1_bias, gate_weight, gate_bias = split_gate(
        op, "fc1_", fc1_weight, fc1_bias, gate_weight, gate_bias, glu
    )
    M = fc1_weight.shape[0]
    expect(op, "fc2_weight", fc2_weight, (D, M), "(D, M)", like=cache)
    if fc2_bias is not None:
        expect(op, "fc2_bias", fc2_bias, (D,), "(D,)", like=cache)
    expect_activation(op, activation)
    if not is_copied:
        expect_writable(op, "cache", cache)
    norm = norm or RowNorm(eps=eps)
    before = hidden_states, indices, shift, scale, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    if backend == "reference":
        out = cache.clone() if is_copied else cache
        without_autocast(reference.mlp_)(
            out, *before, activation, norm, vector_index, gate_weight, gate_bias
        )
        return out
    if not is_plain(fc1_weight, fc2_weight, gate_weight):
        out = cache.clone() if is_copied else cache
        rows = gather_modulate(
            hidden_states, indices, shift, scale, norm=norm, vector_index=vector_index,
            backend=backend,
        )  # fmt: skip
        rows = linear(
            rows, fc1_weight, fc1_bias, activation=activation, gate_weight=gate_weight,
            gate_bias=gate_bias, backend=backend,
        )  # fmt: skip
        return linear_scatter_(out, indices, rows, fc2_weight, fc2_bias, backend=backend)
    floats = [value for value in before if value is not indices]
    expect_no_grad(op, cache, *floats, gate_weight, gate_bias, norm.weight, norm.bias)
    arguments = (
        *before, activation, *flatten_norm(norm), vector_index, gate_weight, gate_bias, backend
    )  # fmt: skip
    if is_copied:
        result: Tensor = _mlp(cache, *arguments)
        return result
    _mlp_(cache, *arguments)
    return cache
