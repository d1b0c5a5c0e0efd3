"""Differentiable interpolation of cached and fresh features, for routers and predictors."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from ..backends import reference
from ._checks import expect, fail
from ._library import NAMESPACE, define, run, without_autocast


def _run_blend_backward(
    grad: Tensor, cached: Tensor, fresh: Tensor, weight: Tensor, needs_cached: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    grad_cached, grad_fresh, grad_weight = run("blend_backward", fresh, backend)(
        grad, cached, fresh, weight, needs_cached
    )
    return fresh.new_empty(0) if grad_cached is None else grad_cached, grad_fresh, grad_weight


def _fake_blend_backward(
    grad: Tensor, cached: Tensor, fresh: Tensor, weight: Tensor, needs_cached: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        fresh.new_empty(fresh.shape if needs_cached else 0),
        fresh.new_empty(fresh.shape),
        weight.new_empty(weight.shape),
    )


# in the registered ops every token has a weight, if only by a stride of 0, in float32 or float64
_blend = define(
    "blend(Tensor cached, Tensor fresh, Tensor weight, str backend) -> Tensor",
    lambda cached, fresh, weight, backend: run("blend", fresh, backend)(cached, fresh, weight),
    lambda cached, fresh, weight, backend: fresh.new_empty(fresh.shape),
)
_blend_backward = define(
    "blend_backward(Tensor grad, Tensor cached, Tensor fresh, Tensor weight, bool needs_cached, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _run_blend_backward,
    _fake_blend_backward,
)


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    cached, fresh, weight, ctx.backend = inputs
    ctx.save_for_backward(cached, fresh, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
    cached, fresh, weight = ctx.saved_tensors
    needs_cached = ctx.needs_input_grad[0]
    grad_cached, grad_fresh, grad_weight = _blend_backward(
        grad.contiguous(), cached, fresh, weight, needs_cached, ctx.backend
    )
    return grad_cached if needs_cached else None, grad_fresh, grad_weight, None


def _refuse_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    # without this PyTorch would warn and give wrong second derivatives
    raise RuntimeError("blend: backend must be 'reference' for a second derivative, got another")


torch.library.register_autograd(f"{NAMESPACE}::blend", _backward, setup_context=_keep_inputs)
torch.library.register_autograd(f"{NAMESPACE}::blend_backward", _refuse_backward)


def blend(cached: Tensor, fresh: Tensor, weight: Tensor, *, backend: str = "auto") -> Tensor:
    """Mix cached features with fresh ones; unlike the other ops, with a gradient on every backend.

    ``out[b, n] = (1 - weight[b, n]) * cached[b, n] + weight[b, n] * fresh[b, n]``. The backward
    pass reads the three tensors once: the gradient of ``fresh`` is ``weight * grad``, that of
    ``cached`` ``(1 - weight) * grad`` (only written where it is asked for), that of ``weight``
    ``sum_d (fresh - cached) * grad``, summed over the tokens that share a weight. Sums have a fixed
    order: the same inputs give the same bits. Only the reference has a second derivative.

    Args:
        cached: (B, N, D), float16, bfloat16, float32 or float64; stride 1 along D.
        fresh: (B, N, D), dtype and device of ``cached``; stride 1 along D.
        weight: () for all tokens alike, (N,) for each position, or (B, N) for each token; float32
            or the dtype of ``cached``; any strides. It may lie outside [0, 1].
        backend: see ``gather_rows``.

    Returns:
        (B, N, D), contiguous, with the dtype of ``cached``; exactly ``fresh`` where the weight is 1
        and exactly ``cached`` where it is 0, as long as both are finite.

    Raises:
        ValueError: a shape, stride, device or backend name does not fit.
        TypeError: a dtype does not fit.
        BackendUnavailableError: the backend named cannot run here.

    Source:
        Learning-to-Cache (one weight a sub-layer) and TokenCache (arXiv:2409.18523, one a token).
    """
    expect("blend", "cached", cached, (None, None, None), "(B, N, D)")
    expect("blend", "fresh", fresh, cached.shape, "(B, N, D)", like=cached)
    B, N, _ = cached.shape
    if not isinstance(weight, Tensor) or weight.dim() > 2:
        got = tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__
        fail("blend", "weight", "be a tensor of shape (), (N,) or (B, N)", got)
    shape, letters = (((), "()"), ((N,), "(N)"), ((B, N), "(B, N)"))[weight.dim()]
    dtypes = tuple(dict.fromkeys((torch.float32, cached.dtype)))
    # small beside the features: a transposed or expanded one is copied
    weight = weight.contiguous()
    expect("blend", "weight", weight, shape, letters, like=cached, dtypes=dtypes)
    # 1 - weight, and the sum of many tokens' gradients, have too few digits in low precision
    weights = weight.to(torch.promote_types(cached.dtype, torch.float32)).expand(B, N)
    if backend == "reference":
        return without_autocast(reference.blend)(cached, fresh, weights)
    return _blend(cached, fresh, weights, backend)
