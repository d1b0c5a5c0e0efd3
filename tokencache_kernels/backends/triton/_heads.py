"""The product of queries and keys for heads of any width, used by all kernels with attention maps.

A head is a power of two of channels and, where that is not all, a smaller power of two: 72 as
64 + 16 wastes 8 channels, as 128 it would waste 56. Strides are passed as counts of a constant UNIT
that divides them all: the compiler must know that rows start at a multiple of 16 bytes, or it loses
the asynchronous copies, and 72 itself is no multiple of the 16 elements that a launch looks for.
"""

from math import gcd, log

import triton
import triton.language as tl
from torch import Tensor

from ...errors import UnsupportedInputError
from ._device import INTERPRETED

# beyond it a block of rows of any kernel no longer fits the registers
MAX_HEAD_DIM = 256
# from powers of 2, which are one instruction, to those of e
LN_2 = tl.constexpr(log(2))
LOG2_E = tl.constexpr(1 / log(2))


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """The wider and the narrower part of a head, this 0 where one is enough."""
    width = max(16, triton.next_power_of_2(head_dim + 1) // 2)
    rest = max(16, triton.next_power_of_2(head_dim - width)) if head_dim > width else 0
    return (2 * width, 0) if rest == width else (width, rest)


def expect_head_dim(op: str, head_dim: int, limit: int = MAX_HEAD_DIM) -> None:
    """Refuse heads that are too wide."""
    if head_dim > limit:
        raise UnsupportedInputError(
            f"{op}: query must have at most {limit} channels a head for backend 'triton', "
            f"got {head_dim}"
        )


def strides_in_units(*tensors: Tensor) -> tuple[int, list[int]]:
    """The largest unit, at most 16, of all strides but the last ones; and these, in units."""
    strides = [stride for tensor in tensors for stride in tensor.stride()[:-1]]
    unit = gcd(16, *strides)
    return unit, [stride // unit for stride in strides]


@triton.jit
def load_tile(rows, FIRST: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, is_row=None):
    """x[m, c] = rows[m][FIRST + c], 0 past the E channels or where not is_row (None: all are)."""
    cols = FIRST + tl.arange(0, WIDTH)
    ptrs = rows[:, None] + cols[None, :]
    mask = (cols < E)[None, :] if FIRST + WIDTH > E or is_row is not None else None
    if is_row is not None:
        mask = is_row[:, None] & mask
    x = tl.load(ptrs, mask=mask, other=None if mask is None else 0.0)
    if INTERPRETED:
        # the interpreter would multiply the bit patterns of bfloat16
        x = x.to(tl.float32)
    return x


@triton.jit
def score_rows(
    x, x_rest, rows,
    E: tl.constexpr, WIDTH: tl.constexpr, REST: tl.constexpr,
    is_row=None,
):  # fmt: skip
    """x[m] @ rows[n], in float32; 0 where not is_row (None: all are)."""
    scores = tl.dot(x, tl.trans(load_tile(rows, 0, WIDTH, E, is_row)), input_precision="ieee")
    if REST > 0:
        rest = load_tile(rows, WIDTH, REST, E, is_row)
        scores = tl.dot(x_rest, tl.trans(rest), scores, input_precision="ieee")
    return scores


@triton.jit
def rows_from(ptr, first, count, stride, BLOCK: tl.constexpr):
    """Pointers to rows first .. first + BLOCK - 1; one past the last of ``count`` repeats it.

    Without a count, none is repeated. Only the way to the block is long: within it 32 bits do,
    which need half the registers.
    """
    within = tl.arange(0, BLOCK)
    if count is not None:
        within = tl.minimum(within, count - 1 - first)
    return ptr + tl.cast(first, tl.int64) * stride + within * stride


@triton.jit
def count_keys(lengths_ptr, batch, N):
    """Count the keys of the sample."""
    num_keys = N
    if lengths_ptr is not None:
        num_keys = tl.minimum(tl.maximum(tl.load(lengths_ptr + batch), 0), N)
    return num_keys
