"""The row pass: add gated branches to every row, and modulate the selected rows while at hand.

Every row is read and written once. The selected ones are layer-normalised from registers, so that
the pass costs one packed row each on top of the sum.
"""

from collections.abc import Iterator, Sequence
from functools import partial

import triton
import triton.language as tl
from torch import Tensor

from ..reference import RowNorm
from ._device import await_previous, round_to
from ._launch import CompileCase, Device, choose, device_of, early_start
from ._tiles import TileSetting, piece_settings, whole_row_candidates, whole_row_settings

# branches that one launch adds, alone and in a row pass, which has whole rows in registers; a
# longer run takes several launches
MAX_BRANCHES = 8
MAX_PASS_BRANCHES = 4


@triton.jit
def _number_rows(vector_index_ptr, batch, row, is_token, K, stride_vb):
    """Give the number of each token's vector, of the K of its sample, or the token's own."""
    number = row
    if vector_index_ptr is not None:
        numbers = vector_index_ptr + batch * stride_vb + row
        number = tl.load(numbers, mask=is_token, other=0).to(tl.int64)
        number = tl.minimum(tl.maximum(number, 0), K - 1)
    return number


@triton.jit
def _load_vectors(
    vector_ptr, batch, number, offs_d, mask, mask_d, stride_b, stride_n, PER_TOKEN: tl.constexpr
):
    """The vector of the sample, [BLOCK_D], or of each token, [ROWS, BLOCK_D]; in float32."""
    if PER_TOKEN:
        vectors = vector_ptr + batch * stride_b + number * stride_n
        loaded = tl.load(vectors[:, None] + offs_d, mask=mask, other=0.0)
    else:
        loaded = tl.load(vector_ptr + batch * stride_b + offs_d, mask=mask_d, other=0.0)
    return loaded.to(tl.float32)


@triton.jit
def _sum_branches(
    x_ptr, branch_ptrs, gate_ptrs, norm_weight_ptrs, norm_offsets, norm_eps,
    batch, row, number, D, offs_d, mask, mask_d,
    stride_xb, stride_xn, strides_branch_b, strides_branch_n, strides_gate_b, strides_gate_n,
    PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """x[b, n] + sum_j gates[j] * norms[j](branches[j][b, n]), in float32; a gate of None is 1.

    An eps of None stands for no norm; a norm needs whole rows.
    """
    x_rows = x_ptr + batch * stride_xb + row * stride_xn
    total = tl.load(x_rows[:, None] + offs_d, mask=mask, other=0.0).to(tl.float32)
    for j in tl.static_range(len(branch_ptrs)):
        rows = branch_ptrs[j] + batch * strides_branch_b[j] + row * strides_branch_n[j]
        # it is not read again before the next step: the L2 need not keep it
        branch = tl.load(
            rows[:, None] + offs_d, mask=mask, other=0.0, eviction_policy="evict_first"
        ).to(tl.float32)
        if norm_eps[j] is not None:
            mean_square = tl.sum(branch * branch, axis=1) / D
            branch *= tl.rsqrt(mean_square + norm_eps[j])[:, None]
            if norm_weight_ptrs[j] is not None:
                weight = tl.load(norm_weight_ptrs[j] + offs_d, mask=mask_d, other=0.0)
                branch *= norm_offsets[j] + weight.to(tl.float32)
        if gate_ptrs[j] is not None:
            branch *= _load_vectors(
                gate_ptrs[j], batch, number, offs_d, mask, mask_d,
                strides_gate_b[j], strides_gate_n[j], PER_TOKEN,
            )  # fmt: skip
        total += branch
    return total  # [ROWS, BLOCK_D]


@triton.jit
def _modulate(
    x, shift_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr,
    batch, number, D, eps, norm_offset, offs_d, mask, mask_d,
    stride_shift_b, stride_shift_n, stride_scale_b, stride_scale_n,
    NORM: tl.constexpr, PER_TOKEN: tl.constexpr,
):  # fmt: skip
    """norm(x) * (1 + scale) + shift, in float32; x: [ROWS, BLOCK_D], 0 where masked."""
    y = x
    if NORM == "layer":
        mean = tl.sum(x, axis=1) / D
        y = tl.where(mask_d, x - mean[:, None], 0.0)
    if NORM != "none":
        rstd = tl.rsqrt(tl.sum(y * y, axis=1) / D + eps)
        y = y * rstd[:, None]
    if norm_weight_ptr is not None:
        weight = tl.load(norm_weight_ptr + offs_d, mask=mask_d, other=0.0)
        y *= norm_offset + weight.to(tl.float32)
    if norm_bias_ptr is not None:
        y += tl.load(norm_bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    # one after the other: fewer registers than both at once
    if scale_ptr is not None:
        y *= 1.0 + _load_vectors(
            scale_ptr, batch, number, offs_d, mask, mask_d, stride_scale_b, stride_scale_n,
            PER_TOKEN,
        )  # fmt: skip
    if shift_ptr is not None:
        y += _load_vectors(
            shift_ptr, batch, number, offs_d, mask, mask_d, stride_shift_b, stride_shift_n,
            PER_TOKEN,
        )  # fmt: skip
    return y


@triton.jit(do_not_specialize=["N", "K"])
def _add_branches_kernel(
    x_ptr, branch_ptrs, gate_ptrs, norm_weight_ptrs, norm_offsets, norm_eps, vector_index_ptr,
    out_ptr,
    N, D, K,
    stride_xb, stride_xn, strides_branch_b, strides_branch_n, strides_gate_b, strides_gate_n,
    stride_vb, stride_ob, stride_on,
    PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STARTS_EARLY: tl.constexpr,
):  # fmt: skip
    """out[b, n] = x[b, n] + sum_j gates[j] * norms[j](branches[j][b, n])."""
    if STARTS_EARLY:
        await_previous()
    # int64: B * N * D passes 2**31 at video sizes
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(2).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = (row < N)[:, None] & mask_d
    number = row
    if PER_TOKEN:
        number = _number_rows(vector_index_ptr, batch, row, row < N, K, stride_vb)

    total = _sum_branches(
        x_ptr, branch_ptrs, gate_ptrs, norm_weight_ptrs, norm_offsets, norm_eps,
        batch, row, number, D, offs_d, mask, mask_d,
        stride_xb, stride_xn, strides_branch_b, strides_branch_n, strides_gate_b, strides_gate_n,
        PER_TOKEN,
    )  # fmt: skip
    out_rows = out_ptr + batch * stride_ob + row * stride_on
    tl.store(out_rows[:, None] + offs_d, round_to(total, out_ptr.dtype.element_ty), mask=mask)


def add_branches(
    out: Tensor,
    hidden_states: Tensor,
    branches: Sequence[Tensor],
    gates: Sequence[Tensor | None],
    branch_norms: Sequence[RowNorm | None] = (),
    vector_index: Tensor | None = None,
) -> None:
    """Launch ``_add_branches_kernel``, once for every ``MAX_BRANCHES`` branches.

    Where one is normalised, a program has whole rows, as in a row pass, and fewer branches.
    """
    B, N, D = hidden_states.shape
    if not branches:
        out.copy_(hidden_states)
    if out.numel() == 0:
        return
    device = device_of(out.device)
    norms = branch_norms or (None,) * len(branches)
    if any(norms):
        candidates = partial(whole_row_candidates, D)
        setting = choose("row_pass", device, {"D": D}, TileSetting.for_whole_rows(D), candidates)
        most = MAX_PASS_BRANCHES
    else:
        setting = choose(
            "add_branches", device, {"D": D}, TileSetting.for_pieces(D), piece_settings
        )
        most = MAX_BRANCHES
    grid = (triton.cdiv(N, setting.rows), triton.cdiv(D, setting.block_d), B)
    x = hidden_states
    for start in range(0, len(branches), most):
        some = tuple(branches[start : start + most])
        some_gates = tuple(gates[start : start + most])
        _add_branches_kernel[grid](
            x, some, some_gates, *_describe_norms(norms[start : start + most]), vector_index, out,
            N, D, _count_vectors(vector_index, *some_gates),
            x.stride(0), x.stride(1), *_branch_strides(some, some_gates),
            0 if vector_index is None else vector_index.stride(0), out.stride(0), out.stride(1),
            PER_TOKEN=_are_per_token(*some_gates),
            ROWS=setting.rows, BLOCK_D=setting.block_d, num_warps=setting.num_warps,
            **early_start(device),
        )  # fmt: skip
        x = out


def _branch_strides(
    branches: Sequence[Tensor], gates: Sequence[Tensor | None]
) -> tuple[tuple[int, ...], ...]:
    """The strides along B and N of the branches, and of the gates."""
    of_gates = [_vector_strides(gate) for gate in gates]
    return (
        tuple(branch.stride(0) for branch in branches),
        tuple(branch.stride(1) for branch in branches),
        tuple(along_b for along_b, _ in of_gates),
        tuple(along_n for _, along_n in of_gates),
    )


def _vector_strides(vectors: Tensor | None) -> tuple[int, int]:
    """The strides along B, and along the tokens or the numbers: 0 of one vector a sample."""
    if vectors is None:
        return 0, 0
    return vectors.stride(0), vectors.stride(1) if vectors.dim() == 3 else 0


def _are_per_token(*vectors: Tensor | None) -> bool:
    """Tell whether any token has vectors of its own.

    Those of a sample have a stride of 0 among tokens.
    """
    return any(one is not None and one.dim() == 3 for one in vectors)


def _count_vectors(vector_index: Tensor | None, *vectors: Tensor | None) -> int:
    """Count the numbered vectors, which is the same for all."""
    if vector_index is None:
        return 0
    return next((one.shape[1] for one in vectors if one is not None and one.dim() == 3), 1)


def _describe_norms(
    norms: Sequence[RowNorm | None],
) -> tuple[tuple[Tensor | None, ...], tuple[float | None, ...], tuple[float | None, ...]]:
    """Weights, offsets and eps of the branches' norms."""
    return (
        tuple(None if norm is None else norm.weight for norm in norms),
        tuple(None if norm is None else float(norm.weight_offset) for norm in norms),
        tuple(None if norm is None else float(norm.eps) for norm in norms),
    )


@triton.jit(
    do_not_specialize=["N", "S", "K", "stride_ib"],
    do_not_specialize_on_alignment=["indices_ptr"],
)
def _gather_modulate_kernel(
    x_ptr, indices_ptr, shift_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr, vector_index_ptr,
    out_ptr,
    N, S, D, K, eps, norm_offset,
    stride_xb, stride_xn, stride_ib, stride_shift_b, stride_shift_n, stride_scale_b,
    stride_scale_n, stride_vb,
    NORM: tl.constexpr, PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STARTS_EARLY: tl.constexpr,
):  # fmt: skip
    """out[b, s] = norm(x[b, indices[b, s]]) * (1 + scale) + shift; an empty slot: 0."""
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

    number = token
    if PER_TOKEN:
        is_token = (token >= 0) & (token < N)
        number = _number_rows(vector_index_ptr, batch, token, is_token, K, stride_vb)
    y = _modulate(
        x, shift_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr,
        batch, number, D, eps, norm_offset, offs_d, is_live & mask_d, mask_d,
        stride_shift_b, stride_shift_n, stride_scale_b, stride_scale_n,
        NORM, PER_TOKEN,
    )  # fmt: skip
    # an empty slot must stay finite: the GEMM behind it reads every row
    y = tl.where(is_live, y, 0.0)
    out_rows = out_ptr + (batch * S + slot) * D
    mask = (slot < S)[:, None] & mask_d
    tl.store(out_rows[:, None] + offs_d, round_to(y, out_ptr.dtype.element_ty), mask=mask)


def gather_modulate(
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    norm: RowNorm,
    vector_index: Tensor | None = None,
) -> Tensor:
    """Launch ``_gather_modulate_kernel``."""
    B, N, D = hidden_states.shape
    S = indices.shape[1]
    out = hidden_states.new_empty(B, S, D)
    if out.numel() == 0:
        return out
    heuristic = TileSetting.for_whole_rows(D)
    device = device_of(out.device)
    candidates = partial(whole_row_candidates, D)
    setting = choose("gather_modulate", device, {"D": D}, heuristic, candidates)
    _gather_modulate_kernel[(triton.cdiv(S, setting.rows), B)](
        hidden_states, indices, shift, scale, norm.weight, norm.bias, vector_index, out,
        N, S, D, _count_vectors(vector_index, shift, scale), norm.eps, norm.weight_offset,
        hidden_states.stride(0), hidden_states.stride(1), indices.stride(0),
        *_vector_strides(shift), *_vector_strides(scale),
        0 if vector_index is None else vector_index.stride(0),
        NORM=norm.kind, PER_TOKEN=_are_per_token(shift, scale),
        ROWS=setting.rows, BLOCK_D=setting.block_d, num_warps=setting.num_warps,
        **early_start(device),
    )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=["N", "S", "K", "stride_ib", "stride_pb"],
    do_not_specialize_on_alignment=["indices_ptr", "positions_ptr"],
)
def _row_pass_kernel(
    x_ptr, branch_ptrs, gate_ptrs, norm_weight_ptrs, norm_offsets, norm_eps,
    indices_ptr, positions_ptr, shift_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr,
    vector_index_ptr, out_ptr, packed_ptr,
    N, S, D, K, eps, norm_offset,
    stride_xb, stride_xn, strides_branch_b, strides_branch_n, strides_gate_b, strides_gate_n,
    stride_ib, stride_pb, stride_shift_b, stride_shift_n, stride_scale_b, stride_scale_n,
    stride_vb, stride_ob, stride_on,
    NORM: tl.constexpr, PER_TOKEN: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STARTS_EARLY: tl.constexpr,
):  # fmt: skip
    """out[b, n] = x[b, n] + sum_j gates[j] * norms[j](branches[j][b, n]), and of that rounded row
    packed[b, positions[b, n]] = norm(out[b, n]) * (1 + scale) + shift; empty slots: 0.
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
    # first of all: everything after it waits for the rows anyway
    position = tl.load(positions_ptr + batch * stride_pb + row, mask=is_token, other=-1)
    index = tl.load(indices_ptr + batch * stride_ib + row - N, mask=is_slot, other=0)

    mask = is_token[:, None] & mask_d
    number = row
    if PER_TOKEN:
        number = _number_rows(vector_index_ptr, batch, row, is_token, K, stride_vb)
    total = _sum_branches(
        x_ptr, branch_ptrs, gate_ptrs, norm_weight_ptrs, norm_offsets, norm_eps,
        batch, row, number, D, offs_d, mask, mask_d,
        stride_xb, stride_xn, strides_branch_b, strides_branch_n, strides_gate_b, strides_gate_n,
        PER_TOKEN,
    )  # fmt: skip
    out = round_to(total, out_ptr.dtype.element_ty)
    out_rows = out_ptr + batch * stride_ob + row * stride_on
    tl.store(out_rows[:, None] + offs_d, out, mask=mask)

    is_fresh = (position >= 0) & (position < S)
    is_packed = is_fresh | (is_slot & ((index < 0) | (index >= N)))
    # most programs hold no selected token
    if tl.max(is_packed.to(tl.int32), axis=0) > 0:
        y = _modulate(
            out.to(tl.float32), shift_ptr, scale_ptr, norm_weight_ptr, norm_bias_ptr,
            batch, number, D, eps, norm_offset, offs_d, mask, mask_d,
            stride_shift_b, stride_shift_n, stride_scale_b, stride_scale_n,
            NORM, PER_TOKEN,
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
    shift: Tensor | None,
    scale: Tensor | None,
    norm: RowNorm,
    branch_norms: Sequence[RowNorm | None] = (),
    vector_index: Tensor | None = None,
) -> Tensor:
    """Launch ``_row_pass_kernel``; branches beyond ``MAX_PASS_BRANCHES`` are added before."""
    B, N, D = hidden_states.shape
    S = indices.shape[1]
    if not branches or S == 0:
        add_branches(out, hidden_states, branches, gates, branch_norms, vector_index)
        return gather_modulate(out, indices, shift, scale, norm, vector_index)
    packed = hidden_states.new_empty(B, S, D)
    if packed.numel() == 0:
        return packed
    x = hidden_states
    norms = branch_norms or (None,) * len(branches)
    num_before = max(len(branches) - MAX_PASS_BRANCHES, 0)
    if num_before > 0:
        add_branches(
            out, x, branches[:num_before], gates[:num_before], norms[:num_before], vector_index
        )
        x = out
    some, some_gates = tuple(branches[num_before:]), tuple(gates[num_before:])
    heuristic = TileSetting.for_whole_rows(D)
    device = device_of(out.device)
    candidates = partial(whole_row_candidates, D)
    setting = choose("row_pass", device, {"D": D}, heuristic, candidates)
    _row_pass_kernel[(triton.cdiv(N + S, setting.rows), B)](
        x, some, some_gates, *_describe_norms(norms[num_before:]),
        indices, positions, shift, scale, norm.weight, norm.bias, vector_index, out, packed,
        N, S, D, _count_vectors(vector_index, *some_gates, shift, scale),
        norm.eps, norm.weight_offset,
        x.stride(0), x.stride(1), *_branch_strides(some, some_gates),
        indices.stride(0), positions.stride(0), *_vector_strides(shift), *_vector_strides(scale),
        0 if vector_index is None else vector_index.stride(0), out.stride(0), out.stride(1),
        NORM=norm.kind, PER_TOKEN=_are_per_token(*some_gates, shift, scale),
        ROWS=setting.rows, BLOCK_D=setting.block_d, num_warps=setting.num_warps,
        maxnreg=_max_registers(setting) if any(norms) else None,
        **early_start(device),
    )  # fmt: skip
    return packed


def _max_registers(setting: TileSetting) -> int:
    """All that the warps may have: left alone, the assembler spills for a program more."""
    return min(2048 // setting.num_warps, 255)


def compile_cases(device: Device) -> Iterator[CompileCase]:
    """Every setting; from one branch to the most, all gated, and one without a gate.

    With everything that a norm and a token may have of their own: two branches, in bfloat16.
    """
    for setting in whole_row_settings():
        for kernel in (_gather_modulate_kernel, _add_branches_kernel, _row_pass_kernel):
            num_branches = 0 if kernel is _gather_modulate_kernel else 2
            yield _case(kernel, "bf16", setting, num_branches, is_rich=True)
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


# indices and positions of a layer begin where those of the layers before it end
_UNALIGNED = {"N", "S", "K", "eps", "norm_offset", "norm_offsets", "norm_eps"}
_UNALIGNED |= {"indices_ptr", "positions_ptr", "stride_ib", "stride_pb"}


def _case(
    kernel: triton.JITFunction[object],
    dtype: str,
    setting: TileSetting,
    num_branches: int = 0,
    is_gated: bool = True,
    starts_early: bool = False,
    is_rich: bool = False,
) -> CompileCase:
    signature: dict[str, str | tuple[str, ...]] = {}
    constexprs: dict[str, object] = {
        "NORM": "rms" if is_rich else "layer",
        "PER_TOKEN": is_rich,
        "ROWS": setting.rows,
        "BLOCK_D": setting.block_d,
        "STARTS_EARLY": starts_early,
    }
    constexprs = {name: value for name, value in constexprs.items() if name in kernel.arg_names}
    for name in kernel.arg_names:
        if name == "gate_ptrs" and not is_gated:
            constexprs[name] = (None,) * num_branches
        elif name in ("norm_weight_ptrs", "norm_offsets", "norm_eps"):
            if is_rich:
                one = f"*{dtype}" if name == "norm_weight_ptrs" else "fp32"
                signature[name] = (one,) * num_branches
            else:
                constexprs[name] = (None,) * num_branches
        elif name in ("norm_weight_ptr", "norm_bias_ptr", "vector_index_ptr") and not is_rich:
            constexprs[name] = None
        elif name in ("branch_ptrs", "gate_ptrs"):
            signature[name] = (f"*{dtype}",) * num_branches
        elif name.startswith("strides_"):
            signature[name] = ("i32",) * num_branches
        elif name in ("indices_ptr", "positions_ptr", "vector_index_ptr"):
            signature[name] = "*i32"
        elif name.endswith("_ptr"):
            signature[name] = f"*{dtype}"
        elif name not in constexprs:
            signature[name] = "fp32" if name in ("eps", "norm_offset") else "i32"
    variant = dtype + " norms, vectors by number" * is_rich
    if num_branches > 0:
        variant += f" {num_branches} branches{'' if is_gated else ' ungated'}"
    variant += " early" * starts_early
    return CompileCase(
        kernel=kernel,
        variant=variant,
        setting=setting,
        signature=signature,
        constexprs=constexprs,
        aligned=frozenset(signature) - _UNALIGNED,
        num_warps=setting.num_warps,
        max_registers=_max_registers(setting) if is_rich and kernel is _row_pass_kernel else None,
    )
