"""Choose the fresh tokens of all layers and samples, and of all steps of a cycle, in one launch.

One program per layer and sample mixes the scores, finds the exact threshold of the top by a binary
search over the bits of an order-preserving integer image, and compacts by a prefix sum in index
order: ascending, deterministic, ties to the lowest index, without a sort and without atomics.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ._launch import CompileCase, Device, choose, device_of

# below the image of every score
_LOWEST = tl.constexpr(-(2**31))


@dataclass(frozen=True)
class SelectSetting:
    """Keys are searched ``block`` at a time, up to that many from registers; the rest of the work
    goes ``chunk`` by ``chunk``.
    """

    block: int
    chunk: int
    num_warps: int

    @classmethod
    def for_tokens(cls, num_tokens: int) -> "SelectSetting":
        """All tokens at once up to 8192, in blocks of 4096 beyond; 8 or 16 tokens a thread."""
        block = 4096 if num_tokens > 8192 else max(triton.next_power_of_2(num_tokens), 128)
        return cls(block, min(block, 4096), num_warps=min(max(block // 256, 1), 16))

    @property
    def max_registers(self) -> int:
        """All that the warps may have: left alone, the assembler spills for more programs per
        multiprocessor, where there is but one per layer and sample.
        """
        return min(2048 // self.num_warps, 255)


@triton.jit
def _to_key(score):
    """An int32 that orders like the float32 score, with NaN as -inf and -0 as 0."""
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)
    bits = score.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _from_key(key):
    """The score of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _load_keys(keys_ptr, start, N, BLOCK: tl.constexpr):
    token = start + tl.arange(0, BLOCK)
    return tl.load(keys_ptr + token, mask=token < N, other=_LOWEST)


@triton.jit
def _load_known(scores_ptr, start, N, BLOCK: tl.constexpr):
    """Scores in float32, 0 for NaN and behind the last."""
    token = start + tl.arange(0, BLOCK)
    score = tl.load(scores_ptr + token, mask=token < N, other=0.0).to(tl.float32)
    return tl.where(score == score, score, 0.0)


@triton.jit
def _measure_norm(scores_ptr, N, BLOCK: tl.constexpr):
    """Return the factor and the divisor of scores: the L2 norm of those that are not NaN, at least
    1e-12. Where its square may go beyond float32, both are smaller by a power of two.
    """
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        largest = tl.maximum(largest, tl.abs(_load_known(scores_ptr, start, N, BLOCK)))
    factor = tl.where(tl.max(largest, axis=0) > 2.0**50, 2.0**-80, 1.0)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, N, BLOCK):
        score = _load_known(scores_ptr, start, N, BLOCK) * factor
        squares += score * score
    return factor, tl.maximum(tl.sqrt_rn(tl.sum(squares, axis=0)), 1e-12)


@triton.jit
def _raise_winners(keys_ptr, height, width, tile, factor, LANES: tl.constexpr):
    """Multiply the best score of every tile x tile square by the factor; ties: the lowest token."""
    squares_across = tl.cdiv(width, tile)
    num_squares = tl.cdiv(height, tile) * squares_across
    # one lane a square: every key is read once
    for start in range(0, num_squares, LANES):
        square = start + tl.arange(0, LANES)
        mask = square < num_squares
        top = square // squares_across * tile
        left = square % squares_across * tile
        winner = top * width + left
        best = tl.load(keys_ptr + winner, mask=mask, other=_LOWEST)
        for member in range(1, tile * tile):
            y = top + member // tile
            x = left + member % tile
            inside = mask & (y < height) & (x < width)
            key = tl.load(keys_ptr + y * width + x, mask=inside, other=_LOWEST)
            winner = tl.where(key > best, y * width + x, winner)
            best = tl.maximum(key, best)
        tl.store(keys_ptr + winner, _to_key(_from_key(best) * factor), mask=mask)


@triton.jit
def _count_from(bound, held_keys, keys_ptr, N, HOLDS_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """Count the keys that are at least ``bound``."""
    counts = tl.zeros([BLOCK], tl.int32)
    if HOLDS_KEYS:
        counts += (held_keys >= bound).to(tl.int32)
    else:
        for start in range(0, N, BLOCK):
            counts += (_load_keys(keys_ptr, start, N, BLOCK) >= bound).to(tl.int32)
    return tl.sum(counts, axis=0)


@triton.jit
def _find_threshold(wanted, held_keys, keys_ptr, N, HOLDS_KEYS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest bound that at least ``wanted`` keys reach, or one that exactly so many reach."""
    threshold = tl.full((), _LOWEST, tl.int32)
    reached = N
    bit = 31
    while (bit >= 0) & (reached != wanted):
        # the lowest int32 has the sign bit alone, so that flipping a bit is going up
        bound = threshold ^ (tl.full((), 1, tl.int32) << bit)
        count = _count_from(bound, held_keys, keys_ptr, N, HOLDS_KEYS, BLOCK)
        threshold = tl.where(count >= wanted, bound, threshold)
        reached = tl.where(count >= wanted, count, reached)
        bit -= 1
    return threshold


@triton.jit(
    do_not_specialize=["num_steps", "N", "max_fresh", "height", "width", "tile", "stride_fp"],
    # counts of another step: in a captured one, a kernel that is new could not be loaded
    do_not_specialize_on_alignment=["num_fresh_ptr"],
)
def _select_tokens_kernel(
    scores_ptr, num_fresh_ptr, staleness_ptr, indices_ptr, positions_ptr,
    num_steps, N, max_fresh, height, width, tile,
    staleness_weight, factor,
    stride_sl, stride_sb, stride_fp,
    NORMALIZE: tl.constexpr, HAS_GRID: tl.constexpr, HOLDS_KEYS: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """For each p in turn, ``score = scores[l, b] / norm + staleness_weight * staleness[l, b]``, and
    winners of the grid's squares take the factor. ``indices[p, l, b]`` are the top ``num_fresh[p,
    l]``, ascending, and ``positions[p, l, b]`` their inverse. ``staleness[l, b]`` is 0 for fresh
    tokens, else one more.
    """
    batch = tl.program_id(0).to(tl.int64)
    layer = tl.program_id(1).to(tl.int64)
    num_rows = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
    row = layer * tl.num_programs(0) + batch
    scores_ptr += layer * stride_sl + batch * stride_sb
    staleness_ptr += row * N
    if NORMALIZE:
        factor_before, norm = _measure_norm(scores_ptr, N, CHUNK)

    for step in range(num_steps):
        # until they are known, the place of the positions holds the keys
        keys_ptr = positions_ptr + (step * num_rows + row) * N
        for start in range(0, N, CHUNK):
            token = start + tl.arange(0, CHUNK)
            mask = token < N
            score = tl.load(scores_ptr + token, mask=mask, other=0.0).to(tl.float32)
            if NORMALIZE:
                score = tl.div_rn(score * factor_before, norm)
            staleness = tl.load(staleness_ptr + token, mask=mask, other=0)
            score += staleness_weight * staleness.to(tl.float32)
            tl.store(keys_ptr + token, _to_key(score), mask=mask)
        tl.debug_barrier()
        if HAS_GRID:
            _raise_winners(keys_ptr, height, width, tile, factor, CHUNK // 4)
            tl.debug_barrier()

        wanted = max_fresh
        if num_fresh_ptr is not None:
            given = tl.load(num_fresh_ptr + step * stride_fp + layer)
            wanted = tl.minimum(tl.maximum(given, 0), max_fresh)
        held_keys = _load_keys(keys_ptr, 0, N, BLOCK)
        threshold = _find_threshold(wanted, held_keys, keys_ptr, N, HOLDS_KEYS, BLOCK)
        above = _count_from(threshold + 1, held_keys, keys_ptr, N, HOLDS_KEYS, BLOCK)
        wanted_ties = wanted - above

        step_indices_ptr = indices_ptr + (step * num_rows + row) * max_fresh
        above_before = 0
        ties_before = 0
        for start in range(0, N, CHUNK):
            token = start + tl.arange(0, CHUNK)
            mask = token < N
            key = tl.load(keys_ptr + token, mask=mask, other=_LOWEST)
            is_above = mask & (key > threshold)
            is_tie = mask & (key == threshold)
            # two counts in one scan: a chunk has fewer than 2**15 tokens
            both = is_above.to(tl.int32) + (is_tie.to(tl.int32) << 16)
            seen = tl.cumsum(both, axis=0)
            ties = ties_before + (seen >> 16)
            is_fresh = is_above | (is_tie & (ties <= wanted_ties))
            slot = above_before + (seen & 0xFFFF) + tl.minimum(ties, wanted_ties) - 1
            tl.store(keys_ptr + token, tl.where(is_fresh, slot, -1), mask=mask)
            tl.store(step_indices_ptr + slot, token, mask=is_fresh)
            staleness = tl.load(staleness_ptr + token, mask=mask, other=0)
            tl.store(staleness_ptr + token, tl.where(is_fresh, 0, staleness + 1), mask=mask)
            total = tl.sum(both, axis=0)
            above_before += total & 0xFFFF
            ties_before += total >> 16
        for start in range(0, max_fresh, CHUNK):
            slot = start + tl.arange(0, CHUNK)
            is_empty = (slot >= wanted) & (slot < max_fresh)
            tl.store(step_indices_ptr + slot, tl.full([CHUNK], -1, tl.int32), mask=is_empty)
        # the next step reads the staleness that other threads wrote
        tl.debug_barrier()


def select_tokens_(
    scores: Tensor,
    staleness: Tensor,
    num_fresh: Tensor | None,
    max_fresh: int,
    staleness_weight: float,
    normalize: bool,
    grid: tuple[int, int] | None,
    tile: int,
    bonus: float,
) -> tuple[Tensor, Tensor]:
    """Launch ``_select_tokens_kernel``."""
    L, B, N = scores.shape
    P = 1 if num_fresh is None else num_fresh.shape[0]
    indices = staleness.new_empty(P, L, B, max_fresh)
    positions = staleness.new_empty(P, L, B, N)
    if positions.numel() == 0:
        return indices, positions
    heuristic = SelectSetting.for_tokens(N)
    setting = choose("select_tokens_", device_of(scores.device), {"N": N}, heuristic)
    height, width = (0, 0) if grid is None else grid
    _select_tokens_kernel[(B, L)](
        scores, num_fresh, staleness, indices, positions,
        P, N, max_fresh, height, width, tile,
        staleness_weight, 1.0 + bonus,
        scores.stride(0), scores.stride(1), 0 if num_fresh is None else num_fresh.stride(0),
        NORMALIZE=normalize, HAS_GRID=grid is not None, HOLDS_KEYS=setting.block >= N,
        BLOCK=setting.block, CHUNK=setting.chunk,
        num_warps=setting.num_warps, maxnreg=setting.max_registers,
        # a fused multiply-add would round otherwise than the reference, and decide ties otherwise
        enable_fp_fusion=False,
    )  # fmt: skip
    return indices, positions


@triton.jit(
    do_not_specialize=["N", "S", "stride_ib"],
    do_not_specialize_on_alignment=["indices_ptr"],
)
def _invert_indices_kernel(
    indices_ptr, positions_ptr,
    N, S,
    stride_ib,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """positions[b, indices[b, s]] = s, and -1 for every token that is not selected."""
    batch = tl.program_id(0).to(tl.int64)
    positions_ptr += batch * N
    for start in range(0, N, BLOCK):
        token = start + tl.arange(0, BLOCK)
        tl.store(positions_ptr + token, tl.full([BLOCK], -1, tl.int32), mask=token < N)
    tl.debug_barrier()
    for start in range(0, S, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        token = tl.load(indices_ptr + batch * stride_ib + slot, mask=slot < S, other=-1)
        tl.store(positions_ptr + token, slot, mask=(token >= 0) & (token < N))


def invert_indices(indices: Tensor, num_tokens: int) -> Tensor:
    """Launch ``_invert_indices_kernel``."""
    B, S = indices.shape
    positions = indices.new_empty(B, num_tokens)
    if positions.numel() == 0:
        return positions
    heuristic = SelectSetting.for_tokens(num_tokens)
    setting = choose("invert_indices", device_of(indices.device), {"N": num_tokens}, heuristic)
    _invert_indices_kernel[(B,)](
        indices, positions,
        num_tokens, S,
        indices.stride(0),
        BLOCK=setting.block, num_warps=setting.num_warps,
    )  # fmt: skip
    return positions


def compile_cases(device: Device) -> Iterator[CompileCase]:
    """Every setting, with and without a grid, for one count and for counts per layer."""
    sizes = ("num_steps", "N", "max_fresh", "height", "width", "tile")
    strides = ("stride_sl", "stride_sb", "stride_fp")
    pointers = ("scores_ptr", "staleness_ptr", "indices_ptr", "positions_ptr")
    for num_tokens in (*(1 << bits for bits in range(7, 14)), 8193):
        setting = SelectSetting.for_tokens(num_tokens)
        yield CompileCase(
            kernel=_invert_indices_kernel,
            variant="i32",
            setting=setting,
            signature={
                **dict.fromkeys(("indices_ptr", "positions_ptr"), "*i32"),
                **dict.fromkeys(("N", "S", "stride_ib"), "i32"),
            },
            constexprs={"BLOCK": setting.block},
            aligned=frozenset(("positions_ptr",)),
            num_warps=setting.num_warps,
        )
        for dtype in ("bf16", "fp32"):
            for has_grid in (False, True):
                # the grid and the counts of a cycle come together, as the plainest call has neither
                counts: dict[str, object] = {} if has_grid else {"num_fresh_ptr": None}
                yield CompileCase(
                    kernel=_select_tokens_kernel,
                    variant=f"{dtype}{' cycle on a grid' if has_grid else ''}",
                    setting=setting,
                    signature={
                        **dict.fromkeys(pointers, "*i32"),
                        **({"num_fresh_ptr": "*i32"} if has_grid else {}),
                        "scores_ptr": f"*{dtype}",
                        **dict.fromkeys((*sizes, *strides), "i32"),
                        "staleness_weight": "fp32",
                        "factor": "fp32",
                    },
                    constexprs={
                        **counts,
                        "NORMALIZE": has_grid,
                        "HAS_GRID": has_grid,
                        "HOLDS_KEYS": setting.block >= num_tokens,
                        "BLOCK": setting.block,
                        "CHUNK": setting.chunk,
                    },
                    aligned=frozenset((*pointers, *strides)) - {"stride_fp"},
                    num_warps=setting.num_warps,
                    max_registers=setting.max_registers,
                    fuses_multiply_add=False,
                )
