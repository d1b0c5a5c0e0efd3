"""Scores of tokens without an attention map in memory.

A map is computed block by block where it is summed: the log-sum-exp of each query's scores, which
an attention forward returns, is all that its softmax needs. Every sum is one program's, in a fixed
order: no atomics, the same bits in every run. Norms and changes are one pass over the rows.
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
from ._tiles import TileSetting, whole_row_settings

# rows that reach beyond are multiplied by a power of two before they are squared
_SHRINK = tl.constexpr(2.0**-80)
_LARGE, _SMALL = tl.constexpr(2.0**50), tl.constexpr(2.0**-20)


@dataclass(frozen=True)
class MapSetting:
    """``block_m`` rows of the map a program keeps, ``block_n`` rows of the other side a step."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def constants(self) -> dict[str, int]:
        """The constexpr blocks of the kernel."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n}


def map_settings(itemsize: int, head_dim: int) -> list[MapSetting]:
    """List the settings of a map that is summed over one side, largest block first."""
    if itemsize == 4 or head_dim % 8:
        # float32 is multiplied on the ordinary cores, and odd heads are copied element by element:
        # both need the registers
        return [MapSetting(32, 32, 4, 2)]
    if head_dim > 128:
        return [MapSetting(64, 32, 4, 2)]
    return [MapSetting(128, 64, 8, 3), MapSetting(64, 64, 4, 3)]


def entropy_setting(itemsize: int, head_dim: int) -> MapSetting:
    """For the head-averaged map: where it can be, a block of keys that takes a whole prompt."""
    if head_dim % 8:
        return MapSetting(16, 16, 4, 1)
    if itemsize == 4:
        return MapSetting(32, 16, 4, 2)
    return MapSetting(64, 128, 8, 2) if head_dim <= 128 else MapSetting(64, 32, 4, 2)


@triton.jit(do_not_specialize=["N", "S", "stride_qb"])
def _log_sum_exp_kernel(
    query_ptr, key_ptr, lengths_ptr, lse_ptr,
    N, S, H, scale,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kn, stride_kh,
    UNIT: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """lse[b, h, s] = log sum_n exp(scores[n]), scores of query[b, s, h], n < lengths[b].

    The scale that comes here makes of a score the power of 2 that it means, as in all maps here.
    """
    num_blocks = tl.cdiv(S, BLOCK_M)
    first_query = tl.program_id(0) % num_blocks * BLOCK_M
    pair = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch = pair // H
    head = pair % H
    num_keys = count_keys(lengths_ptr, batch, N)
    query_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    key_ptr += (batch * stride_kb + head * stride_kh) * UNIT
    query_rows = rows_from(query_ptr, first_query, S, stride_qs * UNIT, BLOCK_M)
    q = load_tile(query_rows, 0, WIDTH, E)
    q_rest = load_tile(query_rows, WIDTH, REST, E) if REST > 0 else None

    peak = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first_key in range(0, num_keys, BLOCK_N):
        key_rows = rows_from(key_ptr, first_key, num_keys, stride_kn * UNIT, BLOCK_N)
        scores = score_rows(q, q_rest, key_rows, E, WIDTH, REST) * scale
        is_key = tl.arange(0, BLOCK_N) < num_keys - first_key
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        total *= tl.exp2(peak - new_peak)
        total += tl.sum(tl.exp2(scores - new_peak[:, None]), axis=1)
        peak = new_peak
    # without any key: -inf
    lse = (peak + tl.log2(tl.where(num_keys > 0, total, 1.0))) * LN_2
    queries = first_query + tl.arange(0, BLOCK_M)
    tl.store(lse_ptr + pair * S + queries, lse, mask=queries < S)


def _log_sum_exp(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> Tensor:
    """Launch ``_log_sum_exp_kernel``: (B, H, S)."""
    B, S, H, E = query.shape
    lse = query.new_empty(B, H, S, dtype=torch.float32)
    setting = _choose("log_sum_exp", map_settings(query.itemsize, E), query, S, B * H)
    _log_sum_exp_kernel[(ceil(S / setting.block_m) * B * H,)](
        query, key, key_lengths, lse,
        key.shape[1], S, H, softmax_scale / log(2),
        **_describe_heads(query, key),
        **setting.constants(), num_warps=setting.num_warps, num_stages=setting.num_stages,
    )  # fmt: skip
    return lse


@triton.jit(do_not_specialize=["N", "S", "stride_qb", "stride_lb", "stride_lh"])
def _attention_received_kernel(
    query_ptr, key_ptr, lse_ptr, out_ptr,
    N, S, H, scale,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kn, stride_kh,
    stride_lb, stride_lh, stride_ls,
    UNIT: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[b, h, n] = mean_s exp(score[s] - lse[b, h, s]), score[s] of query[b, s, h] and key n."""
    num_blocks = tl.cdiv(N, BLOCK_M)
    # the programs of one head follow one another: they share its queries in the L2
    first_key = tl.program_id(0) % num_blocks * BLOCK_M
    pair = (tl.program_id(0) // num_blocks).to(tl.int64)
    batch = pair // H
    head = pair % H
    query_ptr += (batch * stride_qb + head * stride_qh) * UNIT
    key_ptr += (batch * stride_kb + head * stride_kh) * UNIT
    lse_ptr += batch * stride_lb + head * stride_lh
    key_rows = rows_from(key_ptr, first_key, N, stride_kn * UNIT, BLOCK_M)
    k = load_tile(key_rows, 0, WIDTH, E)
    k_rest = load_tile(key_rows, WIDTH, REST, E) if REST > 0 else None

    received = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first_query in range(0, S, BLOCK_N):
        query_rows = rows_from(query_ptr, first_query, S, stride_qs * UNIT, BLOCK_N)
        queries = first_query + tl.arange(0, BLOCK_N)
        # the address is clamped: the load needs no predicate. A query that does not exist gives 0
        lse = tl.load(lse_ptr + tl.minimum(queries, S - 1) * stride_ls) * LOG2_E
        lse = tl.where(queries < S, lse, float("inf"))
        scores = score_rows(k, k_rest, query_rows, E, WIDTH, REST) * scale
        received += tl.sum(tl.exp2(scores - lse[None, :]), axis=1)
    keys = first_key + tl.arange(0, BLOCK_M)
    tl.store(out_ptr + pair * N + keys, received / S, mask=keys < N)


def attention_received(
    query: Tensor, key: Tensor, lse: Tensor | None, softmax_scale: float
) -> Tensor:
    """Launch ``_attention_received_kernel``; without ``lse``, ``_log_sum_exp_kernel`` before it."""
    B, S, H, E = query.shape
    N = key.shape[1]
    expect_head_dim("attention_received", E)
    out = query.new_empty(B, H, N, dtype=torch.float32)
    if S * out.numel() == 0:
        return out.zero_()
    if lse is None:
        lse = _log_sum_exp(query, key, None, softmax_scale)
    setting = _choose("attention_received", map_settings(query.itemsize, E), query, N, B * H)
    _attention_received_kernel[(ceil(N / setting.block_m) * B * H,)](
        query, key, lse, out,
        N, S, H, softmax_scale / log(2),
        **_describe_heads(query, key),
        stride_lb=lse.stride(0), stride_lh=lse.stride(1), stride_ls=lse.stride(2),
        **setting.constants(), num_warps=setting.num_warps, num_stages=setting.num_stages,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["N", "S", "stride_qb"])
def _attention_entropy_kernel(
    query_ptr, key_ptr, lengths_ptr, lse_ptr, out_ptr,
    N, S, H, scale,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_kn, stride_kh,
    UNIT: tl.constexpr, E: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out[b, s] = -sum_n p log p, p[n] = mean_h softmax(scores of query[b, s, h])[n].

    Without lse, the keys must fit into one block: their softmax is taken there.
    """
    num_blocks = tl.cdiv(S, BLOCK_M)
    first_query = tl.program_id(0) % num_blocks * BLOCK_M
    batch = (tl.program_id(0) // num_blocks).to(tl.int64)
    num_keys = count_keys(lengths_ptr, batch, N)
    query_ptr += batch * stride_qb * UNIT
    key_ptr += batch * stride_kb * UNIT
    query_rows = rows_from(query_ptr, first_query, S, stride_qs * UNIT, BLOCK_M)
    queries = first_query + tl.arange(0, BLOCK_M)

    # the rounding of a log-sum-exp makes a row's sum differ from 1: it is divided out at the end
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    moment = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for first_key in range(0, num_keys, BLOCK_N):
        key_rows = rows_from(key_ptr, first_key, num_keys, stride_kn * UNIT, BLOCK_N)
        is_key = tl.arange(0, BLOCK_N) < num_keys - first_key
        p = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for head in range(H):
            rows = query_rows + head * stride_qh * UNIT
            q = load_tile(rows, 0, WIDTH, E)
            q_rest = load_tile(rows, WIDTH, REST, E) if REST > 0 else None
            head_rows = key_rows + head * stride_kh * UNIT
            scores = score_rows(q, q_rest, head_rows, E, WIDTH, REST) * scale
            scores = tl.where(is_key[None, :], scores, float("-inf"))
            if lse_ptr is None:
                weights = tl.exp2(scores - tl.max(scores, axis=1)[:, None])
                p += weights / tl.sum(weights, axis=1)[:, None]
            else:
                lse = tl.load(lse_ptr + (batch * H + head) * S + tl.minimum(queries, S - 1))
                p += tl.exp2(scores - (lse * LOG2_E)[:, None])
        p /= H
        total += tl.sum(p, axis=1)
        moment += tl.sum(p * tl.log2(tl.where(p > 0.0, p, 1.0)), axis=1)
    # without any key: 0
    total = tl.where(num_keys > 0, total, 1.0)
    entropy = (tl.log2(total) - moment / total) * LN_2
    tl.store(out_ptr + batch * S + queries, entropy, mask=queries < S)


def attention_entropy(
    query: Tensor, key: Tensor, key_lengths: Tensor | None, softmax_scale: float
) -> Tensor:
    """Launch ``_attention_entropy_kernel``; with many keys, ``_log_sum_exp_kernel`` before it."""
    B, S, _, E = query.shape
    N = key.shape[1]
    expect_head_dim("attention_entropy", E)
    out = query.new_empty(B, S, dtype=torch.float32)
    if N * out.numel() == 0:
        return out.zero_()
    setting = entropy_setting(query.itemsize, E)
    is_whole = setting.block_n >= N
    lse = None if is_whole else _log_sum_exp(query, key, key_lengths, softmax_scale)
    _attention_entropy_kernel[(ceil(S / setting.block_m) * B,)](
        query, key, key_lengths, lse, out,
        N, S, query.shape[2], softmax_scale / log(2),
        **_describe_heads(query, key),
        **setting.constants(), num_warps=setting.num_warps, num_stages=setting.num_stages,
    )  # fmt: skip
    return out


def _choose(
    kernel: str, settings: list[MapSetting], query: Tensor, num_rows: int, num_maps: int
) -> MapSetting:
    """Choose the largest block that keeps every multiprocessor busy, or the tuned one."""
    device = device_of(query.device)
    heuristic = next(
        (s for s in settings if ceil(num_rows / s.block_m) * num_maps >= device.num_sms),
        settings[-1],
    )
    problem = {"R": num_rows * num_maps, "E": query.shape[3]}
    return choose(kernel, device, problem, heuristic, lambda: settings)


def _describe_heads(query: Tensor, key: Tensor) -> dict[str, int]:
    """The strides of queries and keys, and how their heads are split."""
    unit, strides = strides_in_units(query, key)
    names = [f"stride_{name}" for name in ("qb", "qs", "qh", "kb", "kn", "kh")]
    width, rest = split_head_dim(query.shape[3])
    heads = {"UNIT": unit, "E": query.shape[3], "WIDTH": width, "REST": rest}
    return dict(zip(names, strides, strict=True)) | heads


@triton.jit
def _factor_of(x):
    """A power of two for each row: by it squares neither overflow nor vanish."""
    largest = tl.max(tl.abs(x), axis=1)
    factor = tl.where(largest < _SMALL, 1.0 / _SHRINK, 1.0)
    return tl.where(largest > _LARGE, _SHRINK, factor)


@triton.jit(do_not_specialize=["B", "N"])
def _head_norms_kernel(
    x_ptr, out_ptr,
    B, N, H,
    stride_xb, stride_xn, stride_xh,
    UNIT: tl.constexpr, E: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, n] = mean_h |x[b, n, h]|."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < B * N
    cols = tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (cols < E)[None, :]
    x_rows = x_ptr + (row // N * stride_xb + row % N * stride_xn) * UNIT
    total = tl.zeros((ROWS,), dtype=tl.float32)
    for head in range(H):
        ptrs = (x_rows + head * stride_xh * UNIT)[:, None] + cols[None, :]
        x = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        # squares beyond float32: the row smaller by a power of two
        is_large = tl.max(tl.abs(x), axis=1) > _LARGE
        x *= tl.where(is_large, _SHRINK, 1.0)[:, None]
        total += tl.sqrt(tl.sum(x * x, axis=1)) * tl.where(is_large, 1.0 / _SHRINK, 1.0)
    tl.store(out_ptr + row, total / H, mask=is_row)


def head_norms(x: Tensor) -> Tensor:
    """Launch ``_head_norms_kernel``."""
    B, N, H, E = x.shape
    out = x.new_empty(B, N, dtype=torch.float32)
    if out.numel() == 0:
        return out
    setting = choose("head_norms", device_of(x.device), {"E": E}, TileSetting.for_whole_rows(E))
    unit, strides = strides_in_units(x)
    _head_norms_kernel[(ceil(B * N / setting.rows),)](
        x, out,
        B, N, H,
        *strides,
        UNIT=unit, E=E, ROWS=setting.rows, BLOCK_D=setting.block_d, num_warps=setting.num_warps,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["B", "N"])
def _token_change_kernel(
    new_ptr, old_ptr, out_ptr,
    B, N, D,
    stride_nb, stride_nn, stride_ob, stride_on,
    METRIC: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[b, n] = 1 - cos(new[b, n], old[b, n]), or |new[b, n] - old[b, n]|_1 / |old[b, n]|_1."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    is_row = row < B * N
    cols = tl.arange(0, BLOCK_D)
    mask = is_row[:, None] & (cols < D)[None, :]
    new_rows = new_ptr + row // N * stride_nb + row % N * stride_nn
    old_rows = old_ptr + row // N * stride_ob + row % N * stride_on
    new = tl.load(new_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    old = tl.load(old_rows[:, None] + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    if METRIC == "cosine":
        new *= _factor_of(new)[:, None]
        old *= _factor_of(old)[:, None]
        new_norm = tl.maximum(tl.sqrt(tl.sum(new * new, axis=1)), 1e-8)
        old_norm = tl.maximum(tl.sqrt(tl.sum(old * old, axis=1)), 1e-8)
        change = 1.0 - tl.sum(new * old, axis=1) / (new_norm * old_norm)
    else:
        change = tl.sum(tl.abs(new - old), axis=1) / tl.maximum(tl.sum(tl.abs(old), axis=1), 1e-12)
    tl.store(out_ptr + row, change, mask=is_row)


def token_change(new: Tensor, old: Tensor, metric: str) -> Tensor:
    """Launch ``_token_change_kernel``."""
    B, N, D = new.shape
    out = new.new_empty(B, N, dtype=torch.float32)
    if out.numel() == 0:
        return out
    setting = choose("token_change", device_of(new.device), {"D": D}, TileSetting.for_whole_rows(D))
    _token_change_kernel[(ceil(B * N / setting.rows),)](
        new, old, out,
        B, N, D,
        new.stride(0), new.stride(1), old.stride(0), old.stride(1),
        METRIC=metric, ROWS=setting.rows, BLOCK_D=setting.block_d, num_warps=setting.num_warps,
    )  # fmt: skip
    return out


def compile_cases(device: Device) -> Iterator[CompileCase]:
    """Every setting: of maps with the head dims of the models, of rows with every width.

    float16 differs from bfloat16 in the type of its instructions alone.
    """
    head_dims = {"bf16": (64, 72, 96, 99, 128, 256), "fp16": (72,), "fp32": (72, 128)}
    if device.arch != 90:
        head_dims = {"bf16": (72, 128, 256), "fp32": (128,)}
    for dtype, E in ((dtype, E) for dtype, dims in head_dims.items() for E in dims):
        itemsize = 4 if dtype == "fp32" else 2
        for setting in map_settings(itemsize, E):
            yield _map_case(_log_sum_exp_kernel, dtype, E, setting)
            yield _map_case(_attention_received_kernel, dtype, E, setting)
        for is_whole in (False, True):
            setting = entropy_setting(itemsize, E)
            yield _map_case(_attention_entropy_kernel, dtype, E, setting, is_whole)
    for E in (64, 72, 256):
        yield _row_case(_head_norms_kernel, TileSetting.for_whole_rows(E), UNIT=8, E=E)
    for tile in whole_row_settings():
        for metric in ("cosine", "relative_l1"):
            yield _row_case(_token_change_kernel, tile, METRIC=metric)


def _map_case(
    kernel: Any, dtype: str, head_dim: int, setting: MapSetting, is_whole: bool = False
) -> CompileCase:
    names = kernel.arg_names
    types = {"query_ptr": f"*{dtype}", "key_ptr": f"*{dtype}", "lengths_ptr": "*i32"}
    pointers = {name: types.get(name, "*fp32") for name in names if name.endswith("_ptr")}
    if is_whole:
        del pointers["lse_ptr"]
    strides = [name for name in names if name.startswith("stride_")]
    width, rest = split_head_dim(head_dim)
    return CompileCase(
        kernel=kernel,
        variant=f"{dtype} E={head_dim}" + " whole" * is_whole,
        setting=setting,
        signature=pointers | dict.fromkeys(("N", "S", "H", *strides), "i32") | {"scale": "fp32"},
        constexprs={"UNIT": gcd(8, head_dim), "E": head_dim, "WIDTH": width, "REST": rest}
        | setting.constants()
        | ({"lse_ptr": None} if is_whole else {}),
        aligned=frozenset(pointers),
        num_warps=setting.num_warps,
        num_stages=setting.num_stages,
        is_gemm=dtype != "fp32" and head_dim % 8 == 0,
        copy_bytes=4 if rest else 16,
    )


def _row_case(kernel: Any, tile: TileSetting, **constants: Any) -> CompileCase:
    names = kernel.arg_names
    pointers = {name: "*bf16" for name in names if name.endswith("_ptr")} | {"out_ptr": "*fp32"}
    strides = [name for name in names if name.startswith("stride_")]
    sizes = [name for name in ("B", "N", "H", "D") if name in names]
    return CompileCase(
        kernel=kernel,
        variant=" ".join(f"{value}" for value in constants.values()),
        setting=tile,
        signature=pointers | dict.fromkeys((*sizes, *strides), "i32"),
        constexprs={"ROWS": tile.rows, "BLOCK_D": tile.block_d} | constants,
        aligned=frozenset({*pointers, *strides, *sizes} - {"B", "N", "H"}),
        num_warps=tile.num_warps,
    )


def tune_cases(device: Device) -> Iterator[TuneCase]:
    """The self-attention of DiT-XL, of PixArt and of FLUX."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    problems = ((2, 256, 16, 72), (2, 4096, 16, 72), (1, 4608, 24, 128))
    for B, N, H, E in ((1, 9, 1, 8),) if device == INTERPRETER else problems:
        query, key = (torch.randn(B, N, H, E, dtype=torch.bfloat16, device=where) for _ in "qk")
        lse = _log_sum_exp(query, key, None, E**-0.5)
        label = f"B={B} N={N} H={H} E={E} bf16"
        candidates = map_settings(2, E)
        for name, run in (
            ("log_sum_exp", partial(_log_sum_exp, query, key, None, E**-0.5)),
            ("attention_received", partial(attention_received, query, key, lse, E**-0.5)),
        ):
            yield TuneCase(name, label, candidates, run)
