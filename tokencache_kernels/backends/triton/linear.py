"""Linear layers on packed rows, each in one pass: gather, GEMM, activation; or GEMM, scatter.

Gathering, activating and scattering around the GEMM saves a launch and a pass over the rows each.
Few rows do not fill the device with tiles: then several programs share one (split-K), and the last
to arrive adds their parts in a fixed order. A launch setting may also say that the vendor's library
multiplies faster: it does, wherever it has the epilogue.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ._device import await_previous
from ._gemm import (
    GemmSetting,
    count_steps,
    gemm_heuristic,
    gemm_settings,
    multiply_part,
    multiply_rows,
    multiply_steps,
    split_buffers,
    store_activated,
    store_scattered,
    sum_parts,
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


@triton.jit(do_not_specialize=["M", "N", "S", "split_k"])
def _linear_kernel(
    x_ptr, indices_ptr, weight_ptr, bias_ptr, factor_ptr, out_ptr, partials_ptr, counters_ptr,
    M, N, S, split_k,
    stride_xb, stride_xn: tl.constexpr, stride_w: tl.constexpr,
    D_IN: tl.constexpr, D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):  # fmt: skip
    """out[m] = activation(row[m] @ weight.T + bias) [* factor[m]].

    row[m] = x[m], or with indices, m = b * S + s, x[b, indices[b, s]]; an empty slot: 0.
    """
    if STARTS_EARLY:
        await_previous()
    tile_m, tile_n = tile_at(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(D_OUT, BLOCK_N), GROUP_M
    )
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tile_n * BLOCK_N

    # a row that does not exist or is empty reads one that does: no mask in the loop
    row = tl.minimum(rows, M - 1)
    if indices_ptr is None:
        x_rows = x_ptr + row.to(tl.int64) * stride_xn
    else:
        token = tl.load(indices_ptr + row)
        is_live = (token >= 0) & (token < N)
        token = tl.where(is_live, token, 0).to(tl.int64)
        x_rows = x_ptr + (row // S).to(tl.int64) * stride_xb + token * stride_xn

    weight_rows = weight_rows_at(weight_ptr, first_col, stride_w, D_OUT, BLOCK_N)
    if partials_ptr is None:
        is_complete = True
        total = multiply_rows(x_rows, weight_rows, D_IN, BLOCK_M, BLOCK_N, BLOCK_K)
    else:
        is_complete = multiply_part(
            None, x_rows, weight_rows, partials_ptr, counters_ptr,
            split_k, 0, D_IN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if is_complete:
        if partials_ptr is not None:
            total = sum_parts(partials_ptr, split_k, BLOCK_M, BLOCK_N)
        if indices_ptr is not None:
            total = tl.where(is_live[:, None], total, 0.0)
        store_activated(total, bias_ptr, factor_ptr, out_ptr, rows, first_col, M, D_OUT, ACTIVATION)


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
    else:
        indices = indices.contiguous()
    setting = _choose("linear", x, M, weight)
    has_epilogue = factor is None and _is_in_library(x, bias, activation)
    if setting.in_library and indices is None and has_epilogue:
        return _multiply_in_library(x[0], weight, bias, activation).view(B, S, D_out)
    out = x.new_empty(B, S, D_out)
    num_tiles = setting.num_tiles(M, D_out)
    partials, counters = split_buffers(setting, num_tiles, x.device)
    _linear_kernel[num_tiles, setting.split_k](
        x, indices, weight, bias, factor, out, partials, counters,
        M, x.shape[1], S, setting.split_k,
        # a stride that depends on S could make the compiler run again: packed rows need none
        0 if indices is None else x.stride(0), x.stride(1), weight.stride(0),
        D_IN=D_in, D_OUT=D_out, ACTIVATION=activation,
        **setting.constants(), num_warps=setting.num_warps, num_stages=setting.num_stages,
        maxnreg=None if factor is None else _GATED_REGISTERS, **early_start(device_of(x.device)),
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["M", "N", "S", "split_k"])
def _linear_scatter_kernel(
    features_ptr, x_ptr, weight_ptr, bias_ptr, gate_ptr, indices_ptr, cache_ptr,
    partials_ptr, counters_ptr,
    M, N, S, split_k,
    stride_fb, stride_gb, stride_cb,
    stride_fn: tl.constexpr, stride_xn: tl.constexpr, stride_w: tl.constexpr,
    stride_cn: tl.constexpr,
    D_FEATURES: tl.constexpr, D_IN: tl.constexpr, D_OUT: tl.constexpr, RESIDUAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    STARTS_EARLY: tl.constexpr,
):  # fmt: skip
    """cache[b, indices[b, s]] = [old value +] [gate[b] *] (row[b * S + s] @ weight.T + bias).

    row[m] = x[m], or with features, m = b * S + s, those at indices[b, s] and then x[m].
    """
    if STARTS_EARLY:
        await_previous()
    tile_m, tile_n = tile_at(
        tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(D_OUT, BLOCK_N), GROUP_M
    )
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    first_col = tile_n * BLOCK_N
    # a row that does not exist or is empty reads one that does: no mask in the loop
    row = tl.minimum(rows, M - 1)
    x_rows = x_ptr + row.to(tl.int64) * stride_xn
    feature_rows = None
    if features_ptr is not None:
        token = tl.load(indices_ptr + row)
        token = tl.where((token >= 0) & (token < N), token, 0).to(tl.int64)
        feature_rows = features_ptr + (row // S).to(tl.int64) * stride_fb + token * stride_fn

    weight_rows = weight_rows_at(weight_ptr, first_col, stride_w, D_OUT, BLOCK_N)
    if partials_ptr is None:
        is_complete = True
        total = multiply_steps(
            feature_rows, x_rows, weight_rows, 0, count_steps(D_FEATURES, D_IN, BLOCK_K),
            D_FEATURES, D_IN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    else:
        is_complete = multiply_part(
            feature_rows, x_rows, weight_rows, partials_ptr, counters_ptr,
            split_k, D_FEATURES, D_IN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    if is_complete:
        if partials_ptr is not None:
            total = sum_parts(partials_ptr, split_k, BLOCK_M, BLOCK_N)
        store_scattered(
            total, bias_ptr, gate_ptr, indices_ptr, cache_ptr, rows, first_col,
            M, N, S, stride_gb, stride_cb, stride_cn, D_OUT, RESIDUAL,
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
    partials, counters = split_buffers(setting, num_tiles, x.device)
    _linear_scatter_kernel[num_tiles, setting.split_k](
        features, rows, weight, bias, gate, indices.contiguous(), cache,
        partials, counters,
        M, cache.shape[1], S, setting.split_k,
        0 if features is None else features.stride(0), 0 if gate is None else gate.stride(0),
        cache.stride(0),
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
    return choose(kernel, device, problem, heuristic)


# the library's own GELU
_LIBRARY_GELU = {"cpu": "gelu", "cuda": "gelu_tanh"}


def _is_in_library(x: Tensor, bias: Tensor | None, activation: str) -> bool:
    """Whether the library has this epilogue, so that the result is rounded once there too."""
    has_gelu = bias is not None and activation == _LIBRARY_GELU[x.device.type]
    return activation == "none" or has_gelu


def _multiply_in_library(
    rows: Tensor, weight: Tensor, bias: Tensor | None, activation: str
) -> Tensor:
    if bias is None or activation == "none":
        return F.linear(rows, weight, bias)
    return torch._addmm_activation(bias, rows, weight.t(), use_gelu=True)


def compile_cases(device: Device) -> Iterator[CompileCase]:
    """Every setting with every epilogue.

    The number of splits is not a constant of the kernel: 2 stands for all. float16 differs from
    bfloat16 in the type of its instructions alone: the heaviest epilogues do. So does the plainest
    one for early starts.
    """
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        linear_variants = [("gelu", True)]
        scatter_variants = [(True, True)]
        if dtype != "fp16":
            linear_variants += [(name, False) for name in ("none", "gelu", "gelu_tanh", "silu")]
            scatter_variants += [(False, False), (True, False), (False, True)]
        for setting in gemm_settings(device, itemsize, _COMPILED_D_OUT, _COMPILED_D_IN):
            if setting.split_k > 2:
                continue
            for activation, gathers in linear_variants:
                yield _linear_case(setting, dtype, activation, gathers)
            if dtype != "fp16":
                yield _linear_case(setting, dtype, "none", is_gated=True)
            for is_gated, residual in scatter_variants:
                yield _linear_scatter_case(setting, dtype, is_gated, residual)
            if device.arch >= 90:
                yield _linear_scatter_case(setting, dtype, has_features=True)
    if device.arch >= 90:
        for setting in gemm_settings(device, 2, _COMPILED_D_OUT, _COMPILED_D_IN):
            if setting.split_k <= 2:
                yield _linear_case(setting, "bf16", "gelu_tanh", starts_early=True)
                yield _linear_scatter_case(setting, "bf16", starts_early=True)


# many steps of k, so that the loop stays one, and a number of columns that no wide tile divides
_COMPILED_D_IN, _COMPILED_D_OUT = 3072, 1152


def _linear_case(
    setting: GemmSetting,
    dtype: str,
    activation: str,
    gathers: bool = False,
    starts_early: bool = False,
    is_gated: bool = False,
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
        constexprs={
            "D_FEATURES": _COMPILED_D_OUT * has_features,
            "stride_fn": _COMPILED_D_OUT,
            "stride_cn": _COMPILED_D_OUT,
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
        variant=variant,
        setting=setting,
        signature=present | dict.fromkeys(("M", "N", "S", "split_k", *strides), "i32"),
        constexprs=dict.fromkeys(pointers.keys() - present.keys())
        | {
            "stride_xn": _COMPILED_D_IN,
            "stride_w": _COMPILED_D_IN,
            "D_IN": _COMPILED_D_IN,
            "D_OUT": _COMPILED_D_OUT,
        }
        | setting.constants()
        | constexprs,
        aligned=frozenset({*present, *strides}),
        num_warps=setting.num_warps,
        num_stages=setting.num_stages,
        max_registers=max_registers,
        is_gemm=dtype != "fp32",
    )


def tune_cases(device: Device) -> Iterator[TuneCase]:
    """The two layers of the MLP of DiT-XL and of FLUX, at each number of rows that is usual."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16
    # what a setting is looked up by is the next power of two; these are rows of the benchmarks
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
            ours = gemm_settings(device, dtype.itemsize, D_out, D_in)
            candidates = [*ours, replace(ours[0], in_library=True)]
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
