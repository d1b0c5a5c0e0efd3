"""The MLP of the selected tokens: in three launches, or in one whose tiles wait for each other.

Three launches: the row pass into packed rows, fc1 with its activation, fc2 with its scatter. One
launch: the same three as loops of a persistent kernel, in which a tile starts as soon as the rows
that it reads are complete, so that the tail of fc1 overlaps the head of fc2. Packed rows and
activations pass through memory either way, and with few rows stay in the L2.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import RowNorm
from ._counters import zeroed_counters
from ._device import INTERPRETED, round_to
from ._gemm import (
    GemmTile,
    estimate,
    gemm_tiles,
    multiply_rows,
    store_activated,
    store_scattered,
    tile_at,
    weight_rows_at,
)
from ._launch import INTERPRETER, CompileCase, Device, TuneCase, choose, device_of
from .linear import linear, linear_scatter_
from .modulate import gather_modulate


@dataclass(frozen=True)
class MlpSetting(GemmTile):
    """One persistent launch with this tile in both GEMMs, or three with settings of their own.

    ``programs_per_sm`` programs must fit a multiprocessor at the same time.
    """

    is_persistent: bool = False
    programs_per_sm: int = 1


@triton.jit
def _wait_until(counter_ptr, count):
    """Return once the counter has reached ``count``. Writes before it are visible then."""
    while tl.atomic_add(counter_ptr, 0, sem="acquire") < count:
        pass


@triton.jit
def _signal(counter_ptr):
    """Count one more piece as written by this program."""
    # every thread has written before the one atomic that says so
    tl.debug_barrier()
    tl.atomic_add(counter_ptr, 1, sem="release")


@triton.jit(
    do_not_specialize=["M", "N", "S", "num_steps1", "num_steps2", "stride_ib"],
    do_not_specialize_on_alignment=["indices_ptr"],
)
def _mlp_kernel(
    x_ptr, indices_ptr, shift_ptr, scale_ptr,
    fc1_weight_ptr, fc1_bias_ptr, fc2_weight_ptr, fc2_bias_ptr,
    rows_ptr, hidden_ptr, cache_ptr, counters_ptr,
    M, N, S, num_steps1, num_steps2, eps,
    stride_xb, stride_xn, stride_ib, stride_hb, stride_sb, stride_cb, stride_cn: tl.constexpr,
    stride_w1: tl.constexpr, stride_w2: tl.constexpr,
    D: tl.constexpr, D_HIDDEN: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """``rows[m] = layer_norm(x[b, indices[b, s]]) * (1 + scale[b]) + shift[b]``, with ``m = b * S +
    s``. Then ``hidden = activation(rows @ fc1_weight.T + fc1_bias)`` and ``cache[b, indices[b, s]]
    = hidden[m] @ fc2_weight.T + fc2_bias``. An empty slot writes nothing.

    All programs are resident, and each does its share of the three loops in order, so whatever a
    tile waits for is being made. ``counters``: programs that are through; for every row block, the
    pieces of it in ``rows``, then the tiles of it in ``hidden``. All are zero at entry and at exit.
    """
    program = tl.program_id(0)
    num_programs = tl.num_programs(0)
    num_blocks = tl.cdiv(M, BLOCK_M)
    rows_counters = counters_ptr + 1
    hidden_counters = rows_counters + num_blocks

    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    for piece in range(program, tl.cdiv(M, ROWS), num_programs):
        rows = piece * ROWS + tl.arange(0, ROWS)
        batch = (rows // S).to(tl.int64)
        slots = indices_ptr + batch * stride_ib + rows % S
        token = tl.load(slots, mask=rows < M, other=-1).to(tl.int64)
        is_live = ((token >= 0) & (token < N))[:, None]
        x_rows = x_ptr + batch * stride_xb + token * stride_xn
        x = tl.load(x_rows[:, None] + offs_d, mask=is_live & mask_d, other=0.0).to(tl.float32)
        mean = tl.sum(x, axis=1) / D
        centred = tl.where(mask_d, x - mean[:, None], 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / D + eps)
        mask = (rows < M)[:, None] & mask_d
        shift_ptrs = (shift_ptr + batch * stride_hb)[:, None] + offs_d
        scale_ptrs = (scale_ptr + batch * stride_sb)[:, None] + offs_d
        shift = tl.load(shift_ptrs, mask=mask, other=0.0).to(tl.float32)
        scale = tl.load(scale_ptrs, mask=mask, other=0.0).to(tl.float32)
        y = centred * rstd[:, None] * (1.0 + scale) + shift
        # the row of an empty slot is multiplied like any other, and then not written
        y = tl.where(is_live, y, 0.0)
        out_ptrs = (rows_ptr + rows.to(tl.int64) * D)[:, None] + offs_d
        tl.store(out_ptrs, round_to(y, rows_ptr.dtype.element_ty), mask=mask)
        _signal(rows_counters + piece * ROWS // BLOCK_M)

    num_tiles_n = tl.cdiv(D_HIDDEN, BLOCK_N)
    for tile in range(program, num_blocks * num_tiles_n, num_programs):
        tile_m, tile_n = tile_at(tile, num_blocks, num_tiles_n, GROUP_M)
        first_row = tile_m * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        _wait_until(rows_counters + tile_m, tl.cdiv(tl.minimum(BLOCK_M, M - first_row), ROWS))
        total = multiply_rows(
            rows_ptr + tl.minimum(rows, M - 1).to(tl.int64) * D,
            weight_rows_at(fc1_weight_ptr, tile_n * BLOCK_N, stride_w1, D_HIDDEN, BLOCK_N),
            num_steps1, D, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_activated(
            total, fc1_bias_ptr, None, hidden_ptr, rows, tile_n * BLOCK_N, M, D_HIDDEN, ACTIVATION
        )
        _signal(hidden_counters + tile_m)

    num_hidden_tiles_n = num_tiles_n
    num_tiles_n = tl.cdiv(D, BLOCK_N)
    for tile in range(program, num_blocks * num_tiles_n, num_programs):
        tile_m, tile_n = tile_at(tile, num_blocks, num_tiles_n, GROUP_M)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        _wait_until(hidden_counters + tile_m, num_hidden_tiles_n)
        total = multiply_rows(
            hidden_ptr + tl.minimum(rows, M - 1).to(tl.int64) * D_HIDDEN,
            weight_rows_at(fc2_weight_ptr, tile_n * BLOCK_N, stride_w2, D, BLOCK_N),
            num_steps2, D_HIDDEN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        store_scattered(
            total, fc2_bias_ptr, None, indices_ptr, cache_ptr, rows, tile_n * BLOCK_N,
            M, N, S, 0, stride_ib, stride_cb, stride_cn, D, False,
        )  # fmt: skip

    # nobody waits any more once everyone is through: leave the counters as they were found
    if tl.atomic_add(counters_ptr, 1, sem="acq_rel") == num_programs - 1:
        num_counters = 1 + 2 * num_blocks
        for start in range(0, num_counters, 1024):
            offs = start + tl.arange(0, 1024)
            tl.store(counters_ptr + offs, 0, mask=offs < num_counters)


def mlp_(
    cache: Tensor,
    hidden_states: Tensor,
    indices: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    fc1_weight: Tensor,
    fc1_bias: Tensor | None,
    fc2_weight: Tensor,
    fc2_bias: Tensor | None,
    activation: str,
    norm: RowNorm,
    vector_index: Tensor | None = None,
    gate_weight: Tensor | None = None,
    gate_bias: Tensor | None = None,
) -> None:
    """Launch ``_mlp_kernel``, or the kernels of the three steps, which alone know all variants."""
    B, N, D = hidden_states.shape
    S = indices.shape[1]
    M, D_hidden = B * S, fc1_weight.shape[0]
    if M * D == 0:
        return
    device = device_of(cache.device)
    heuristic = _heuristic(device, cache.itemsize, M, D, D_hidden)
    problem = {"M": M, "D": D, "H": D_hidden, "bits": 8 * cache.itemsize}
    candidates = partial(_persistent_settings, device, cache.itemsize)
    setting = choose("mlp_", device, problem, heuristic, candidates)
    is_plain_norm = norm.kind == "layer" and norm.weight is None and norm.bias is None
    vectors = [one for one in (shift, scale) if one is not None and one.dim() == 2]
    is_plain = is_plain_norm and len(vectors) == 2 and gate_weight is None
    if not setting.is_persistent or not is_plain:
        rows = gather_modulate(hidden_states, indices, shift, scale, norm, vector_index)
        factor = None
        if gate_weight is not None:
            factor = linear(rows, gate_weight, gate_bias, activation, None)
            activation = "none"
        rows = linear(rows, fc1_weight, fc1_bias, activation, None, factor)
        linear_scatter_(cache, indices, rows, fc2_weight, fc2_bias, None, False)
        return
    num_blocks = ceil(M / setting.block_m)
    block_d, num_rows = _row_piece(D, setting.block_m)
    # the programs of the interpreter run one after the other: a second one would wait for ever
    num_programs = 1 if INTERPRETED.value else device.num_sms * setting.programs_per_sm
    _mlp_kernel[(num_programs,)](
        hidden_states, indices, shift, scale,
        fc1_weight, fc1_bias, fc2_weight, fc2_bias,
        cache.new_empty(M, D), cache.new_empty(M, D_hidden), cache,
        zeroed_counters(cache.device, 1 + 2 * num_blocks),
        M, N, S, ceil(D / setting.block_k), ceil(D_hidden / setting.block_k), norm.eps,
        hidden_states.stride(0), hidden_states.stride(1), indices.stride(0),
        vectors[0].stride(0), vectors[1].stride(0),
        cache.stride(0), cache.stride(1), fc1_weight.stride(0), fc2_weight.stride(0),
        D=D, D_HIDDEN=D_hidden, ACTIVATION=activation,
        BLOCK_D=block_d, ROWS=num_rows,
        **setting.constants(), num_warps=setting.num_warps, num_stages=setting.num_stages,
        # all programs start together, or the launch fails: nobody waits for one that cannot start
        launch_cooperative_grid=True,
    )  # fmt: skip


def _row_piece(width: int, block_m: int) -> tuple[int, int]:
    """Lanes along a row, and how many rows are normalised at a time; these divide a row block."""
    block_d = 1 << max(width - 1, 0).bit_length()
    return block_d, min(max(4096 // block_d, 1), block_m)


@lru_cache(maxsize=4096)
def _heuristic(device: Device, itemsize: int, M: int, D: int, D_hidden: int) -> MlpSetting:
    """Three launches: they may split tiles where rows are few. The tile is for an override."""

    def time(setting: MlpSetting) -> float:
        fc1 = estimate(setting, 1, device, itemsize, M, D_hidden, D)
        return fc1 + estimate(setting, 1, device, itemsize, M, D, D_hidden)

    best = min(_persistent_settings(device, itemsize), key=time)
    return replace(best, is_persistent=False)


def _persistent_settings(device: Device, itemsize: int) -> list[MlpSetting]:
    """Every tile; two programs of four warps fit everywhere, and fill the cores better than one.

    Of the widest tile, the shared memory holds one.
    """
    return [
        MlpSetting(
            **vars(tile),
            is_persistent=True,
            programs_per_sm=2 if tile.num_warps == 4 and tile.block_n <= 128 else 1,
        )
        for tile in gemm_tiles(device.arch, itemsize)
    ]


def compile_cases(device: Device) -> Iterator[CompileCase]:
    """The persistent kernel with every tile; the heaviest activation and other dtypes, once."""
    # columns that no wide tile divides
    D = 3200
    D_hidden = 4 * D
    names = (
        "x_ptr", "shift_ptr", "scale_ptr", "fc1_weight_ptr", "fc1_bias_ptr", "fc2_weight_ptr",
        "fc2_bias_ptr", "rows_ptr", "hidden_ptr", "cache_ptr",
    )  # fmt: skip
    strides = ("stride_xb", "stride_xn", "stride_hb", "stride_sb", "stride_cb")
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4))[: 3 if device.arch == 90 else 1]:
        settings = _persistent_settings(device, itemsize)
        usual = product(settings if dtype == "bf16" else (), ("gelu_tanh",))
        for setting, activation in ((settings[0], "gelu"), *usual):
            pointers = dict.fromkeys(names, f"*{dtype}")
            pointers |= {"indices_ptr": "*i32", "counters_ptr": "*i32"}
            block_d, num_rows = _row_piece(D, setting.block_m)
            yield CompileCase(
                kernel=_mlp_kernel,
                variant=f"{activation} {dtype}",
                setting=setting,
                signature=pointers
                | dict.fromkeys(("M", "N", "S", "num_steps1", "num_steps2", "stride_ib"), "i32")
                | dict.fromkeys(strides, "i32")
                | {"eps": "fp32"},
                constexprs={
                    "stride_cn": D,
                    "stride_w1": D,
                    "stride_w2": D_hidden,
                    "D": D,
                    "D_HIDDEN": D_hidden,
                    "ACTIVATION": activation,
                    "BLOCK_D": block_d,
                    "ROWS": num_rows,
                }
                | setting.constants(),
                aligned=frozenset({*pointers, *strides} - {"indices_ptr"}),
                num_warps=setting.num_warps,
                num_stages=setting.num_stages,
                is_gemm=dtype != "fp32",
            )


def tune_cases(device: Device) -> Iterator[TuneCase]:
    """The MLP of DiT-XL and of FLUX at usual numbers of rows, in both ways."""
    where = "cuda" if torch.cuda.is_available() else "cpu"
    problems = [(1152, S) for S in (688, 86, 416, 2048)]
    problems += [(3072, S) for S in (614, 191, 460, 2304)]
    for D, S in [(32, 8)] if device == INTERPRETER else problems:
        cache, x = torch.randn(2, 1, S, D, dtype=torch.bfloat16, device=where)
        shift, scale = torch.randn(2, 1, D, dtype=x.dtype, device=where)
        fc1, fc2 = torch.randn(2, 4 * D, D, dtype=x.dtype, device=where) / D**0.5
        indices = torch.arange(S, dtype=torch.int32, device=where)[None]
        weights = (fc1, None, fc2.reshape(D, 4 * D), None)
        yield TuneCase(
            "mlp_",
            f"M={S} D={D} bf16",
            _persistent_settings(device, x.itemsize),
            partial(mlp_, cache, x, indices, shift, scale, *weights, "gelu_tanh", RowNorm()),
        )
