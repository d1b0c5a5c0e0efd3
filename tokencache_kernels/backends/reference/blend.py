"""Mixing a cached tensor with a fresh one; the weights come in float32, or float64 with float64."""

from torch import Tensor


def blend(cached: Tensor, fresh: Tensor, weight: Tensor) -> Tensor:
    """out[b, n] = (1 - weight[b, n]) * cached[b, n] + weight[b, n] * fresh[b, n]."""
    w = weight[..., None]
    return ((1 - w) * cached + w * fresh).to(fresh.dtype)


def blend_backward(
    grad: Tensor, cached: Tensor, fresh: Tensor, weight: Tensor, needs_cached: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Return the gradients of ``cached``, ``(1 - weight) * grad``, or None if it needs none; of
    ``fresh``, ``weight * grad``. The gradient of each weight is ``sum_d (fresh - cached) * grad``,
    in the weights' dtype.
    """
    w = weight[..., None]
    return (
        ((1 - w) * grad).to(fresh.dtype) if needs_cached else None,
        (w * grad).to(fresh.dtype),
        ((fresh.to(w.dtype) - cached) * grad).sum(-1),
    )
