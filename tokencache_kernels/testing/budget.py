"""Error budgets of fast paths: about the error of plain PyTorch in their dtype, against float64."""

import torch
from torch import Tensor


def error_budget(exact: Tensor, rounded: Tensor) -> float:
    """Twice the error of plain PyTorch, plus one rounding of the largest value.

    Args:
        exact: the reference in float64.
        rounded: the reference in the dtype under test.
    """
    if exact.numel() == 0:
        return 0.0
    error = (rounded.double() - exact).abs().max().item()
    return 2 * error + torch.finfo(rounded.dtype).eps * exact.abs().max().item()


def assert_within_budget(out: Tensor, exact: Tensor, rounded: Tensor) -> None:
    """Assert that ``out`` is as exact as plain PyTorch is, in the same shape and dtype."""
    assert out.shape == rounded.shape, f"shape {tuple(out.shape)}, want {tuple(rounded.shape)}"
    assert out.dtype == rounded.dtype, f"dtype {out.dtype}, want {rounded.dtype}"
    if out.numel() == 0:
        return
    error = (out.double() - exact).abs()
    assert not error.isnan().any(), (
        f"{int(error.isnan().sum())} of {error.numel()} elements are NaN"
    )
    budget = error_budget(exact, rounded)
    worst = int(error.argmax())
    assert error.max().item() <= budget, (
        f"error {error.max().item():.3e} exceeds the budget {budget:.3e} at flat index {worst}: "
        f"{out.flatten()[worst].item()} against {exact.flatten()[worst].item()}"
    )
