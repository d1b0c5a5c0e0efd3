"""Mixing a cached tensor with a fresh one, and the gradients of that."""

from torch import Tensor

from .loading import OPS


def blend(cached: Tensor, fresh: Tensor, weight: Tensor) -> Tensor:
    """out[b, n] = (1 - weight[b, n]) * cached[b, n] + weight[b, n] * fresh[b, n]."""
    out: Tensor = OPS.blend(cached, fresh, weight)
    return out


def blend_backward(
    grad: Tensor, cached: Tensor, fresh: Tensor, weight: Tensor, needs_cached: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """(1 - weight) * grad or None, weight * grad, sum_d (fresh - cached) * grad."""
    grad_cached = fresh.new_empty(fresh.shape) if needs_cached else None
    grad_fresh, grad_weight = fresh.new_empty(fresh.shape), weight.new_empty(weight.shape)
    OPS.blend_backward(grad, cached, fresh, weight, grad_cached, grad_fresh, grad_weight)
    return grad_cached, grad_fresh, grad_weight
