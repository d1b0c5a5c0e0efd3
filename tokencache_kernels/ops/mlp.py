"""The whole MLP of the selected tokens: gather, normalise, modulate, two linear layers, scatter."""

import torch
from torch import Tensor

from ..backends import reference
from ._checks import (
    expect,
    expect_activation,
    expect_indices,
    expect_no_grad,
    expect_writable,
    is_plain,
)
from ._library import define, no_result, run, without_autocast
from .linear import linear, linear_scatter_
from .modulate import gather_modulate


def _run_mlp_(cache: Tensor, *arguments: object) -> None:
    *inputs, backend = arguments
    run("mlp_", cache, str(backend))(cache, *inputs)


def _run_mlp(cache: Tensor, *arguments: object) -> Tensor:
    out = cache.clone(memory_format=torch.contiguous_format)
    _run_mlp_(out, *arguments)
    return out


_ARGUMENTS = (
    "Tensor hidden_states, Tensor indices, Tensor shift, Tensor scale, Tensor fc1_weight,"
    " Tensor? fc1_bias, Tensor fc2_weight, Tensor? fc2_bias, str activation, float eps, str backend"
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
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Recompute the MLP of the selected tokens and store the results in the cache.

    ``cache[b, i] = fc2(activation(fc1(layer_norm(hidden_states[b, i]) * (1 + scale[b]) +
    shift[b])))`` for every ``i`` in ``indices[b]``; every other row keeps its value. At most three
    launches, or one persistent launch, whichever the launch setting says.

    Args:
        cache: (B, N, D), written in place, not expanded: the MLP's output before the gate; any
            float dtype. An input that shares memory with it is copied first.
        hidden_states: (B, N, D), the MLP's input before its norm; dtype and device of ``cache``.
        indices: (B, S) int32, unique per sample; see ``gather_rows``.
        shift: (B, D), likewise.
        scale: (B, D), likewise.
        fc1_weight: (M, D), likewise.
        fc1_bias: (M,), likewise, or None.
        fc2_weight: (D, M), likewise.
        fc2_bias: (D,), likewise, or None.
        activation: ``"none"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        eps: added to the variance.
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
    _check_mlp(
        "mlp_", cache, hidden_states, indices, shift, scale, fc1_weight, fc1_bias, fc2_weight,
        fc2_bias, activation,
    )  # fmt: skip
    expect_writable("mlp_", "cache", cache)
    arguments = (
        hidden_states, indices, shift, scale, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        activation, eps,
    )  # fmt: skip
    if backend == "reference":
        without_autocast(reference.mlp_)(cache, *arguments)
        return cache
    if not is_plain(fc1_weight, fc2_weight):
        rows = gather_modulate(hidden_states, indices, shift, scale, eps=eps, backend=backend)
        rows = linear(rows, fc1_weight, fc1_bias, activation=activation, backend=backend)
        return linear_scatter_(cache, indices, rows, fc2_weight, fc2_bias, backend=backend)
    expect_no_grad(
        "mlp_", cache, hidden_states, shift, scale, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    )
    _mlp_(cache, *arguments, backend)
    return cache


def mlp(
    cache: Tensor,
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    *,
    activation: str = "gelu_tanh",
    eps: float = 1e-6,
    backend: str = "auto",
) -> Tensor:
    """Like ``mlp_``, into a new tensor; ``cache`` keeps its value."""
    _check_mlp(
        "mlp", cache, hidden_states, indices, shift, scale, fc1_weight, fc1_bias, fc2_weight,
        fc2_bias, activation,
    )  # fmt: skip
    arguments = (
        hidden_states, indices, shift, scale, fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        activation, eps,
    )  # fmt: skip
    if backend == "reference":
        out = cache.clone()
        without_autocast(reference.mlp_)(out, *arguments)
        return out
    if not is_plain(fc1_weight, fc2_weight):
        return mlp_(
            cache.clone(), hidden_states, indices, shift, scale, fc1_weight, fc1_bias, fc2_weight,
            fc2_bias, activation=activation, eps=eps, backend=backend,
        )  # fmt: skip
    expect_no_grad(
        "mlp", cache, hidden_states, shift, scale, fc1_weight, fc1_bias, fc2_weight, fc2_bias
    )
    result: Tensor = _mlp(cache, *arguments, backend)
    return result


def _check_mlp(
    op: str,
    cache: Tensor,
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor,
    scale: Tensor,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
) -> None:
    expect(op, "cache", cache, (None, None, None), "(B, N, D)")
    expect(op, "hidden_states", hidden_states, cache.shape, "(B, N, D)", like=cache)
    expect_indices(op, indices, cache)
    B, _, D = cache.shape
    expect(op, "shift", shift, (B, D), "(B, D)", like=cache)
    expect(op, "scale", scale, (B, D), "(B, D)", like=cache)
    expect(op, "fc1_weight", fc1_weight, (None, D), "(M, D)", like=cache)
    M = fc1_weight.shape[0]
    if fc1_bias is not None:
        expect(op, "fc1_bias", fc1_bias, (M,), "(M,)", like=cache)
    expect(op, "fc2_weight", fc2_weight, (D, M), "(D, M)", like=cache)
    if fc2_bias is not None:
        expect(op, "fc2_bias", fc2_bias, (D,), "(D,)", like=cache)
    expect_activation(op, activation)
