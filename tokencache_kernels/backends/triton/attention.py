"""Attention of packed queries over all keys in one pass, with log-sum-exp and entropy for scores.

The scores of a block of queries stay in registers; the log-sum-exp, and the entropy of each row of
the map where it is asked for, come out of the same running sums as the softmax. The product with
the values takes the probabilities in the dtype of the values, as other fused attentions do.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import ceil, gcd, log
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import INTERPRETED, round_to
from ._heads import (
    LN_2,
    LOG2_E,
    count_keys,
    expect_head_dim,
    load_tile,
    rows_from,
    score_rows,
    split_head_dim,
    strides_in_units,
)
from ._launch import INTERPRETER, CompileCase, Device, TuneCase, choose, device_of

# beyond it the running sums of a block of queries no longer fit the registers
MAX_HEAD_DIM = 128


@dataclass(frozen=True)
class AttentionSetting:
    """``block_m`` queries a program, over ``block_n`` keys a step.

    The last, partial block of keys is a branch with ``branches``, else a second loop.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    branches: bool = False

    def constants(self) -> dict[str, int]:
        """The constexpr blocks of the kernel."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BRANCHES": self.branches}


def attention_settings(
    device: Device, itemsize: int, head_dim: int, with_entropy: bool
) -> list[AttentionSetting]:
    """List the settings worth trying: the heuristic's choice first, its choice for few queries
    last.
    """
    if itemsize == 4:
        return [AttentionSetting(32, 16, 4, 1)]
    if device.arch not in (90, 100) and head_dim > 80:
        # the older tensor cores take their operands from registers
        settings = [AttentionSetting(128, 32, 8, 3), AttentionSetting(64, 32, 8, 2)]
        # with the entropy's sums beside the output, the smaller tile spills on sm_86 and sm_89
        return settings[:1] if with_entropy else settings
    # elsewhere the branch would spill
    branches = device.arch == 90
    settings = [
        AttentionSetting(128, 64, 8, 3, branches),
        AttentionSetting(64, 32, 4, 3, branches),
    ]
    if device.arch == 90 and not with_entropy:
        settings.insert(1, AttentionSetting(128, 128, 8, 2, branches))
    return settings


def head_mean_setting(itemsize: int, head_dim: int) -> AttentionSetting:
    """The one setting of the kernel that takes all heads: a larger tile spills somewhere."""
    if itemsize == 4:
        is_split = split_head_dim(head_dim)[1] > 0
        return AttentionSetting(16, 16, 8, 1) if is_split else AttentionSetting(32, 16, 4, 1)
    return AttentionSetting(64, 32, 8, 2)


@triton.jit
def _attend_block(
    q, q_rest, out, out_rest, peak, total, moment, key_ptr, value_ptr, first_key,
    num_keys, scale, stride_kn, stride_vn,
    WITH_MOMENT: tl.constexpr, IS_WHOLE: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr,
    REST: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add one block of keys to the running sums; scores are in bits, to the base 2."""
    is_key = tl.arange(0, BLOCK_N) < num_keys - first_key
    is_row = None if IS_WHOLE else is_key
    key_rows = rows_from(key_ptr, first_key, None, stride_kn, BLOCK_N)
    value_rows = rows_from(value_ptr, first_key, None, stride_vn, BLOCK_N)
    scores = score_rows(q, q_rest, key_rows, E, WIDTH, REST, is_row) * scale
    if not IS_WHOLE:
        scores = tl.where(is_key[None, :], scores, float("-inf"))

    new_peak = tl.maximum(peak, tl.max(scores, axis=1))
    shrink = tl.exp2(peak - new_peak)
    scores -= new_peak[:, None]
    p = tl.exp2(scores)
    if WITH_MOMENT:
        # sum p * (score - peak): with scores as they are, entropies would be differences of large
        # numbers. A key that is not there has no probability, but an infinite score
        finite = scores if IS_WHOLE else tl.where(is_key[None, :], scores, 0.0)
        sunk = tl.where(total > 0.0, peak - new_peak, 0.0)
        moment = (moment + total * sunk) * shrink + tl.sum(p * finite, axis=1)
    total = total * shrink + tl.sum(p, axis=1)

    p = round_to(p, value_ptr.dtype.element_ty)
    if INTERPRETED:
        p = p.to(tl.float32)
    values = load_tile(value_rows, 0, WIDTH, E, is_row)
    out = tl.dot(p, values, out * shrink[:, None], input_precision="ieee")
    if REST > 0:
        values = load_tile(value_rows, WIDTH, REST, E, is_row)
        out_rest = tl.dot(p, values, out_rest * shrink[:, None], input_precision="ieee")
    return out, out_rest, new_peak, total, moment


@triton.jit
def _attend_head(
    query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, entropy_ptrs, batch, head, queries,
    S, H, num_keys, scale,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    UNIT: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BRANCHES: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head over all its keys; entropy_ptrs may be None."""
    is_query = queries < S
    # a query that does not exist reads the last one: no mask
    query = tl.minimum(queries, S - 1).to(tl.int64)
    query_rows = query_ptr + (batch * stride_qb + head * stride_qh + query * stride_qs) * UNIT
    key_ptr += (batch * stride_kb + head * stride_kh) * UNIT
    value_ptr += (batch * stride_vb + head * stride_vh) * UNIT
    stride_kn *= UNIT
    stride_vn *= UNIT
    WITH_MOMENT: tl.constexpr = entropy_ptrs is not None
    q = load_tile(query_rows, 0, WIDTH, E)
    q_rest = load_tile(query_rows, WIDTH, REST, E) if REST > 0 else None
    out = tl.zeros((BLOCK_M, WIDTH), dtype=tl.float32)
    # unused statistics are carried along unchanged, which the compiler drops
    out_rest = tl.zeros((BLOCK_M, REST if REST > 0 else 1), dtype=tl.float32)
    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_M,), dtype=tl.float32)

    num_whole = num_keys // BLOCK_N * BLOCK_N
    for first_key in range(0, num_whole, BLOCK_N):
        out, out_rest, peak, total, moment = _attend_block(
            q, q_rest, out, out_rest, peak, total, moment, key_ptr, value_ptr, first_key,
            num_keys, scale, stride_kn, stride_vn,
            WITH_MOMENT, True, E, WIDTH, REST, BLOCK_N,
        )  # fmt: skip
    if BRANCHES:
        # a second loop over the same accumulators makes the assembler serialise every wgmma
        if num_whole < num_keys:
            out, out_rest, peak, total, moment = _attend_block(
                q, q_rest, out, out_rest, peak, total, moment, key_ptr, value_ptr, num_whole,
                num_keys, scale, stride_kn, stride_vn,
                WITH_MOMENT, False, E, WIDTH, REST, BLOCK_N,
            )  # fmt: skip
    else:
        # at most once, but a loop: its loads are asynchronous, too, and need fewer registers
        for first_key in range(num_whole, num_keys, BLOCK_N):
            out, out_rest, peak, total, moment = _attend_block(
                q, q_rest, out, out_rest, peak, total, moment, key_ptr, value_ptr, first_key,
                num_keys, scale, stride_kn, stride_vn,
                WITH_MOMENT, False, E, WIDTH, REST, BLOCK_N,
            )  # fmt: skip

    # without any key: out 0, log-sum-exp -inf, entropy 0
    total = tl.where(num_keys > 0, total, 1.0)
    lse_ptrs = lse_ptr + (batch * H + head) * S + queries
    tl.store(lse_ptrs, (peak + tl.log2(total)) * LN_2, mask=is_query)
    if WITH_MOMENT:
        entropy = (tl.log2(total) - moment / total) * LN_2
        tl.store(entropy_ptrs, entropy, mask=is_query)
    out_rows = out_ptr + ((batch * S + query) * H + head) * E
    _store_tile(out / total[:, None], out_rows, is_query, 0, E)
    if REST > 0:
        _store_tile(out_rest / total[:, None], out_rows, is_query, WIDTH, E)


@triton.jit
def _store_tile(x, rows, is_row, FIRST: tl.constexpr, E: tl.constexpr):
    """rows[m][FIRST + c] = x[m, c], for the rows and channels that there are."""
    cols = FIRST + tl.arange(0, x.shape[1])
    mask = is_row[:, None] & (cols < E)[None, :]
    tl.store(rows[:, None] + cols[None, :], round_to(x, rows.dtype.element_ty), mask=mask)


# strides in units need not be multiples of 16, and that of packed queries depends on S
@triton.jit(do_not_specialize=["N", "S", "stride_qb"])
def _attention_kernel(
    query_ptr, key_ptr, value_ptr, lengths_ptr, out_ptr, lse_ptr, entropy_ptr,
    N, S, H,
    scale,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    UNIT: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BRANCHES: tl.constexpr,
):  # fmt: skip
    """out[b, s, h] = softmax(scores) @ value[b, :, h]; scores = query[b, s, h] @ key[b, :, h].T.

    lse = log sum_n exp(scores[n]); entropy = lse - sum_n p[n] * scores[n]. The scale that comes
    here makes of a score the power of 2 that it means.
    """
    num_blocks = tl.cdiv(S, BLOCK_M)
    # the programs of one head follow one another: they share its keys in the L2
    first_query = tl.program_id(0) % num_blocks * BLOCK_M
    pair = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch = pair // H
    queries = first_query + tl.arange(0, BLOCK_M)
    entropy_ptrs = None if entropy_ptr is None else entropy_ptr + pair * S + queries
    _attend_head(
        query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, entropy_ptrs, batch, pair % H, queries,
        S, H, count_keys(lengths_ptr, batch, N), scale,
        stride_qb, stride_qs, stride_qh, stride_kb, stride_kn, stride_kh,
        stride_vb, stride_vn, stride_vh,
        UNIT, E, WIDTH, REST, BLOCK_M, BLOCK_N, BRANCHES,
    )  # fmt: skip


# strides in units need not be multiples of 16, and that of packed queries depends on S
@triton.jit(do_not_specialize=["N", "S", "stride_qb"])
def _attention_head_mean_kernel(
    query_ptr, key_ptr, value_ptr, lengths_ptr, out_ptr, lse_ptr, entropy_ptr,
    N, S, H,
    scale,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_vb, stride_vn, stride_vh,
    UNIT: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BRANCHES: tl.constexpr,
):  # fmt: skip
    """As ``_attention_kernel``, and entropy[b, s] = -sum_n p log p with p[n] = mean_h p[h, n].

    A program takes all heads: first their outputs and log-sum-exps, then the map, block by block.
    """
    num_blocks = tl.cdiv(S, BLOCK_M)
    first_query = tl.program_id(0) % num_blocks * BLOCK_M
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    queries = first_query + tl.arange(0, BLOCK_M)
    num_keys = count_keys(lengths_ptr, batch, N)
    for head in range(H):
        _attend_head(
            query_ptr, key_ptr, value_ptr, out_ptr, lse_ptr, None, batch, head, queries,
            S, H, num_keys, scale,
            stride_qb, stride_qs, stride_qh, stride_kb, stride_kn, stride_kh,
            stride_vb, stride_vn, stride_vh,
            UNIT, E, WIDTH, REST, BLOCK_M, BLOCK_N, BRANCHES,
        )  # fmt: skip
    # the log-sum-exps that one thread has written, another reads
    tl.debug_barrier()

    is_query = queries < S
    query = tl.minimum(queries, S - 1)
    query_rows = query_ptr + batch * stride_qb * UNIT + query.to(tl.int64) * (stride_qs * UNIT)
    entropy = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first_key in range(0, num_keys, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)
        is_key = keys < num_keys
        key_rows = key_ptr + batch * stride_kb * UNIT + keys.to(tl.int64) * (stride_kn * UNIT)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for head in range(H):
            rows = query_rows + head * stride_qh * UNIT
            q = load_tile(rows, 0, WIDTH, E)
            q_rest = load_tile(rows, WIDTH, REST, E) if REST > 0 else None
            head_rows = key_rows + head * stride_kh * UNIT
            scores = score_rows(q, q_rest, head_rows, E, WIDTH, REST, is_key)
            lse = tl.load(lse_ptr + (batch * H + head) * S + query)
            total += tl.exp2(scores * scale - (lse * LOG2_E)[:, None])
        p = tl.where(is_key[None, :], total / H, 0.0)
        entropy -= tl.sum(p * tl.log2(tl.where(p > 0.0, p, 1.0)), axis=1) * LN_2
    tl.store(entropy_ptr + batch * S + queries, entropy, mask=is_query)


def attention(
    query: Tensor, key: Tensor, value: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> tuple[Tensor, Tensor]:
    """Launch ``_attention_kernel``."""
    setting = _choose("attention", query, key)
    return _launch(_attention_kernel, setting, query, key, value, key_lengths, softmax_scale, None)


def attention_with_entropy(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    softmax_scale: float,
    head_mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch ``_attention_head_mean_kernel``, or ``_attention_kernel`` for each head's entropy."""
    B, S, H, E = query.shape
    if head_mean:
        kernel, setting = _attention_head_mean_kernel, head_mean_setting(query.itemsize, E)
    else:
        kernel, setting = _attention_kernel, _choose("attention_with_entropy", query, key)
    entropy = query.new_empty((B, S) if head_mean else (B, H, S), dtype=torch.float32)
    out, lse = _launch(kernel, setting, query, key, value, key_lengths, softmax_scale, entropy)
    return out, lse, entropy


def _choose(name: str, query: Tensor, key: Tensor) -> AttentionSetting:
    """The launch setting for these sizes."""
    B, S, H, E = query.shape
    device = device_of(query.device)
    settings = attention_settings(device, query.itemsize, E, name == "attention_with_entropy")
    is_full = ceil(S / settings[0].block_m) * B * H >= device.num_sms
    problem = {"S": S, "N": key.shape[1], "heads": B * H, "E": E, "bits": 8 * query.itemsize}
    heuristic = settings[0] if is_full else settings[-1]
    return choose(name, device, problem, heuristic, lambda: settings)


def _launch(
    kernel: Any,
    setting: AttentionSetting,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_lengths: Tensor | None,
    softmax_scale: float,
    entropy: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Launch a kernel that fills out, the log-sum-exp and ``entropy``."""
    B, S, H, E = query.shape
    op = "attention" if entropy is None else "attention_with_entropy"
    expect_head_dim(op, E, MAX_HEAD_DIM)
    out = query.new_empty(B, S, H, E)
    lse = query.new_empty(B, H, S, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    unit, strides = strides_in_units(query, key, value)
    width, rest = split_head_dim(E)
    heads_apart = 1 if kernel is _attention_head_mean_kernel else H
    kernel[(ceil(S / setting.block_m) * B * heads_apart,)](
        query, key, value, key_lengths, out, lse, entropy,
        key.shape[1], S, H,
        softmax_scale / log(2),
        *strides,
        UNIT=unit, E=E, WIDTH=width, REST=rest,
        **setting.constants(), num_warps=setting.num_warps, num_stages=setting.num_stages,
    )  # fmt: skip
    return out, lse


def compile_cases(device: Device) -> Iterator[CompileCase]:
    """Every setting at the usual head dims; entropies and lengths together, as the heaviest."""
    for head_dim in (64, 72, 96, 128):
        for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
            if dtype == "fp16" and device.arch != 90:
                continue
            for with_entropy in (False, True):
                if dtype == "bf16" or (with_entropy and head_dim in (72, 128)):
                    for setting in attention_settings(device, itemsize, head_dim, with_entropy):
                        yield _compile_case(
                            _attention_kernel, head_dim, dtype, with_entropy, setting
                        )
            if dtype != "fp16":
                setting = head_mean_setting(itemsize, head_dim)
                yield _compile_case(_attention_head_mean_kernel, head_dim, dtype, True, setting)


def _compile_case(
    kernel: Any, head_dim: int, dtype: str, with_entropy: bool, setting: AttentionSetting
) -> CompileCase:
    pointers = dict.fromkeys(("query_ptr", "key_ptr", "value_ptr", "out_ptr"), f"*{dtype}")
    pointers |= {"lse_ptr": "*fp32"}
    optional = {"lengths_ptr": "*i32", "entropy_ptr": "*fp32"}
    strides = [name for name in kernel.arg_names if name.startswith("stride_")]
    width, rest = split_head_dim(head_dim)
    return CompileCase(
        kernel=kernel,
        variant=f"E={head_dim} {dtype}" + " entropy lengths" * with_entropy,
        setting=setting,
        signature={
            **pointers,
            **(optional if with_entropy else {}),
            **dict.fromkeys(("N", "S", "H", *strides), "i32"),
            "scale": "fp32",
        },
        constexprs={
            **({} if with_entropy else dict.fromkeys(optional)),
            "UNIT": gcd(16, head_dim),
            "E": head_dim,
            "WIDTH": width,
            "REST": rest,
        }
        | setting.constants(),
        # the strides, in their units, may be anything
        aligned=frozenset((*pointers, *optional)) if with_entropy else frozenset(pointers),
        num_warps=setting.num_warps,
        num_stages=setting.num_stages,
        is_gemm=dtype != "fp32",
        copy_bytes=4 if rest else 16,
    )


def tune_cases(device: Device) -> Iterator[TuneCase]:
    """DiT-XL and FLUX, all queries and few."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16
    if device == INTERPRETER:
        problems = [(1, 4, 8, 1, 16)]
    else:
        problems = [(8, 256, 256, 16, 72), (1, 4608, 4608, 24, 128), (1, 614, 4608, 24, 128)]
    for B, S, N, H, E in problems:
        query, key, value = (
            torch.randn(B, length, H, E, dtype=dtype, device=where) for length in (S, N, N)
        )
        for function, options in ((attention, ()), (attention_with_entropy, (False,))):
            name = function.__name__
            yield TuneCase(
                name,
                f"B={B} S={S} N={N} H={H} E={E} bf16",
                attention_settings(device, dtype.itemsize, E, name != "attention"),
                partial(function, query, key, value, None, E**-0.5, *options),
            )
