"""Move rows of selected tokens: a pure copy, so a program moves several rows in 16-byte pieces."""

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._launch import CompileCase, Device, choose, device_of
from ._tiles import TileSetting, piece_settings


@triton.jit(
    do_not_specialize=["B", "N", "S", "stride_ib"],
    do_not_specialize_on_alignment=["indices_ptr"],
)
def _gather_rows_kernel(
    x_ptr, indices_ptr, out_ptr,
    B, N, S, D,
    stride_xb, stride_xn, stride_ib,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, s] = x[b, indices[b, s]]; an empty slot: 0."""
    # int64: B * N * D passes 2**31 at video sizes
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = row // S
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_slot = batch < B
    mask_d = offs_d < D

    slots = indices_ptr + batch * stride_ib + row % S
    token = tl.load(slots, mask=is_slot, other=-1).to(tl.int64)
    is_live = (token >= 0) & (token < N)
    x_rows = x_ptr + batch * stride_xb + token * stride_xn
    x = tl.load(x_rows[:, None] + offs_d, mask=is_live[:, None] & mask_d, other=0.0)
    tl.store((out_ptr + row * D)[:, None] + offs_d, x, mask=is_slot[:, None] & mask_d)


def gather_rows(hidden_states: Tensor, indices: Tensor) -> Tensor:
    """Launch ``_gather_rows_kernel``."""
    B, N, D = hidden_states.shape
    S = indices.shape[1]
    out = hidden_states.new_empty(B, S, D)
    if out.numel() == 0:
        return out
    heuristic = TileSetting.for_pieces(D)
    setting = choose("gather_rows", device_of(out.device), {"D": D}, heuristic, piece_settings)
    grid = (triton.cdiv(B * S, setting.rows), triton.cdiv(D, setting.block_d))
    _gather_rows_kernel[grid](
        hidden_states, indices, out,
        B, N, S, D,
        hidden_states.stride(0), hidden_states.stride(1), indices.stride(0),
        ROWS=setting.rows, BLOCK_D=setting.block_d, num_warps=setting.num_warps,
    )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=["B", "N", "S", "stride_ib"],
    do_not_specialize_on_alignment=["indices_ptr"],
)
def _scatter_rows_kernel(
    rows_ptr, indices_ptr, cache_ptr,
    B, N, S, D,
    gap_rb, stride_rs, stride_ib, stride_cb, stride_cn,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """cache[b, indices[b, s]] = rows[b, s]; an empty slot writes nothing."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = row // S
    slot = row % S
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)

    slots = indices_ptr + batch * stride_ib + slot
    token = tl.load(slots, mask=batch < B, other=-1).to(tl.int64)
    is_live = (token >= 0) & (token < N)
    mask = is_live[:, None] & (offs_d < D)
    # of packed rows the gap is 0, whatever their number: a stride of S * D could be divisible by 16
    # in one step and not in the next
    source = rows_ptr + batch * gap_rb + row * stride_rs
    target = cache_ptr + batch * stride_cb + token * stride_cn
    values = tl.load(source[:, None] + offs_d, mask=mask, other=0.0)
    tl.store(target[:, None] + offs_d, values, mask=mask)


def scatter_rows_(cache: Tensor, indices: Tensor, rows: Tensor) -> None:
    """Launch ``_scatter_rows_kernel``."""
    B, N, D = cache.shape
    S = indices.shape[1]
    if rows.numel() == 0:
        return
    heuristic = TileSetting.for_pieces(D)
    setting = choose("scatter_rows_", device_of(cache.device), {"D": D}, heuristic, piece_settings)
    grid = (triton.cdiv(B * S, setting.rows), triton.cdiv(D, setting.block_d))
    _scatter_rows_kernel[grid](
        rows, indices, cache,
        B, N, S, D,
        rows.stride(0) - S * rows.stride(1), rows.stride(1), indices.stride(0),
        cache.stride(0), cache.stride(1),
        ROWS=setting.rows, BLOCK_D=setting.block_d, num_warps=setting.num_warps,
    )  # fmt: skip


def compile_cases(device: Device) -> Iterator[CompileCase]:
    """Every setting of both copies."""
    for setting in piece_settings():
        for dtype in ("bf16", "fp32"):
            for kernel, features in (
                (_gather_rows_kernel, ("x_ptr", "out_ptr")),
                (_scatter_rows_kernel, ("rows_ptr", "cache_ptr")),
            ):
                strides = [
                    name
                    for name in kernel.arg_names
                    if name.startswith(("stride_", "gap_")) and name != "stride_ib"
                ]
                yield CompileCase(
                    kernel=kernel,
                    variant=dtype,
                    setting=setting,
                    signature={
                        **dict.fromkeys(features, f"*{dtype}"),
                        "indices_ptr": "*i32",
                        **dict.fromkeys(("B", "N", "S", "D", "stride_ib", *strides), "i32"),
                    },
                    constexprs={"ROWS": setting.rows, "BLOCK_D": setting.block_d},
                    aligned=frozenset((*features, "D", *strides)),
                    num_warps=setting.num_warps,
                )
