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

GLUS = ("gate_first", "gate_last")


def _run_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    indices: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    backend: str,
) -> Tensor:
    launch = run("linear", x, backend)
    if gate_weight is None:
        out: Tensor = launch(x, weight, bias, activation, indices)
        return out
    gate = launch(x, gate_weight, gate_bias, activation, indices)
    gated: Tensor = launch(x, weight, bias, "none", indices, gate)
    return gated


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
    "linear(Tensor x, Tensor weight, Tensor? bias, str activation, Tensor? indices,"
    " Tensor? gate_weight, Tensor? gate_bias, str backend) -> Tensor",
    _run_linear,
    lambda x, weight, bias, activation, indices, *_: x.new_empty(
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
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
    glu: str | None = None,
    backend: str = "auto",
) -> Tensor:
    """Apply a linear layer and its activation to packed rows, or to rows gathered on the way in.

    ``out[b, s] = activation(x[b, s] @ weight.T + bias)``; with ``indices`` the rows are
    ``x[b, indices[b, s]]``, and an empty slot is a row of zeros. A gated layer (SwiGLU with
    ``"silu"``, GEGLU with ``"gelu"`` or ``"gelu_tanh"``) has a gate, which takes the activation:
    ``out[b, s] = activation(x[b, s] @ gate_weight.T + gate_bias) * (x[b, s] @ weight.T + bias)``.

    Args:
        x: (B, S, K) packed rows, or (B, N, K) when ``indices`` is given; any float dtype; stride 1
            along K.
        weight: (O, K), dtype and device of ``x``; stride 1 along K. By a weight of its own class
            (quantised, say) PyTorch multiplies, whatever the backend.
        bias: (O,), dtype and device of ``weight``, or None.
        activation: ``"none"``, ``"gelu"`` (erf), ``"gelu_tanh"`` or ``"silu"``.
        indices: (B, S) int32 or None; see ``gather_rows``.
        gate_weight: (O, K), of a gated layer with two weights.
        gate_bias: (O,), dtype and device of ``weight``, or None.
        glu: of a gated layer with one weight (2 * O, K) and bias (2 * O,), which half of their rows
            is the gate: ``"gate_first"`` or ``"gate_last"``.
        backend: ``"auto"``, ``"triton"``, ``"native"`` or ``"reference"``.

    Returns:
        (B, S, O), contiguous, with the dtype and device of ``x``.

    Raises:
        ValueError: a shape, stride, device, activation or backend name does not fit.
        TypeError: a dtype does not fit.
        RuntimeError: an input requires grad and ``backend`` is not ``"reference"``.
        BackendUnavailableError: the backend named cannot run here.

    Source:
        The gated layers are those of Shazeer (arXiv:2002.05202).
    """
    expect("linear", "x", x, (None, None, None), "(B, S, K)")
    expect("linear", "weight", weight, (None, x.shape[2]), "(O, K)", like=x)
    if bias is not None:
        expect("linear", "bias", bias, (weight.shape[0],), "(O,)", like=x)
    expect_activation("linear", activation)
    if indices is not None:
        expect_indices("linear", indices, x, may_repeat=True)
    weight, bias, gate_weight, gate_bias = split_gate(
        "linear", "", weight, bias, gate_weight, gate_bias, glu
    )
    if backend == "reference" or not is_plain(weight, gate_weight):
        product = without_autocast(reference.linear)
        if gate_weight is None:
            return product(x, weight, bias, activation, indices)
        gate = product(x, gate_weight, gate_bias, activation, indices)
        return product(x, weight, bias, "none", indices, gate)
    expect_no_grad("linear", x, weight, bias, gate_weight, gate_bias)
    out: Tensor = _linear(x, weight, bias, activation, indices, gate_weight, gate_bias, backend)
    return out


def split_gate(
    op: str,
    layer: str,
    weight: Tensor,
    bias: Tensor | None,
    gate_weight: Tensor | None,
    gate_bias: Tensor | None,
    glu: str | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Check the gate of a layer; return weight and bias, then the gate's, two halves of one or not.

    ``layer`` comes before the arguments' names in messages, such as ``fc1_``.
    """
    if glu is None:
        if gate_weight is not None:
            expect(op, f"{layer}gate_weight", gate_weight, weight.shape, "(O, K)", like=weight)
        if gate_bias is not None:
            if gate_weight is None:
                fail(op, f"{layer}gate_bias", "come with a gate_weight", "none")
            expect(op, f"{layer}gate_bias", gate_bias, weight.shape[:1], "(O,)", like=weight)
        return weight, bias, gate_weight, gate_bias
    if glu not in GLUS:
        fail(op, "glu", f"be None or one of {', '.join(GLUS)}", repr(glu))
    if gate_weight is not None or gate_bias is not None:
        fail(op, "glu", "be None where the gate has a weight of its own", repr(glu))
    if weight.shape[0] % 2:
        fail(op, f"{layer}weight", "have two halves of rows where it holds a gate", weight.shape[0])
    if not is_plain(weight):
        fail(
            op, f"{layer}weight", "be a plain tensor where it holds a gate", type(weight).__name__
        )  # fmt: skip
    weights = weight.chunk(2)
    biases = (None, None) if bias is None else bias.chunk(2)
    gate, value = (0, 1) if glu == "gate_first" else (1, 0)
    return weights[value], biases[value], weights[gate], biases[gate]


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
        weight: (O, K), or (O, F + K) with ``features``; dtype of ``cache``.
        bias: (O,), dtype and device of ``weight``, or None.
        gate: (B, O), dtype of ``cache``, or None.
        residual: whether to add to the old value instead of replacing it.
        features: (B, N, F), features of all tokens that come before ``x``, or None.
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
