"""Mix cached features with fresh ones by a weight for each token, and the gradients of that.

The backward pass reads each row once for all three gradients. A row's weight belongs to one
program, and the tokens that share a weight are summed by PyTorch afterwards: no atomics, so that
training gives the same bits again.
"""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._device import round_to
from ._launch import CompileCase, Device, choose, device_of
from ._tiles import TileSetting, piece_settings, whole_row_settings


@triton.jit(do_not_specialize=["N"])
def _blend_kernel(
    cached_ptr, fresh_ptr, weight_ptr, out_ptr,
    N, D,
    stride_cb, stride_cn, stride_fb, stride_fn, stride_wb, stride_wn,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, n] = (1 - weight[b, n]) * cached[b, n] + weight[b, n] * fresh[b, n]."""
    # int64: B * N * D passes 2**31 at video sizes
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(2).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (row < N)[:, None] & (offs_d < D)

    cached_rows = cached_ptr + batch * stride_cb + row * stride_cn
    fresh_rows = fresh_ptr + batch * stride_fb + row * stride_fn
    cached = tl.load(cached_rows[:, None] + offs_d, mask=mask).to(tl.float32)
    fresh = tl.load(fresh_rows[:, None] + offs_d, mask=mask).to(tl.float32)
    weights = weight_ptr + batch * stride_wb + row * stride_wn
    weight = tl.load(weights, mask=row < N)[:, None]

    out = (1.0 - weight) * cached + weight * fresh
    out_rows = out_ptr + (batch * N + row) * D
    tl.store(out_rows[:, None] + offs_d, round_to(out, out_ptr.dtype.element_ty), mask=mask)


def blend(cached: Tensor, fresh: Tensor, weight: Tensor) -> Tensor:
    """Launch ``_blend_kernel``."""
    B, N, D = fresh.shape
    out = fresh.new_empty(B, N, D)
    if out.numel() == 0:
        return out
    setting = choose("blend", device_of(out.device), {"D": D}, TileSetting.for_pieces(D))
    grid = (triton.cdiv(N, setting.rows), triton.cdiv(D, setting.block_d), B)
    _blend_kernel[grid](
        cached, fresh, weight, out,
        N, D,
        cached.stride(0), cached.stride(1), fresh.stride(0), fresh.stride(1),
        weight.stride(0), weight.stride(1),
        ROWS=setting.rows, BLOCK_D=setting.block_d, num_warps=setting.num_warps,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["N"])
def _blend_backward_kernel(
    grad_ptr, cached_ptr, fresh_ptr, weight_ptr,
    grad_cached_ptr, grad_fresh_ptr, grad_weight_ptr,
    N, D,
    stride_gb, stride_gn, stride_cb, stride_cn, stride_fb, stride_fn, stride_wb, stride_wn,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """grad_cached = (1 - weight) * grad (not written if None), grad_fresh = weight * grad, and
    grad_weight[b, n] = sum_d (fresh[b, n, d] - cached[b, n, d]) * grad[b, n, d].
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask = (row < N)[:, None] & (offs_d < D)

    grad_rows = grad_ptr + batch * stride_gb + row * stride_gn
    grad = tl.load(grad_rows[:, None] + offs_d, mask=mask, other=0.0).to(tl.float32)
    cached_rows = cached_ptr + batch * stride_cb + row * stride_cn
    fresh_rows = fresh_ptr + batch * stride_fb + row * stride_fn
    cached = tl.load(cached_rows[:, None] + offs_d, mask=mask, other=0.0).to(tl.float32)
    fresh = tl.load(fresh_rows[:, None] + offs_d, mask=mask, other=0.0).to(tl.float32)
    total = tl.sum((fresh - cached) * grad, axis=1)
    tl.store(grad_weight_ptr + batch * N + row, total, mask=row < N)

    weights = weight_ptr + batch * stride_wb + row * stride_wn
    weight = tl.load(weights, mask=row < N)[:, None]
    out_rows = (batch * N + row)[:, None] * D + offs_d
    dtype: tl.constexpr = grad_fresh_ptr.dtype.element_ty
    tl.store(grad_fresh_ptr + out_rows, round_to(weight * grad, dtype), mask=mask)
    if grad_cached_ptr is not None:
        tl.store(grad_cached_ptr + out_rows, round_to((1.0 - weight) * grad, dtype), mask=mask)


def blend_backward(
    grad: Tensor, cached: Tensor, fresh: Tensor, weight: Tensor, needs_cached: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """Launch ``_blend_backward_kernel``."""
    B, N, D = fresh.shape
    grad_cached = fresh.new_empty(B, N, D) if needs_cached else None
    grad_fresh = fresh.new_empty(B, N, D)
    # without a channel nothing is launched, and the sums are empty
    grad_weight = weight.new_zeros(B, N) if D == 0 else weight.new_empty(B, N)
    if grad_fresh.numel() == 0:
        return grad_cached, grad_fresh, grad_weight
    heuristic = TileSetting.for_whole_rows(D)
    setting = choose("blend_backward", device_of(fresh.device), {"D": D}, heuristic)
    _blend_backward_kernel[(triton.cdiv(N, setting.rows), B)](
        grad, cached, fresh, weight, grad_cached, grad_fresh, grad_weight,
        N, D,
        grad.stride(0), grad.stride(1), cached.stride(0), cached.stride(1),
        fresh.stride(0), fresh.stride(1), weight.stride(0), weight.stride(1),
        ROWS=setting.rows, BLOCK_D=setting.block_d, num_warps=setting.num_warps,
    )  # fmt: skip
    return grad_cached, grad_fresh, grad_weight


def compile_cases(device: Device) -> Iterator[CompileCase]:
    """Every setting; the backward pass in bfloat16 also without the gradient of ``cached``."""
    for dtype in ("bf16", "fp32"):
        for setting in piece_settings():
            yield _case(_blend_kernel, dtype, setting)
        for setting in whole_row_settings():
            for needs_cached in (True, False)[: 2 if dtype == "bf16" else 1]:
                yield _case(_blend_backward_kernel, dtype, setting, needs_cached)


def _case(
    kernel: triton.JITFunction[object], dtype: str, setting: TileSetting, needs_cached: bool = True
) -> CompileCase:
    signature: dict[str, str | tuple[str, ...]] = {}
    constexprs: dict[str, object] = {"ROWS": setting.rows, "BLOCK_D": setting.block_d}
    for name in kernel.arg_names:
        if name == "grad_cached_ptr" and not needs_cached:
            constexprs[name] = None
        elif name in ("weight_ptr", "grad_weight_ptr"):
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        elif name not in constexprs:
            signature[name] = "i32"
    return CompileCase(
        kernel=kernel,
        variant=dtype if needs_cached else f"{dtype} without cached",
        setting=setting,
        signature=signature,
        constexprs=constexprs,
        # a weight's strides are small numbers: 0, 1 or N
        aligned=frozenset(signature) - {"N", "stride_wb", "stride_wn"},
        num_warps=setting.num_warps,
    )
