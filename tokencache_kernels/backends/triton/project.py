"""The projection to queries, keys and values in one launch, stored where attention reads them.

One GEMM whose epilogue picks the destination by column: queries packed, keys and values straight in
their cache rows. A tile holds heads as a whole where they are normalised or rotated, so that this
happens in registers instead of in passes of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import QkNorm
from ._device import round_to
from ._gemm import (
    MAX_EPILOGUE_COLS,
    GemmSetting,
    complete_piece,
    count_pieces,
    estimate,
    gemm_settings,
    gemm_tiles,
    halve,
    multiply_tile,
    split_buffers,
    tile_at,
)
from ._launch import INTERPRETER, CompileCase, Device, TuneCase, choose, device_of


@triton.jit
def _pick(of_query, of_key, of_value, part):
    """Part 0 is the query, 1 the key, 2 the value."""
    if part == 0:
        picked = of_query
    elif part == 1:
        picked = of_key
    else:
        picked = of_value
    return picked


@triton.jit
def _columns(lane, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """The column of the weight at each lane: heads of E columns on BLOCK_E lanes each."""
    return lane // BLOCK_E * E + lane % BLOCK_E


@triton.jit
def _normalise_heads(
    x, weight_ptr, bias_ptr, eps, E: tl.constexpr, BLOCK_E: tl.constexpr, NORM: tl.constexpr
):
    """rms_norm or layer_norm of each head, in float32; x: [rows, heads * BLOCK_E]."""
    offs_e = tl.arange(0, BLOCK_E)
    mask_e = offs_e < E
    heads = tl.reshape(x, (x.shape[0], x.shape[1] // BLOCK_E, BLOCK_E))
    if NORM == "layer":
        heads -= tl.sum(tl.where(mask_e, heads, 0.0), axis=2)[:, :, None] / E
    variance = tl.sum(tl.where(mask_e, heads * heads, 0.0), axis=2) / E
    heads *= tl.rsqrt(variance + eps)[:, :, None]
    heads *= tl.load(weight_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        heads += tl.load(bias_ptr + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    return tl.reshape(heads, (x.shape[0], x.shape[1]))


@triton.jit
def _rotate_heads(x, cosine_rows, sine_rows, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Pairs (x[2i], x[2i + 1]) turned by the angle in column 2i of the row, in float32."""
    even, odd = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    offs_e = 2 * tl.arange(0, x.shape[1] // 2) % BLOCK_E
    mask_e = (offs_e < E)[None, :]
    cosine = tl.load(cosine_rows[:, None] + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    sine = tl.load(sine_rows[:, None] + offs_e, mask=mask_e, other=0.0).to(tl.float32)
    turned = tl.join(even * cosine - odd * sine, odd * cosine + even * sine)
    return tl.reshape(turned, (x.shape[0], x.shape[1]))


@triton.jit
def _store_heads(
    total, bias_ptrs, norm_ptrs, cosine_rows, sine_rows, out_rows, is_row, part, first_lane, eps,
    D_OUT: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """out_rows[m][c] = total[m, n] + bias[c], normalised and rotated; c is the lane's column."""
    if total.shape[1] > MAX_EPILOGUE_COLS // 2 and BLOCK_E == 1:
        left, right = halve(total)
        _store_heads(
            left, bias_ptrs, norm_ptrs, cosine_rows, sine_rows, out_rows, is_row, part,
            first_lane, eps, D_OUT, E, BLOCK_E, NORM,
        )  # fmt: skip
        _store_heads(
            right, bias_ptrs, norm_ptrs, cosine_rows, sine_rows, out_rows, is_row, part,
            first_lane + left.shape[1], eps, D_OUT, E, BLOCK_E, NORM,
        )  # fmt: skip
    else:
        lane = first_lane + tl.arange(0, total.shape[1])
        cols = _columns(lane, E, BLOCK_E)
        is_col = (lane % BLOCK_E < E) & (cols < D_OUT)
        if bias_ptrs is not None:
            bias = _pick(bias_ptrs[0], bias_ptrs[1], bias_ptrs[2], part) + cols
            total += tl.load(bias, mask=is_col, other=0.0).to(tl.float32)[None, :]
        if part < 2:
            if norm_ptrs is not None:
                weight_ptr = norm_ptrs[0] if part == 0 else norm_ptrs[1]
                bias_ptr = None
                if len(norm_ptrs) > 2:
                    bias_ptr = norm_ptrs[2] if part == 0 else norm_ptrs[3]
                total = _normalise_heads(total, weight_ptr, bias_ptr, eps, E, BLOCK_E, NORM)
            if cosine_rows is not None:
                total = _rotate_heads(total, cosine_rows, sine_rows, E, BLOCK_E)
        out_ptrs = out_rows[:, None] + cols[None, :]
        out = round_to(total, out_rows.dtype.element_ty)
        tl.store(out_ptrs, out, mask=is_row[:, None] & is_col[None, :])


@triton.jit(
    do_not_specialize=["B", "N", "S", "num_steps", "split_k", "stride_ib"],
    do_not_specialize_on_alignment=["indices_ptr"],
)
def _project_qkv_kernel(
    x_ptr, indices_ptr, weight_ptrs, bias_ptrs, norm_ptrs, cosine_ptr, sine_ptr,
    query_ptr, key_ptr, value_ptr, partials_ptr, counters_ptr,
    B, N, S, num_steps, split_k, eps,
    stride_xb, stride_ib, stride_tb, stride_kb, stride_vb,
    stride_xn: tl.constexpr, stride_w: tl.constexpr, stride_tn: tl.constexpr,
    stride_kn: tl.constexpr, stride_vn: tl.constexpr,
    D_IN: tl.constexpr, H: tl.constexpr, E: tl.constexpr, BLOCK_E: tl.constexpr,
    ALL_KEYS: tl.constexpr, NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """query[b, s], key[b, t], value[b, t] = x[b, s] @ weights.T + biases, with t = indices[b, s].

    With ALL_KEYS: query[b, s] from x[b, t]; key[b, n] and value[b, n] from x[b, n]. Query and key
    are normalised per head and rotated by the table's row t, or n.
    """
    D_OUT: tl.constexpr = H * E
    NUM_TILES_N: tl.constexpr = (H * BLOCK_E + BLOCK_N - 1) // BLOCK_N
    # the tiles of the queries, then those of the keys and values, which may have more rows
    num_query_tiles = tl.cdiv(B * S, BLOCK_M) * NUM_TILES_N
    position = tl.program_id(0)
    is_query = position < num_query_tiles
    per_sample = tl.where(is_query, S, N) if ALL_KEYS else S
    num_rows = B * per_sample
    tile_m, tile_n = tile_at(
        position - tl.where(is_query, 0, num_query_tiles),
        tl.cdiv(num_rows, BLOCK_M),
        tl.where(is_query, NUM_TILES_N, 2 * NUM_TILES_N),
        GROUP_M,
    )
    part = tl.where(is_query, 0, 1 + tile_n // NUM_TILES_N)
    first_lane = tile_n % NUM_TILES_N * BLOCK_N

    # a row that does not exist or is empty reads one that does: no mask in the loop
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.minimum(rows, num_rows - 1)
    batch = (row // per_sample).to(tl.int64)
    slot = (row % per_sample).to(tl.int64)
    token = slot
    if indices_ptr is not None:
        slots = indices_ptr + batch * stride_ib + slot
        # compared, since Triton 3.9's interpreter makes numbers of a flag that becomes a block
        is_read = tl.broadcast_to(is_query | (not ALL_KEYS), [BLOCK_M]) != 0
        token = tl.load(slots, mask=is_read, other=-1)
        if ALL_KEYS:
            token = tl.where(is_query, token, slot)
    is_live = (token >= 0) & (token < N)
    token = tl.where(is_live, token.to(tl.int64), 0)
    if ALL_KEYS:
        x_rows = x_ptr + batch * stride_xb + token * stride_xn
    else:
        x_rows = x_ptr + row.to(tl.int64) * stride_xn

    cols = _columns(first_lane + tl.arange(0, BLOCK_N), E, BLOCK_E)
    weight_ptr = _pick(weight_ptrs[0], weight_ptrs[1], weight_ptrs[2], part)
    weight_rows = weight_ptr + tl.minimum(cols, D_OUT - 1).to(tl.int64) * stride_w
    part_of_k, is_last = multiply_tile(
        None, x_rows, weight_rows, partials_ptr, counters_ptr,
        num_steps, split_k, 0, D_IN, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if is_last:
        # offsets are chosen, not pointers: behind a branch the compiler forgets their alignment
        out_rows = _pick(query_ptr, key_ptr, value_ptr, part) + tl.where(
            is_query,
            row.to(tl.int64) * D_OUT,
            batch * tl.where(part == 1, stride_kb, stride_vb)
            + token * tl.where(part == 1, stride_kn, stride_vn),
        )
        cosine_rows = None
        sine_rows = None
        if cosine_ptr is not None:
            cosine_rows = cosine_ptr + batch * stride_tb + token * stride_tn
            sine_rows = sine_ptr + batch * stride_tb + token * stride_tn
        # an empty slot has a query, which attention reads, and no key
        is_row = (rows < num_rows) & ((is_live | is_query) != 0)
        PIECES: tl.constexpr = count_pieces(partials_ptr is not None, BLOCK_N, BLOCK_E)
        for piece in tl.static_range(PIECES):
            total = complete_piece(
                part_of_k, partials_ptr, split_k, piece, PIECES, BLOCK_M, BLOCK_N
            )
            if ALL_KEYS:
                total = tl.where(is_live[:, None], total, 0.0)
            _store_heads(
                total, bias_ptrs, norm_ptrs, cosine_rows, sine_rows, out_rows, is_row,
                part, first_lane + piece * total.shape[1], eps, D_OUT, E, BLOCK_E, NORM,
            )  # fmt: skip


def project_qkv_(
    key_cache: Tensor,
    value_cache: Tensor,
    x: Tensor,
    indices: Tensor | None,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor] | None,
    norm: QkNorm | None,
    rotary: tuple[Tensor, Tensor] | None,
    all_keys: bool,
) -> Tensor:
    """Launch ``_project_qkv_kernel``."""
    B, N, H, E = key_cache.shape
    D_in = x.shape[2]
    S = N if indices is None else indices.shape[1]
    query = x.new_empty(B, S, H, E)
    num_keys = N if all_keys else S
    if B * num_keys * H * E == 0:
        return query
    if norm is None and rotary is None:
        # nothing looks at a head as a whole: as good as heads of one column
        H, E = H * E, 1
    block_e = triton.next_power_of_2(E)
    device = device_of(x.device)
    num_rows, lanes = B * num_keys, H * block_e
    parts = 2 if all_keys else 3
    heuristic = _heuristic(device, x.itemsize, num_rows, parts * lanes, D_in, block_e)
    problem = {"M": num_rows, "O": lanes, "K": D_in, "E": block_e, "bits": 8 * x.itemsize}
    candidates = partial(_settings, device, x.itemsize, parts * lanes, D_in, block_e)
    setting = choose("project_qkv_", device, problem, heuristic, candidates)
    num_tiles = setting.num_tiles(B * S, lanes) + 2 * setting.num_tiles(num_rows, lanes)
    num_steps = ceil(D_in / setting.block_k)
    num_splits = setting.num_splits(num_steps)
    partials, counters = split_buffers(setting, num_splits, num_tiles, x.device)
    if not all_keys:
        # a stride that depends on S could make the compiler run again: packed rows need none
        x = x.reshape(1, B * S, D_in)
    norm_tensors = None
    if norm is not None:
        weights, biases = (norm.query_weight, norm.key_weight), (norm.query_bias, norm.key_bias)
        norm_tensors = weights if norm.query_bias is None else weights + biases
    cosine, sine = (None, None) if rotary is None else rotary
    _project_qkv_kernel[num_tiles, num_splits](
        x, indices,
        tuple(weight), None if bias is None else tuple(bias), norm_tensors, cosine, sine,
        query, key_cache, value_cache, partials, counters,
        B, N, S, num_steps, num_splits, 0.0 if norm is None else norm.eps,
        x.stride(0) if all_keys else 0, 0 if indices is None else indices.stride(0),
        0 if cosine is None or cosine.dim() == 2 else cosine.stride(0),
        key_cache.stride(0), value_cache.stride(0),
        x.stride(1), weight[0].stride(0), 0 if cosine is None else cosine.stride(-2),
        key_cache.stride(1), value_cache.stride(1),
        D_IN=D_in, H=H, E=E, BLOCK_E=block_e,
        ALL_KEYS=all_keys, NORM="none" if norm is None else norm.kind,
        **setting.constants(), num_warps=setting.num_warps, num_stages=setting.num_stages,
    )  # fmt: skip
    return query


@lru_cache(maxsize=4096)
def _heuristic(
    device: Device, itemsize: int, num_rows: int, out_features: int, in_features: int, block_e: int
) -> GemmSetting:
    """The setting with the least estimated time for this problem."""

    def time(setting: GemmSetting) -> float:
        problem = (num_rows, out_features, in_features)
        return estimate(setting, setting.split_k, device, itemsize, *problem)

    return min(_settings(device, itemsize, out_features, in_features, block_e), key=time)


def _settings(
    device: Device, itemsize: int, out_features: int, in_features: int, block_e: int
) -> list[GemmSetting]:
    """Those whose tiles hold heads as a whole; else one tile, as wide as a head and not as high.

    The widest tiles leave too few registers to normalise and rotate in.
    """
    settings = gemm_settings(device, itemsize, out_features, in_features)
    if block_e == 1:
        return settings
    widest = MAX_EPILOGUE_COLS.value
    fitting = [s for s in settings if s.block_n % block_e == 0 and s.block_n <= widest]
    narrowest = gemm_tiles(device.arch, itemsize)[-1]
    low = replace(narrowest, block_m=32, block_n=block_e, num_warps=8, num_stages=2)
    return fitting or [GemmSetting(**vars(low))]


# many steps of k, so that the loop stays one
_COMPILED_D_IN = 3072
# norm, rotation, heads and their dim, all keys, dtype: DiT-XL's projection, FLUX's, one with every
# feature on heads of 96 columns, and the heaviest in the other dtypes
_COMPILED_VARIANTS = (
    ("none", False, 16, 72, False, "bf16"),
    ("rms", True, 24, 128, False, "bf16"),
    ("layer", True, 24, 96, True, "bf16"),
    ("layer", True, 24, 96, True, "fp16"),
    ("layer", True, 24, 96, True, "fp32"),
)


def compile_cases(device: Device) -> Iterator[CompileCase]:
    """Every setting that fits the heads of each variant; 2 stands for every number of splits."""
    strides = ("stride_xb", "stride_tb", "stride_kb", "stride_vb")
    for norm, is_rotated, H, E, all_keys, dtype in _COMPILED_VARIANTS:
        if dtype == "fp16" and device.arch != 90:
            continue
        # as in the launcher
        heads, width = (H, E) if is_rotated else (H * E, 1)
        block_e = triton.next_power_of_2(width)
        itemsize = 4 if dtype == "fp32" else 2
        table = "fp32" if is_rotated else None
        for setting in _settings(device, itemsize, heads * block_e, _COMPILED_D_IN, block_e):
            if setting.split_k > (2 if dtype == "bf16" else 1):
                continue
            part = "fp32" if setting.split_k > 1 else None
            types: dict[str, str | None] = {
                **dict.fromkeys(("x_ptr", "query_ptr", "key_ptr", "value_ptr"), dtype),
                "indices_ptr": "i32",
                "cosine_ptr": table,
                "sine_ptr": table,
                "partials_ptr": part,
                "counters_ptr": part and "i32",
            }
            signature: dict[str, str | tuple[str, ...]] = {
                name: f"*{element}" for name, element in types.items() if element is not None
            }
            signature |= dict.fromkeys(("weight_ptrs", "bias_ptrs"), (f"*{dtype}",) * 3)
            if norm != "none":
                signature["norm_ptrs"] = (f"*{dtype}",) * (4 if norm == "layer" else 2)
            pointers = frozenset(signature)
            signature |= dict.fromkeys(("B", "N", "S", "num_steps", "split_k", "stride_ib"), "i32")
            signature |= dict.fromkeys(strides, "i32")
            yield CompileCase(
                kernel=_project_qkv_kernel,
                variant=f"{norm} {H}x{E} {dtype}" + " rotary" * is_rotated + " all keys" * all_keys,
                setting=setting,
                signature=signature | {"eps": "fp32"},
                constexprs=dict.fromkeys((types.keys() | {"norm_ptrs"}) - pointers)
                | dict.fromkeys(("stride_xn", "stride_w"), _COMPILED_D_IN)
                | dict.fromkeys(("stride_kn", "stride_vn"), H * E)
                | {"stride_tn": E, "D_IN": _COMPILED_D_IN}
                | {"H": heads, "E": width, "BLOCK_E": block_e, "ALL_KEYS": all_keys, "NORM": norm}
                | setting.constants(),
                aligned=frozenset({*pointers, *strides} - {"indices_ptr"}),
                num_warps=setting.num_warps,
                num_stages=setting.num_stages,
                is_gemm=dtype != "fp32",
            )


def tune_cases(device: Device) -> Iterator[TuneCase]:
    """DiT-XL's projection, of one image and of 16, and FLUX's: of few tokens, and of all keys."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16
    problems = [(256, 16, 72, False), (4096, 16, 72, False), (4096, 24, 128, True)]
    for N, H, E, is_normed in [(16, 2, 16, True)] if device == INTERPRETER else problems:
        D = H * E
        keys, values = torch.empty(2, 1, N, H, E, dtype=dtype, device=where)
        x = torch.randn(1, N, D, dtype=dtype, device=where)
        weight = torch.randn(3, D, D, dtype=dtype, device=where).unbind()
        norm = QkNorm(*torch.ones(2, E, dtype=dtype, device=where)) if is_normed else None
        angle = torch.randn(N, E, device=where)
        rotary = (angle.cos(), angle.sin()) if is_normed else None
        block_e = triton.next_power_of_2(E) if is_normed else 1
        candidates = _settings(device, dtype.itemsize, D, D, block_e)
        for S, all_keys in ((N // 10, False), (N // 2, False), (N // 10, True)):
            indices = torch.arange(S, dtype=torch.int32, device=where)[None]
            rows = x if all_keys else x[:, :S]
            yield TuneCase(
                "project_qkv_",
                f"S={S} H={H} E={E} bf16" + f" of {N}" * all_keys,
                candidates,
                partial(
                    project_qkv_, keys, values, rows, indices, weight, None, norm, rotary, all_keys
                ),
            )
