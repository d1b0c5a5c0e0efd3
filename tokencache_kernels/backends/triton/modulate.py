"""The row pass: add gated branches to every row, and modulate the selected rows while at hand.

Every row is read and written once. The selected ones are layer-normalised from registers, so that
the pass costs one packed row each on top of the sum.
"""

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from ._device import await_previous, round_to
from ._launch import CompileCase, Device, choose, device_of, early_start
from ._tiles import TileSetting, piece_settings, whole_row_settings

# branches that one launch adds, alone and in a row pass, which has whole rows in registers; a
# longer run takes several launches
MAX_BRANCHES = 8
MAX_PASS_BRANCHES = 4


@triton.jit
def _sum_branches(
    x_ptr, branch_ptrs, gate_ptrs,
    batch, row, offs_d, mask, mask_d,
    stride_xb, stride_xn, strides_branch_b, strides_branch_n, strides_gate_b,
):  # fmt: skip
    """x[b, n] + sum_j gates[j][b] * branches[j][b, n], in float32; a gate of None is 1."""
    x_rows = x_ptr + batch * stride_xb + row * stride_xn
    total = tl.load(x_rows[:, None] + offs_d, mask=mask, other=0.0).to(tl.float32)
    for j in tl.static_range(len(branch_ptrs)):
        rows = branch_ptrs[j] + batch * strides_branch_b[j] + row * strides_branch_n[j]
        branch = tl.load(rows[:, None] + offs_d, mask=mask, other=0.0).to(tl.float32)
        if gate_ptrs[j] is not None:
            gates = gate_ptrs[j] + batch * strides_gate_b[j] + offs_d
            branch *= tl.load(gates, mask=mask_d, other=0.0).to(tl.float32)
        total += branch
    return total  # [ROWS, BLOCK_D]


@triton.jit
def _modulate(
    x, shift_ptr, scale_ptr, batch, D, eps, offs_d, mask_d, stride_shift_b, stride_scale_b
):
    """layer_norm(x) * (1 + scale[b]) + shift[b], in float32; x: [ROWS, BLOCK_D], 0 where masked."""
    mean = tl.sum(x, axis=1) / D
    centred = tl.where(mask_d, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)
    # one after the other: fewer registers than both at once
    scale = tl.load(scale_ptr + batch * stride_scale_b + offs_d, mask=mask_d, other=0.0)
    y = centred * rstd[:, None] * (1.0 + scale.to(tl.float32))
    shift = tl.load(shift_ptr + batch * stride_shift_b + offs_d, mask=mask_d, other=0.0)
    return y + shift.to(tl.float32)


@triton.jit(do_not_specialize=["N"])
def _add_branches_kernel(
    x_ptr, branch_ptrs, gate_ptrs, out_ptr,
    N, D,
    stride_xb, stride_xn, strides_branch_b, strides_branch_n, strides_gate_b, stride_ob, stride_on,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STARTS_EARLY: tl.constexpr,
):  # fmt: skip
    """out[b, n] = x[b, n] + sum_j gates[j][b] * branches[j][b, n]."""
    if STARTS_EARLY:
        await_previous()
    # int64: B * N * D passes 2**31 at video sizes
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(2).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = (row < N)[:, None] & mask_d

    total = _sum_branches(
        x_ptr, branch_ptrs, gate_ptrs,
        batch, row, offs_d, mask, mask_d,
        stride_xb, stride_xn, strides_branch_b, strides_branch_n, strides_gate_b,
    )  # fmt: skip
    out_rows = out_ptr + batch * stride_ob + row * stride_on
    tl.store(out_rows[:, None] + offs_d, round_to(total, out_ptr.dtype.element_ty), mask=mask)


def add_branches(
    out: Tensor,
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
) -> None:
    """Launch ``_add_branches_kernel``, once for every ``MAX_BRANCHES`` branches."""
    B, N, D = hidden_states.shape
    if not branches:
        out.copy_(hidden_states)
    if out.numel() == 0:
        return
    heuristic = TileSetting.for_pieces(D)
    device = device_of(out.device)
    setting = choose("add_branches", device, {"D": D}, heuristic)
    grid = (triton.cdiv(N, setting.rows), triton.cdiv(D, setting.block_d), B)
    x = hidden_states
    for start in range(0, len(branches), MAX_BRANCHES):
        some = tuple(branches[start : start + MAX_BRANCHES])
        some_gates = tuple(gates[start : start + MAX_BRANCHES])
        _add_branches_kernel[grid](
            x, some, some_gates, out,
            N, D,
            x.stride(0), x.stride(1), *_branch_strides(some, some_gates),
            out.stride(0), out.stride(1),
            ROWS=setting.rows, BLOCK_D=setting.block_d, num_warps=setting.num_warps,
            **early_start(device),
        )  # fmt: skip
        x = out


def _branch_strides(
    branches: Sequence[Tensor], gates: Sequence[Tensor | None]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """The strides along B and N of the branches, and along B of the gates."""
    return (
        tuple(branch.stride(0) for branch in branches),
        tuple(branch.stride(1) for branch in branches),
        tuple(0 if gate is None else gate.stride(0) for gate in gates),
    )


@triton.jit(do_not_specialize=["N", "S"])
def _gather_modulate_kernel(
    x_ptr, indices_ptr, shift_ptr, scale_ptr, out_ptr,
    N, S, D, eps,
    stride_xb, stride_xn, stride_ib, stride_shift_b, stride_scale_b,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STARTS_EARLY: tl.constexpr,
):  # fmt: skip
    """out[b, s] = layer_norm(x[b, indices[b, s]]) * (1 + scale[b]) + shift[b]; an empty slot: 0."""
    if STARTS_EARLY:
        await_previous()
    slot = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D

    slots = indices_ptr + batch * stride_ib + slot
    token = tl.load(slots, mask=slot < S, other=-1).to(tl.int64)
    is_live = ((token >= 0) & (token < N))[:, None]
    x_rows = x_ptr + batch * stride_xb + token * stride_xn
    x = tl.load(x_rows[:, None] + offs_d, mask=is_live & mask_d, other=0.0).to(tl.float32)

    y = _modulate(
        x, shift_ptr, scale_ptr, batch, D, eps, offs_d, mask_d, stride_shift_b, stride_scale_b
    )
    # an empty slot must stay finite: the GEMM behind it reads every row
    y = tl.where(is_live, y, 0.0)
    out_rows = out_ptr + (batch * S + slot) * D
    mask = (slot < S)[:, None] & mask_d
    tl.store(out_rows[:, None] + offs_d, round_to(y, out_ptr.dtype.element_ty), mask=mask)


def gather_modulate(
    hidden_states: Tensor, indices: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """Launch ``_gather_modulate_kernel``."""
    B, N, D = hidden_states.shape
    S = indices.shape[1]
    out = hidden_states.new_empty(B, S, D)
    if out.numel() == 0:
        return out
    heuristic = TileSetting.for_whole_rows(D)
    device = device_of(out.device)
    setting = choose("gather_modulate", device, {"D": D}, heuristic)
    _gather_modulate_kernel[(triton.cdiv(S, setting.rows), B)](
        hidden_states, indices, shift, scale, out,
        N, S, D, eps,
        hidden_states.stride(0), hidden_states.stride(1), indices.stride(0),
        shift.stride(0), scale.stride(0),
        ROWS=setting.rows, BLOCK_D=setting.block_d, num_warps=setting.num_warps,
        **early_start(device),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["N", "S"])
def _row_pass_kernel(
    x_ptr, branch_ptrs, gate_ptrs, indices_ptr, positions_ptr, shift_ptr, scale_ptr,
    out_ptr, packed_ptr,
    N, S, D, eps,
    stride_xb, stride_xn, strides_branch_b, strides_branch_n, strides_gate_b,
    stride_ib, stride_pb, stride_shift_b, stride_scale_b, stride_ob, stride_on,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STARTS_EARLY: tl.constexpr,
):  # fmt: skip
    """out[b, n] = x[b, n] + sum_j gates[j][b] * branches[j][b, n], and of that rounded row
    packed[b, positions[b, n]] = layer_norm(out[b, n]) * (1 + scale[b]) + shift[b]; empty slots: 0.
    """
    if STARTS_EARLY:
        await_previous()
    # rows 0 .. N - 1 are tokens; the S rows behind them are slots, to be cleared where empty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    is_token = row < N
    is_slot = (row >= N) & (row < N + S)

    mask = is_token[:, None] & mask_d
    total = _sum_branches(
        x_ptr, branch_ptrs, gate_ptrs,
        batch, row, offs_d, mask, mask_d,
        stride_xb, stride_xn, strides_branch_b, strides_branch_n, strides_gate_b,
    )  # fmt: skip
    out = round_to(total, out_ptr.dtype.element_ty)
    out_rows = out_ptr + batch * stride_ob + row * stride_on
    tl.store(out_rows[:, None] + offs_d, out, mask=mask)

    position = tl.load(positions_ptr + batch * stride_pb + row, mask=is_token, other=-1)
    index = tl.load(indices_ptr + batch * stride_ib + row - N, mask=is_slot, other=0)
    is_fresh = (position >= 0) & (position < S)
    is_packed = is_fresh | (is_slot & ((index < 0) | (index >= N)))
    # most programs hold no selected token
    if tl.max(is_packed.to(tl.int32), axis=0) > 0:
        y = _modulate(
            out.to(tl.float32), shift_ptr, scale_ptr,
            batch, D, eps, offs_d, mask_d, stride_shift_b, stride_scale_b,
        )  # fmt: skip
        # an empty slot must stay finite: the GEMM behind it reads every row
        y = tl.where(is_token[:, None], y, 0.0)
        slot = tl.where(is_token, position, row - N)
        packed_rows = packed_ptr + (batch * S + slot) * D
        mask = is_packed[:, None] & mask_d
        y = round_to(y, packed_ptr.dtype.element_ty)
        tl.store(packed_rows[:, None] + offs_d, y, mask=mask)


def row_pass(
    out: Tensor,
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    indices: Tensor,
    positions: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> Tensor:
    """Launch ``_row_pass_kernel``; branches beyond ``MAX_PASS_BRANCHES`` are added before."""
    B, N, D = hidden_states.shape
    S = indices.shape[1]
    if not branches or S == 0:
        add_branches(out, hidden_states, branches, gates)
        return gather_modulate(out, indices, shift, scale, eps)
    packed = hidden_states.new_empty(B, S, D)
    if packed.numel() == 0:
        return packed
    x = hidden_states
    num_before = max(len(branches) - MAX_PASS_BRANCHES, 0)
    if num_before > 0:
        add_branches(out, x, branches[:num_before], gates[:num_before])
        x = out
    some, some_gates = tuple(branches[num_before:]), tuple(gates[num_before:])
    heuristic = TileSetting.for_whole_rows(D)
    device = device_of(out.device)
    setting = choose("row_pass", device, {"D": D}, heuristic)
    _row_pass_kernel[(triton.cdiv(N + S, setting.rows), B)](
        x, some, some_gates, indices, positions, shift, scale,
        out, packed,
        N, S, D, eps,
        x.stride(0), x.stride(1), *_branch_strides(some, some_gates),
        indices.stride(0), positions.stride(0), shift.stride(0), scale.stride(0),
        out.stride(0), out.stride(1),
        ROWS=setting.rows, BLOCK_D=setting.block_d, num_warps=setting.num_warps,
        **early_start(device),
    )  # fmt: skip
    return packed


def compile_cases(device: Device) -> Iterator[CompileCase]:
    """Every setting; from one branch to the most, all gated, and one without a gate."""
    for dtype in ("bf16", "fp32"):
        for setting in whole_row_settings():
            yield _case(_gather_modulate_kernel, dtype, setting)
        for kernel, settings, most in (
            (_add_branches_kernel, piece_settings(), MAX_BRANCHES),
            (_row_pass_kernel, whole_row_settings(), MAX_PASS_BRANCHES),
        ):
            for setting in settings:
                yield _case(kernel, dtype, setting, num_branches=1, is_gated=False)
                for num_branches in (1, 2, most):
                    yield _case(kernel, dtype, setting, num_branches)
    if device.arch >= 90:
        yield _case(_gather_modulate_kernel, "bf16", whole_row_settings()[0], starts_early=True)
        for kernel, setting in (
            (_add_branches_kernel, piece_settings()[0]),
            (_row_pass_kernel, whole_row_settings()[0]),
        ):
            yield _case(kernel, "bf16", setting, num_branches=2, starts_early=True)


def _case(
    kernel: triton.JITFunction[object],
    dtype: str,
    setting: TileSetting,
    num_branches: int = 0,
    is_gated: bool = True,
    starts_early: bool = False,
) -> CompileCase:
    signature: dict[str, str | tuple[str, ...]] = {}
    constexprs: dict[str, object] = {
        "ROWS": setting.rows,
        "BLOCK_D": setting.block_d,
        "STARTS_EARLY": starts_early,
    }
    for name in kernel.arg_names:
        if name == "gate_ptrs" and not is_gated:
            constexprs[name] = (None,) * num_branches
        elif name in ("branch_ptrs", "gate_ptrs"):
            signature[name] = (f"*{dtype}",) * num_branches
        elif name.startswith("strides_"):
            signature[name] = ("i32",) * num_branches
        elif name in ("indices_ptr", "positions_ptr"):
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        elif name not in constexprs:
            signature[name] = "fp32" if name == "eps" else "i32"
    variant = dtype
    if num_branches > 0:
        variant += f" {num_branches} branches{'' if is_gated else ' ungated'}"
    variant += " early" * starts_early
    return CompileCase(
        kernel=kernel,
        variant=variant,
        setting=setting,
        signature=signature,
        constexprs=constexprs,
        aligned=frozenset(signature) - {"N", "S", "eps"},
        num_warps=setting.num_warps,
    )
