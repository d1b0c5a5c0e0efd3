"""What a device must take for some work: predictions, from its ceilings and a few constants.

A kernel is a pass over memory, a matrix product, or attention; each has one price. None of this is
a measurement, and it knows of no overhead that is not listed here. Each constant says where it
comes from; *design* is the study that the package was planned with, whose own tables these prices
give again (``tests/test_roofline.py``).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from math import ceil

# design: what a GPU does between two kernels, replayed from a graph (2 to 2.5 us)
GRAPH_SECONDS = 2e-6
# design: what the host takes to launch one op of eager PyTorch (4 to 6 us); longer work hides it
EAGER_SECONDS = 5e-6
# the beginning and end of a matrix product, with which the design's table is met
PRODUCT_SECONDS = 1.5e-6
# the second kernel of a product split along its depth, which adds up the parts; likewise
REDUCE_SECONDS = 2e-6
# rows x columns of a block's tile, and how near to the ceiling it multiplies; likewise
TILES = {(128, 256): 1.0, (128, 192): 0.97, (128, 128): 0.9, (64, 128): 0.7}
SPLITS = (1, 2, 3, 4)
# up to so many rows, libraries read the weights as a vector product does, at the rate of a copy
MAX_VECTOR_ROWS = 16
# design: what Triton reaches of the library's product
OWN_SHARE = 0.95
# design: the launches of one published selection, and of what torch.compile makes of it
SELECTION_LAUNCHES, COMPILED_SELECTION_LAUNCHES = 28, 9


@dataclass(frozen=True)
class Device:
    """The ceilings of a device, in bytes and operations a second.

    Attributes:
        bytes: a large copy, counting reads and writes.
        flops: a large bfloat16 product of random numbers.
        attention_flops: the best fused attention.
        received_flops: products alone, where the softmax is redone from a log-sum-exp.
        num_blocks: how many tiles are multiplied at a time.
    """

    name: str
    bytes: float
    flops: float
    attention_flops: float
    received_flops: float
    num_blocks: int


# design: the first two were measured on one H200, the next two are assumed
H200 = Device("H200", 4.3e12, 790e12, 600e12, 450e12, 132)


@dataclass(frozen=True)
class Kernel:
    """One launch: the bytes that it moves, and what it multiplies.

    ``product``: how many products, and the rows, columns and depth of each. ``rate``: which of the
    device's rates ``flops`` go at, where it is no plain product. ``is_ours``: not a library's.
    """

    name: str
    bytes: int
    flops: int = 0
    product: tuple[int, int, int, int] | None = None
    rate: str = "flops"
    is_ours: bool = False


def make_product(name: str, rows: int, columns: int, depth: int, **kernel: int) -> Kernel:
    """A product of matrices in 16 bits, each read or written once."""
    size = 2 * (rows * depth + columns * depth + rows * columns)
    return Kernel(name, size, 2 * rows * columns * depth, (1, rows, columns, depth), **kernel)


def price(kernels: Iterable[Kernel], device: Device, mode: str) -> float:
    """The seconds of kernels one after another: in a ``graph``, or called from ``eager`` Python."""
    return sum(price_kernel(kernel, device, mode) for kernel in kernels)


def price_kernel(kernel: Kernel, device: Device, mode: str) -> float:
    """The seconds of one kernel."""
    moved = kernel.bytes / device.bytes
    if kernel.product is not None and kernel.product[1] > MAX_VECTOR_ROWS:
        seconds = price_product(kernel.product, device) / (OWN_SHARE if kernel.is_ours else 1)
        return max(seconds, PRODUCT_SECONDS + moved, EAGER_SECONDS if mode == "eager" else 0)
    busy = max(moved, kernel.flops / getattr(device, kernel.rate))
    return max(busy, EAGER_SECONDS) if mode == "eager" else busy + GRAPH_SECONDS


def price_product(
    product: tuple[int, int, int, int], device: Device, splits: Iterable[int] = SPLITS
) -> float:
    """The seconds of a library's product, with the best of its tiles and splits.

    All blocks multiply a tile each in one wave; the last wave takes as long as any.
    """
    count, rows, columns, depth = product
    best = float("inf")
    for (tile_rows, tile_columns), share in TILES.items():
        flops = 2 * tile_rows * tile_columns * depth
        tiles = count * ceil(rows / tile_rows) * ceil(columns / tile_columns)
        for split in splits:
            waves = ceil(tiles * split / device.num_blocks)
            wave = device.num_blocks * flops / split / (share * device.flops)
            seconds = PRODUCT_SECONDS + waves * wave
            if split > 1:
                # the parts, in float32
                parts = 4 * split * count * rows * columns
                seconds += REDUCE_SECONDS + parts / device.bytes
            best = min(best, seconds)
    return best


def floor(kernels: Iterable[Kernel], device: Device) -> float:
    """The least seconds of kernels: their bytes or their products at the ceilings, no launch."""
    return sum(max(k.bytes / device.bytes, k.flops / getattr(device, k.rate)) for k in kernels)


def fuse(kernels: Iterable[Kernel]) -> list[Kernel]:
    """What a compiler makes of eager kernels at best.

    The passes between two products become one kernel, which takes as long as the longest of them.
    """
    fused: list[Kernel] = []
    for _, run in groupby(kernels, key=lambda kernel: kernel.flops > 0):
        members = list(run)
        is_pass = members[0].flops == 0
        fused += [max(members, key=lambda kernel: kernel.bytes)] if is_pass else members
    return fused


def list_mlp(rows: int, hidden: int, mlp: int, way: str) -> list[Kernel]:
    """The MLP of packed rows as the design counts it, from gather to scatter.

    ``way``: ``eager`` ops, what torch.compile makes (``compiled``), the ``library``'s product with
    GELU between two fused kernels, or ``ours``.
    """
    packed = 2 * rows * hidden
    one_pass = Kernel("pass", 2 * packed)
    activate = Kernel("gelu", 4 * rows * mlp)
    products = [
        make_product(name, rows, *sizes, is_ours=way == "ours")
        for name, sizes in (("fc1", (mlp, hidden)), ("fc2", (hidden, mlp)))
    ]
    around = {
        # gather, normalise, scale, shift; then gate and scatter
        "eager": ([one_pass] * 4, [activate], [one_pass] * 2),
        "compiled": ([one_pass], [activate], [one_pass]),
        "library": ([one_pass], [], [one_pass]),
        "ours": ([one_pass], [], []),
    }
    before, between, after = around[way]
    return [*before, products[0], *between, products[1], *after]


def list_layer(
    batch: int, tokens: int, fresh: int, hidden: int, mlp: int, way: str
) -> list[Kernel]:
    """A partial ToCa layer as the design counts it: selection, two gated sums, the fresh MLP.

    Our selection is one launch for all layers of a step, and so left out.
    """
    rows, stream = batch * fresh, 2 * batch * tokens * hidden
    branch = list_mlp(rows, hidden, mlp, way)
    if way == "ours":
        row_pass = Kernel("row_pass", 4 * stream + 2 * rows * hidden, is_ours=True)
        return [row_pass, *branch[1:]]
    if way == "eager":
        # the MLP's gate is in the next layer's sum
        del branch[-2]
        sums = [Kernel("multiply", 2 * stream), Kernel("add", 3 * stream)] * 2
        return [*[Kernel("select", 0)] * SELECTION_LAUNCHES, *sums, *branch]
    sums = [Kernel("add", 3 * stream)] * 2
    return [*[Kernel("select", 0)] * COMPILED_SELECTION_LAUNCHES, *sums, *branch]
