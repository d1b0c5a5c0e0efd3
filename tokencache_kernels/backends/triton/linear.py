"""Linear layers on packed rows, each in one pass: gather, GEMM, activation; or GEMM, scatter.

Gathering, activating and scattering around the GEMM saves a launch and a pass over the rows each.
Few rows do not fill the device with tiles: then several programs share one (split-K), and the last
to arrive adds their parts in a fixed order. A launch setting may also say that the vendor's library
multiplies faster: it does, wherever it has the epilogue.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._device import await_previous
from ._gemm import (
    GemmSetting,
    complete_piece,
    count_pieces,
    gemm_heuristic,
    gemm_settings,
    multiply_tile,
    prefetch_rows,
    split_buffers,
    store_activated,
    store_scattered,
    tile_at,
    weight_rows_at,
)
from ._launch import (
    INTERPRETER,
    CompileCase,
    Device,
    TuneCase,
    choose,
    device_of,
    early_start,
)
from .rows import gather_rows, scatter_rows_


@triton.jit(
    do_not_specialize=["M", "N", "S", "num_steps", "split_k", "stride_ib"],
    do_not_specialize_on_alignment=["indices_ptr"],
)
def _linear_kernel(
    x_ptr, indices_ptr, weight_ptr, bias_ptr, factor_ptr, out_ptr, partials_ptr, counters_ptr,
    M, N, S, num_steps, split_k,
    stride_xb, stride_ib, stride_xn: tl.constexpr, stride_w: tl.constexpr,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):  # fmt: skip
    """out[m] = activation(row[m] @ weight.T + bias) [* factor[m]].

    row[m] = x[m], or with indices, m = b * S + s, x[b, indices[b, s]]; an empty slot: 0.
    """
    tile_m, tile_n = tile_at(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(D_OUT, BLOCK_N), GROUP_M
    )
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tile_n * BLOCK_N
    weight_rows = weight_rows_at(weight_ptr, first_col, stride_w, D_OUT, BLOCK_N)
    if STARTS_EARLY:
        # the weights are nobody's output
        prefetch_rows(weight_rows)
        await_previous()

    # a row that does not exist or is empty reads one that does: no mask in the loop
    row = tl.minimum(rows, M - 1)
    if indices_ptr is None:
        x_rows = x_ptr + row.to(tl.int64) * stride_xn
    else:
        batch = (row // S).to(tl.int64)
        token = tl.load(indices_ptr + batch * stride_ib + row % S)
        is_live = (token >= 0) & (token < N)
        token = tl.where(is_live, token, 0).to(tl.int64)
        x_rows = x_ptr + batch * stride_xb + token * stride_xn

    part, is_last = multiply_tile(
        None, x_rows, weight_rows, partials_ptr, counters_ptr,
        num_steps, split_k, 0, D_IN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if is_last:
        PIECES: tl.constexpr = count_pieces(partials_ptr is not None, BLOCK_N)
        for piece in tl.static_range(PIECES):
            total = complete_piece(part, partials_ptr, split_k, piece, PIECES, BLOCK_M, BLOCK_N)
            if indices_ptr is not None:
                total = tl.where(is_live[:, None], total, 0.0)
            col = first_col + piece * total.shape[1]
            store_activated(total, bias_ptr, factor_ptr, out_ptr, rows, col, M, D_OUT, ACTIVATION)


# left alone, the assembler spills for a second program on a multiprocessor, that does not fit
_GATED_REGISTERS = 255


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    indices: Tensor | None,
    factor: Tensor | None = None,
) -> Tensor:
    """Launch ``_linear_kernel``."""
    D_out, D_in = weight.shape
    B, S = x.shape[:2] if indices is None else indices.shape
    M = B * S
    if M * D_out == 0:
        return x.new_empty(B, S, D_out)
    if indices is None:
        x = x.reshape(1, M, D_in)
    setting = _choose("linear", x, M, weight)
    has_epilogue = factor is None and _is_in_library(x, bias, activation)
    if setting.in_library and indices is None and has_epilogue:
        return _multiply_in_library(x[0], weight, bias, activation).view(B, S, D_out)
    out = x.new_empty(B, S, D_out)
    num_tiles = setting.num_tiles(M, D_out)
    num_steps = ceil(D_in / setting.block_k)
    num_splits = setting.num_splits(num_steps)
    partials, counters = split_buffers(setting, num_splits, num_tiles, x.device)
    _linear_kernel[num_tiles, num_splits](
        x, indices, weight, bias, factor, out, partials, counters,
        M, x.shape[1], S, num_steps, num_splits,
        # a stride that depends on S could make the compiler run again: packed rows need none
        0 if indices is None else x.stride(0), 0 if indices is None else indices.stride(0),
        x.stride(1), weight.stride(0),
        D_IN=D_in, D_OUT=D_out, ACTIVATION=activation,
        **setting.constants(), num_warps=setting.num_warps, num_stages=setting.num_stages,
        maxnreg=None if factor is None else _GATED_REGISTERS, **early_start(device_of(x.device)),
    )  # fmt: skip
    return out


@triton.jit(
    do_not_specialize=["M", "N", "S", "num_steps", "split_k", "stride_ib"],
    do_not_specialize_on_alignment=["indices_ptr"],
)
def _linear_scatter_kernel(
    features_ptr, x_ptr, weight_ptr, bias_ptr, gate_ptr, indices_ptr, cache_ptr,
    partials_ptr, counters_ptr,
    M, N, S, num_steps, split_k,
    stride_fb, stride_gb, stride_ib, stride_cb,
    stride_fn: tl.constexpr, stride_xn: tl.constexpr, stride_w: tl.constexpr,
    stride_cn: tl.constexpr,
    D_FEATURES: tl.constexpr, D_IN: tl.constexpr, D_OUT: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):  # fmt: skip
    """cache[b, indices[b, s]] = [old value +] [gate[b] *] (row[b * S + s] @ weight.T + bias).

    row[m] = x[m], or with features, m = b * S + s, those at indices[b, s] and then x[m].
    """
    tile_m, tile_n = tile_at(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(D_OUT, BLOCK_N), GROUP_M
    )
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tile_n * BLOCK_N
    weight_rows = weight_rows_at(weight_ptr, first_col, stride_w, D_OUT, BLOCK_N)
    if STARTS_EARLY:
        # the weights are nobody's output
        prefetch_rows(weight_rows)
        await_previous()
    # a row that does not exist or is empty reads one that does: no mask in the loop
    row = tl.minimum(rows, M - 1)
    x_rows = x_ptr + row.to(tl.int64) * stride_xn
    feature_rows = None
    if features_ptr is not None:
        batch = (row // S).to(tl.int64)
        token = tl.load(indices_ptr + batch * stride_ib + row % S)
        token = tl.where((token >= 0) & (token < N), token, 0).to(tl.int64)
        feature_rows = features_ptr + batch * stride_fb + token * stride_fn

    part, is_last = multiply_tile(
        feature_rows, x_rows, weight_rows, partials_ptr, counters_ptr,
        num_steps, split_k, D_FEATURES, D_IN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if is_last:
        PIECES: tl.constexpr = count_pieces(partials_ptr is not None, BLOCK_N)
        for piece in tl.static_range(PIECES):
            total = complete_piece(part, partials_ptr, split_k, piece, PIECES, BLOCK_M, BLOCK_N)
            store_scattered(
                total, bias_ptr, gate_ptr, indices_ptr, cache_ptr,
                rows, first_col + piece * total.shape[1],
                M, N, S, stride_gb, stride_ib, stride_cb, stride_cn, D_OUT, RESIDUAL,
            )  # fmt: skip


def linear_scatter_(
    cache: Tensor,
    indices: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    residual: bool,
    features: Tensor | None = None,
) -> None:
    """Launch ``_linear_scatter_kernel``."""
    D_out = weight.shape[0]
    B, S = indices.shape
    M = B * S
    if M * D_out == 0:
        return
    device = device_of(x.device)
    if features is not None and device.arch < 90:
        # two kinds of rows do not fit in the registers beside the larger tiles there
        x = torch.cat([gather_rows(features, indices), x], dim=-1)
        features = None
    rows = x.reshape(M, x.shape[2])
    setting = _choose("linear_scatter_", x, M, weight)
    if setting.in_library and gate is None and not residual and features is None:
        scatter_rows_(cache, indices, F.linear(x, weight, bias))
        return
    num_tiles = setting.num_tiles(M, D_out)
    num_steps = ceil(x.shape[2] / setting.block_k)
    if features is not None:
        num_steps += ceil(features.shape[2] / setting.block_k)
    num_splits = setting.num_splits(num_steps)
    partials, counters = split_buffers(setting, num_splits, num_tiles, x.device)
    _linear_scatter_kernel[num_tiles, num_splits](
        features, rows, weight, bias, gate, indices, cache, partials, counters,
        M, cache.shape[1], S, num_steps, num_splits,
        0 if features is None else features.stride(0), 0 if gate is None else gate.stride(0),
        indices.stride(0), cache.stride(0),
        0 if features is None else features.stride(1), rows.stride(0), weight.stride(0),
        cache.stride(1),
        D_FEATURES=0 if features is None else features.shape[2], D_IN=x.shape[2], D_OUT=D_out,
        RESIDUAL=residual,
        **setting.constants(), num_warps=setting.num_warps, num_stages=setting.num_stages,
        **early_start(device),
    )  # fmt: skip


def _choose(kernel: str, x: Tensor, num_rows: int, weight: Tensor) -> GemmSetting:
    """The launch setting for this many rows through this weight."""
    device = device_of(x.device)
    D_out, D_in = weight.shape
    heuristic = gemm_heuristic(device, x.itemsize, num_rows, D_out, D_in)
    problem = {"M": num_rows, "O": D_out, "K": D_in, "bits": 8 * x.itemsize}
    candidates = partial(_candidates, device, x.itemsize, D_out, D_in)
    return choose(kernel, device, problem, heuristic, candidates)


def _candidates(device: Device, itemsize: int, D_out: int, D_in: int) -> list[GemmSetting]:
    """Every setting, and the library's product."""
    ours = gemm_settings(device, itemsize, D_out, D_in)
    return [*ours, replace(ours[0], in_library=True)]


# the library's own GELU
_LIBRARY_GELU = {"cpu": "gelu", "cuda": "gelu_tanh"}


def _is_in_library(x: Tensor, bias: Tensor | None, activation: str) -> bool:
    """Tell whether the library has this epilogue, so that the result is rounded once there too."""
    has_gelu = bias is not None and activation == _LIBRARY_GELU[x.device.type]
    return activation == "none" or has_gelu


def _multiply_in_library(
    rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    if bias is None or activation == "none":
        return F.linear(rows, weight, bias)
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)


# a depth, and a number of columns that no wide tile divides
_COMPILED_D_IN, _COMPILED_D_OUT = 3072, 1152


def compile_cases(device: Device) -> Iterator[CompileCase]:
    """Every setting with the plainest epilogue, every tile with the heaviest.

    The number of splits is not a constant of the kernel: 2 stands for all. The other epilogues,
    early starts, and float16, which differs from bfloat16 in the type of its instructions alone,
    are compiled with one tile. For Hopper there is, too, the usual epilogue, and the products of
    DiT-XL and of FLUX and those of an odd depth in the settings that the heuristic takes.
    """
    is_main = device.arch == 90
    for dtype, itemsize in (("bf16", 2), ("fp32", 4)):
        settings = [
            setting
            for setting in gemm_settings(device, itemsize, _COMPILED_D_OUT, _COMPILED_D_IN)
            if setting.split_k <= 2
        ]
        for setting in settings:
            yield _linear_case(setting, dtype, "none")
            yield _linear_case(setting, dtype, "none", is_gated=True)
            yield _linear_scatter_case(setting, dtype)
            if setting.split_k == 1:
                yield _linear_case(setting, dtype, "gelu", gathers=True)
                yield _linear_scatter_case(setting, dtype, is_gated=True, residual=True)
            elif device.arch >= 90 and dtype == "bf16":
                yield _linear_scatter_case(setting, dtype, has_features=True)
            if is_main and dtype == "bf16":
                yield _linear_case(setting, dtype, "gelu_tanh")
        largest = settings[0]
        yield _linear_case(largest, dtype, "silu")
        yield _linear_case(largest, dtype, "gelu")
        yield _linear_scatter_case(largest, dtype, is_gated=True)
        yield _linear_scatter_case(largest, dtype, residual=True)
        if device.arch >= 90 and dtype == "bf16":
            yield _linear_case(largest, dtype, "gelu_tanh", starts_early=True)
            yield _linear_scatter_case(largest, dtype, starts_early=True)
            yield _linear_scatter_case(largest, dtype, has_features=True)
            yield _linear_case(largest, "fp16", "gelu", gathers=True)
            yield _linear_scatter_case(largest, "fp16", is_gated=True, residual=True)
    if is_main:
        for num_rows, width, hidden in ((416, 1152, 4608), (460, 3072, 12288), (52, 1160, 4640)):
            setting = gemm_heuristic(device, 2, num_rows, hidden, width)
            yield _linear_case(setting, "bf16", "gelu_tanh", d_in=width, d_out=hidden)
            setting = gemm_heuristic(device, 2, num_rows, width, hidden)
            yield _linear_scatter_case(setting, "bf16", d_in=hidden, d_out=width)


def _linear_case(
    setting: GemmSetting,
    dtype: str,
    activation: str,
    gathers: bool = False,
    starts_early: bool = False,
    is_gated: bool = False,
    d_in: int = _COMPILED_D_IN,
    d_out: int = _COMPILED_D_OUT,
) -> CompileCase:
    return _compile_case(
        _linear_kernel,
        f"{activation} {dtype}"
        + " gather" * gathers
        + " gated" * is_gated
        + " early" * starts_early,
        setting,
        dtype,
        pointers={
            "out_ptr": dtype,
            "factor_ptr": dtype if is_gated else None,
            "indices_ptr": "i32" if gathers else None,
        },
        strides=("stride_xb",),
        d_in=d_in,
        d_out=d_out,
        constexprs={"ACTIVATION": activation, "STARTS_EARLY": starts_early},
        max_registers=_GATED_REGISTERS if is_gated else None,
    )


def _linear_scatter_case(
    setting: GemmSetting,
    dtype: str,
    is_gated: bool = False,
    residual: bool = False,
    has_features: bool = False,
    starts_early: bool = False,
    d_in: int = _COMPILED_D_IN,
    d_out: int = _COMPILED_D_OUT,
) -> CompileCase:
    return _compile_case(
        _linear_scatter_kernel,
        dtype
        + " gate" * is_gated
        + " residual" * residual
        + " features" * has_features
        + " early" * starts_early,
        setting,
        dtype,
        pointers={
            "features_ptr": dtype if has_features else None,
            "gate_ptr": dtype if is_gated else None,
            "indices_ptr": "i32",
            "cache_ptr": dtype,
        },
        strides=("stride_fb", "stride_gb", "stride_cb"),
        d_in=d_in,
        d_out=d_out,
        constexprs={
            "D_FEATURES": d_out * has_features,
            "stride_fn": d_out,
            "stride_cn": d_out,
            "RESIDUAL": residual,
            "STARTS_EARLY": starts_early,
        },
    )


def _compile_case(
    kernel: Any,
    variant: str,
    setting: GemmSetting,
    dtype: str,
    pointers: dict[str, str | None],
    strides: tuple[str, ...],
    d_in: int,
    d_out: int,
    constexprs: dict[str, Any],
    max_registers: int | None = None,
) -> CompileCase:
    is_split = setting.split_k > 1
    pointers = {
        "x_ptr": dtype,
        "weight_ptr": dtype,
        "bias_ptr": dtype,
        "partials_ptr": "fp32" if is_split else None,
        "counters_ptr": "i32" if is_split else None,
    } | pointers
    present = {name: f"*{element}" for name, element in pointers.items() if element is not None}
    return CompileCase(
        kernel=kernel,
        variant=variant + ("" if d_in == _COMPILED_D_IN else f" K={d_in} O={d_out}"),
        setting=setting,
        signature=present
        | dict.fromkeys(("M", "N", "S", "num_steps", "split_k", "stride_ib", *strides), "i32"),
        constexprs=dict.fromkeys(pointers.keys() - present.keys())
        | {"stride_xn": d_in, "stride_w": d_in, "D_IN": d_in, "D_OUT": d_out}
        | setting.constants()
        | constexprs,
        aligned=frozenset({*present, *strides} - {"indices_ptr"}),
        num_warps=setting.num_warps,
        num_stages=setting.num_stages,
        max_registers=max_registers,
        is_gemm=dtype != "fp32",
    )


def tune_cases(device: Device) -> Iterator[TuneCase]:
    """The two layers of the MLP of DiT-XL and of FLUX, at each number of rows that is usual."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16
    # settings are looked up by the next power of two; these are rows of the benchmarks
    problems = [(1152, S) for S in (688, 86, 218, 416, 2048, 3552, 7130)]
    problems += [(3072, S) for S in (614, 191, 460, 1382, 2304, 11880)]
    for D, S in [(32, 8)] if device == INTERPRETER else problems:
        for D_out, D_in in ((4 * D, D), (D, 4 * D)):
            x, weight, bias = (
                torch.randn(*shape, dtype=dtype, device=where)
                for shape in ((1, S, D_in), (D_out, D_in), (D_out,))
            )
            cache = torch.empty(1, S, D_out, dtype=dtype, device=where)
            indices = torch.arange(S, dtype=torch.int32, device=where)[None]
            candidates = _candidates(device, dtype.itemsize, D_out, D_in)
            label = f"M={S} O={D_out} K={D_in} bf16"
            yield TuneCase(
                "linear", label, candidates, partial(linear, x, weight, bias, "gelu_tanh", None)
            )
            yield TuneCase(
                "linear_scatter_",
                label,
                candidates,
                partial(linear_scatter_, cache, indices, x, weight, bias, None, False),
            )
