"""Tiles of a GEMM on packed rows: their launch settings, and the pieces that kernels make them of.

The product is accumulated in float32, bias, activation, gate and old value are applied there, and
the result is rounded once. Float32 inputs are multiplied as such (PyTorch's default), so on the
ordinary cores instead of the tensor cores: that way is for exactness, not for speed.
"""

import json
from dataclasses import dataclass
from functools import cache, lru_cache
from math import ceil
from pathlib import Path

import torch
import triton
import triton.language as tl

from ._counters import zeroed_counters
from ._device import INTERPRETED, round_to
from ._launch import Device

# a wider tile is finished in halves: the temporaries of a whole one do not fit in the registers
MAX_EPILOGUE_COLS = tl.constexpr(128)
_TILES = Path(__file__).parent / "gemm_tiles.json"
SPLITS = (2, 3, 4, 6, 8)


@dataclass(frozen=True)
class GemmTile:
    """``block_m`` rows by ``block_n`` columns a program, ``block_k`` deep a step.

    Programs of ``group_m`` row blocks follow one another.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8

    def num_tiles(self, num_rows: int, out_features: int) -> int:
        """Count the tiles that cover the output."""
        return ceil(num_rows / self.block_m) * ceil(out_features / self.block_n)

    def constants(self) -> dict[str, int]:
        """The constexpr blocks of the kernel."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "GROUP_M": self.group_m,
        }


@dataclass(frozen=True)
class GemmSetting(GemmTile):
    """One tile a program, or a ``split_k``-th of the depth of one.

    Or, ``in_library``, the product of the vendor's library wherever it does the rest as well.
    """

    split_k: int = 1
    in_library: bool = False

    def num_splits(self, num_steps: int) -> int:
        """The programs that share a tile of that many steps: every one must have a step."""
        return min(self.split_k, num_steps)


# multiply-adds of 16-bit operands that one multiprocessor does in a clock, by architecture
_PRODUCTS_PER_CLOCK = {80: 1024, 90: 2048, 100: 4096}
# bytes that reach one multiprocessor from the L2 in a clock: its share when all of them read, and
# its own limit. Assumed, not measured
_L2_BYTES, _PORT_BYTES = 34, 64
# the share of the tensor cores' rate that a tile of that size can keep up by itself (assumed)
_RATES = {128 * 256: 1.0, 64 * 256: 0.9, 128 * 128: 0.9, 64 * 128: 0.75, 64 * 64: 0.55}


@cache
def gemm_tiles(arch: int, itemsize: int) -> tuple[GemmTile, ...]:
    """The tiles that fit an architecture's shared memory and registers, largest first.

    From the shipped ``gemm_tiles.json``. sm_80 holds one stage less than ``num_stages``,
    sm_90 all of them; sm_86, 89 and 120, which are the others, have 99 KB.
    """
    shipped = json.loads(_TILES.read_text())
    chosen = shipped["float32"] if itemsize == 4 else shipped.get(f"sm_{arch}", shipped["other"])
    return tuple(GemmTile(**fields) for fields in chosen)


def gemm_settings(
    device: Device, itemsize: int, out_features: int, in_features: int
) -> list[GemmSetting]:
    """Every setting worth trying: all tiles, whole or split while each part keeps some depth.

    The wide tile is split on Hopper alone: elsewhere its parts do not fit in the registers.
    """
    tiles = gemm_tiles(device.arch, itemsize)
    if in_features % 8 or out_features % 8:
        # rows out of step with 16 bytes are copied element by element, which needs the registers
        tiles = tiles[-1:]
    splits = [split for split in SPLITS if in_features // split >= 256]
    return [
        GemmSetting(**vars(tile), split_k=split_k)
        for tile in tiles
        for split_k in (1, *splits)
        if split_k == 1 or tile.block_n <= MAX_EPILOGUE_COLS.value or device.arch == 90
    ]


@lru_cache(maxsize=4096)
def gemm_heuristic(
    device: Device, itemsize: int, num_rows: int, out_features: int, in_features: int
) -> GemmSetting:
    """The setting with the least estimated time for this problem."""

    def time(setting: GemmSetting) -> float:
        problem = (num_rows, out_features, in_features)
        return estimate(setting, setting.split_k, device, itemsize, *problem)

    return min(gemm_settings(device, itemsize, out_features, in_features), key=time)


def estimate(
    tile: GemmTile,
    split_k: int,
    device: Device,
    itemsize: int,
    num_rows: int,
    out_features: int,
    in_features: int,
) -> float:
    """The clocks that a product takes: the longer of its multiply-adds and of its copies.

    Programs run in whole waves, each as deep as it is. All of them read their rows and weights
    from the L2, which serves all multiprocessors together and each by its port. Start and end of a
    program cost as much as some 200 steps of k. So does writing or reading one part of a split
    tile. Arithmetic, not a measurement.
    """
    area = tile.block_m * tile.block_n
    programs = tile.num_tiles(num_rows, out_features) * split_k
    waves = ceil(programs / device.num_sms)
    depth = in_features / split_k + 200
    if split_k > 1:
        depth += 200 * split_k
    products = 128 if itemsize == 4 else _PRODUCTS_PER_CLOCK.get(device.arch, 512)
    copied = (tile.block_m + tile.block_n) * itemsize
    return depth * max(
        waves * area / (products * _RATES[area]),
        programs * copied / (_L2_BYTES * device.num_sms),
        waves * copied / _PORT_BYTES,
    )


def split_buffers(
    setting: GemmSetting, num_splits: int, num_tiles: int, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Make the buffers of split tiles, for partial sums and counters; None for whole tiles."""
    if num_splits == 1:
        return None, None
    size = num_splits * num_tiles * setting.block_m * setting.block_n
    partials = torch.empty(size, dtype=torch.float32, device=device)
    return partials, zeroed_counters(device, num_tiles)


@triton.jit
def tile_at(position, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """The tile at this place in an order in which neighbours share rows and weights in the L2."""
    group = position // (GROUP_M * num_tiles_n)
    first_m = group * GROUP_M
    rows = tl.minimum(num_tiles_m - first_m, GROUP_M)
    within = position - first_m * num_tiles_n
    return first_m + within % rows, within // rows


@triton.jit
def weight_rows_at(
    weight_ptr, first_col, stride_w: tl.constexpr, D_OUT: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Pointers to the rows of a weight that make BLOCK_N columns of the product."""
    cols = first_col + tl.arange(0, BLOCK_N)
    if D_OUT % BLOCK_N != 0:
        # columns past the end repeat the last one, and are never stored: cheaper than a mask
        cols = tl.minimum(cols, D_OUT - 1)
    return weight_ptr + cols.to(tl.int64) * stride_w


@triton.jit
def add_products(total, x_rows, weight_rows, begin, end, D_IN: tl.constexpr, BLOCK_K: tl.constexpr):
    """total + sum_k x_rows[m][k] * weight_rows[n][k] over the steps of BLOCK_K columns in
    [begin, end); rows are pointers.
    """
    offs_k = tl.arange(0, BLOCK_K)
    for k in range(begin * BLOCK_K, end * BLOCK_K, BLOCK_K):
        x_ptrs = x_rows[:, None] + (k + offs_k)[None, :]
        weight_ptrs = weight_rows[None, :] + (k + offs_k)[:, None]
        if D_IN % BLOCK_K == 0:
            x = tl.load(x_ptrs)  # [BLOCK_M, BLOCK_K]
            weight = tl.load(weight_ptrs)  # [BLOCK_K, BLOCK_N]
        else:
            x = tl.load(x_ptrs, mask=(k + offs_k)[None, :] < D_IN, other=0.0)
            weight = tl.load(weight_ptrs, mask=(k + offs_k)[:, None] < D_IN, other=0.0)
        if INTERPRETED:
            # the interpreter would multiply the bit patterns of bfloat16
            x = x.to(tl.float32)
            weight = weight.to(tl.float32)
        total = tl.dot(x, weight, total, input_precision="ieee")
    return total


@triton.jit
def prefetch_rows(rows):
    """Ask the L2 for the first three 128-byte lines of each row: the first steps of a GEMM."""
    if not INTERPRETED:
        for line in tl.static_range(3):
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
                "=r,l",
                [rows + line * (128 * 8 // rows.dtype.element_ty.primitive_bitwidth)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def multiply_rows(
    x_rows, weight_rows, num_steps,
    D_IN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """sum_k x_rows[m][k] * weight_rows[n][k].

    ``num_steps`` of BLOCK_K columns make D_IN. The count comes at run time: the compiler would
    unroll a loop of a known one, to ten times the code.
    """
    tl.assume(num_steps * BLOCK_K > 0)
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    return add_products(total, x_rows, weight_rows, 0, num_steps, D_IN, BLOCK_K)


@triton.jit
def multiply_steps(
    feature_rows, x_rows, weight_rows, begin, end,
    D_FEATURES: tl.constexpr, D_IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The product over the steps in [begin, end) of rows that go on at x_rows after D_FEATURES
    columns at feature_rows; where that is None they begin at x_rows.
    """
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if feature_rows is None:
        # a loop that might not run makes the assembler serialise every wgmma
        tl.assume(begin * BLOCK_K < end * BLOCK_K)
    else:
        steps = tl.cdiv(D_FEATURES, BLOCK_K)
        total = add_products(
            total, feature_rows, weight_rows,
            tl.minimum(begin, steps), tl.minimum(end, steps),
            D_FEATURES, BLOCK_K,
        )  # fmt: skip
        weight_rows += D_FEATURES
        begin = tl.maximum(begin - steps, 0)
        end = tl.maximum(end - steps, 0)
    return add_products(total, x_rows, weight_rows, begin, end, D_IN, BLOCK_K)


@triton.jit
def multiply_tile(
    feature_rows, x_rows, weight_rows, partials_ptr, counters_ptr,
    num_steps, split_k,
    D_FEATURES: tl.constexpr, D_IN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """This program's part of the product, and whether it is the one to finish the tile.

    Without ``partials`` the part is all. With them the grid is (tiles, split_k), each program
    leaves its part in memory, and the one that arrives last finishes the tile, and clears the
    counter for the next launch. ``split_k`` is at most ``num_steps``.
    """
    if partials_ptr is None:
        part = multiply_steps(
            feature_rows, x_rows, weight_rows, 0, num_steps,
            D_FEATURES, D_IN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        is_last = True
    else:
        tile = tl.program_id(0)
        split = tl.program_id(1)
        part = multiply_steps(
            feature_rows, x_rows, weight_rows,
            split * num_steps // split_k, (split + 1) * num_steps // split_k,
            D_FEATURES, D_IN, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        place = (split * tl.num_programs(0) + tile).to(tl.int64) * BLOCK_M * BLOCK_N
        offsets = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        tl.store(partials_ptr + place + offsets, part)
        # every thread has written before the one atomic that says so
        tl.debug_barrier()
        is_last = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel") == split_k - 1
        if is_last:
            tl.store(counters_ptr + tile, 0)
    return part, is_last


@triton.constexpr_function
def count_pieces(is_split: bool, block_n: int, least: int = 1) -> int:
    """Return in how many pieces a tile is finished: a split one in pieces of few columns.

    A piece has at least ``least`` columns.
    """
    widest = max(MAX_EPILOGUE_COLS.value // 2, least)
    return block_n // widest if is_split and block_n > widest else 1


@triton.jit
def complete_piece(
    part, partials_ptr, split_k, PIECE: tl.constexpr, PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The columns of that piece of the tile; parts are added in the order of k, so that every run
    has the same bits.
    """
    if partials_ptr is None:
        total = part
    else:
        COLS: tl.constexpr = BLOCK_N // PIECES
        cols = PIECE * COLS + tl.arange(0, COLS)
        ptrs = partials_ptr + tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + cols[None, :]
        # its own part too: keeping that would cost half of the registers, and so a second program
        total = tl.zeros((BLOCK_M, COLS), dtype=tl.float32)
        for split in range(split_k):
            place = (split * tl.num_programs(0) + tl.program_id(0)).to(tl.int64)
            total += tl.load(ptrs + place * BLOCK_M * BLOCK_N)
    return total


@triton.jit
def halve(x):
    """Return the left and the right half of the columns; every thread keeps its elements."""
    return tl.split(tl.permute(tl.reshape(x, (x.shape[0], 2, x.shape[1] // 2)), (0, 2, 1)))


@triton.jit
def add_bias(x, bias_ptr, cols, D_OUT: tl.constexpr):
    """x[m, n] + bias[cols[n]], in float32; no bias: x."""
    if bias_ptr is not None:
        x += tl.load(bias_ptr + cols, mask=cols < D_OUT, other=0.0).to(tl.float32)[None, :]
    return x


@triton.jit
def _reciprocal(x):
    """1 / x for x at least 1, by the one instruction that approximates it to the last bit."""
    if INTERPRETED:
        x = 1.0 / x
    else:
        x = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return x


@triton.jit
def _sigmoid_of_bits(bits):
    """1 / (1 + 2**-bits); exp would multiply by log2(e) and care for subnormal numbers first."""
    if INTERPRETED:
        # NumPy would warn of an overflow
        bits = tl.maximum(bits, -126.0)
    return _reciprocal(1.0 + tl.exp2(-bits))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """The activation of that name, in float32."""
    if ACTIVATION == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # 0.5 * (1 + tanh(u)) = sigmoid(2 * u), with u = sqrt(2 / pi) * (x + 0.044715 * x**3);
        # the factors are 2 * sqrt(2 / pi) * log2(e), and that times 0.044715
        x = x * _sigmoid_of_bits(x * (2.302208198 + 0.10294324 * x * x))
    elif ACTIVATION == "silu":
        x = x * _sigmoid_of_bits(1.4426950408889634 * x)
    return x


@triton.jit
def store_activated(
    total, bias_ptr, factor_ptr, out_ptr, rows, first_col,
    M,
    D_OUT: tl.constexpr, ACTIVATION: tl.constexpr,
):  # fmt: skip
    """out[rows[m], c] = activation(total[m, n] + bias[c]) [* factor[rows[m], c]].

    Here c = first_col + n; out and factor are contiguous.
    """
    if total.shape[1] > MAX_EPILOGUE_COLS:
        left, right = halve(total)
        store_activated(left, bias_ptr, factor_ptr, out_ptr, rows, first_col, M, D_OUT, ACTIVATION)
        middle = first_col + left.shape[1]
        store_activated(right, bias_ptr, factor_ptr, out_ptr, rows, middle, M, D_OUT, ACTIVATION)
    else:
        cols = first_col + tl.arange(0, total.shape[1])
        total = activate(add_bias(total, bias_ptr, cols, D_OUT), ACTIVATION)
        places = rows.to(tl.int64)[:, None] * D_OUT + cols[None, :]
        out_ptrs = out_ptr + places
        mask = (rows < M)[:, None] & (cols < D_OUT)[None, :]
        if factor_ptr is not None:
            total *= tl.load(factor_ptr + places, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptrs, round_to(total, out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def store_scattered(
    total, bias_ptr, gate_ptr, indices_ptr, cache_ptr, rows, first_col,
    M, N, S,
    stride_gb, stride_ib, stride_cb, stride_cn: tl.constexpr,
    D_OUT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """cache[b, indices[b, s], c] = [old value +] [gate[b, c] *] (total[m, n] + bias[c]).

    Here b * S + s = rows[m] and c = first_col + n. An empty slot writes nothing.
    """
    # gates and old values need registers of their own
    WIDEST: tl.constexpr = MAX_EPILOGUE_COLS if gate_ptr is None else MAX_EPILOGUE_COLS // 2
    if total.shape[1] > WIDEST:
        left, right = halve(total)
        store_scattered(
            left, bias_ptr, gate_ptr, indices_ptr, cache_ptr, rows, first_col,
            M, N, S, stride_gb, stride_ib, stride_cb, stride_cn, D_OUT, RESIDUAL,
        )  # fmt: skip
        store_scattered(
            right, bias_ptr, gate_ptr, indices_ptr, cache_ptr, rows, first_col + left.shape[1],
            M, N, S, stride_gb, stride_ib, stride_cb, stride_cn, D_OUT, RESIDUAL,
        )  # fmt: skip
    else:
        cols = first_col + tl.arange(0, total.shape[1])
        batch = (rows // S).to(tl.int64)
        slots = indices_ptr + batch * stride_ib + rows % S
        token = tl.load(slots, mask=rows < M, other=-1)
        mask = ((token >= 0) & (token < N))[:, None] & (cols < D_OUT)[None, :]
        cache_rows = cache_ptr + batch * stride_cb + token.to(tl.int64) * stride_cn
        cache_ptrs = cache_rows[:, None] + cols[None, :]
        total = add_bias(total, bias_ptr, cols, D_OUT)
        if gate_ptr is not None:
            gate_ptrs = (gate_ptr + batch * stride_gb)[:, None] + cols[None, :]
            total *= tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
        if RESIDUAL:
            total += tl.load(cache_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(cache_ptrs, round_to(total, cache_ptr.dtype.element_ty), mask=mask)
