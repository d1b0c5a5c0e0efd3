"""The prices of the roofline are those that the design's tables were made with."""

import pytest

from benchmarks.report.design import BRANCHES, LAYERS, PRODUCTS
from benchmarks.roofline import (
    GRAPH_SECONDS,
    H200,
    Kernel,
    fuse,
    list_layer,
    list_mlp,
    make_product,
    price,
    price_kernel,
    price_product,
)

WAYS = (("eager", "eager"), ("eager", "graph"), ("compiled", "graph"))


@pytest.mark.parametrize(("hidden", "rows"), PRODUCTS)
def test_products_are_within_a_hundredth_of_the_design(hidden, rows):
    fc1, fc2 = (1, rows, 4 * hidden, hidden), (1, rows, hidden, 4 * hidden)

    seconds = (
        price_product(fc1, H200, splits=[1]),
        price_product(fc2, H200, splits=[1]),
        price_product(fc2, H200),
    )

    assert [1e6 * one for one in seconds] == pytest.approx(PRODUCTS[hidden, rows], rel=0.01)


@pytest.mark.parametrize(("hidden", "rows"), BRANCHES)
def test_mlp_branches_are_within_five_hundredths_of_the_design(hidden, rows):
    ways = (*WAYS, ("library", "graph"))
    ours = price(list_mlp(rows, hidden, 4 * hidden, "ours"), H200, "graph")

    gains = [
        price(list_mlp(rows, hidden, 4 * hidden, way), H200, mode) / ours for way, mode in ways
    ]

    assert gains == pytest.approx(BRANCHES[hidden, rows], rel=0.05)


@pytest.mark.parametrize(("B", "N", "S", "D"), LAYERS)
def test_layers_are_within_eight_hundredths_of_the_design(B, N, S, D):
    ways = (*WAYS, ("ours", "graph"))

    seconds = [price(list_layer(B, N, S, D, 4 * D, way), H200, mode) for way, mode in ways]

    assert [1e6 * one for one in seconds] == pytest.approx(LAYERS[B, N, S, D], rel=0.08)


def test_a_pass_takes_its_bytes_and_its_launch():
    large, small = Kernel("pass", 4_300_000_000), Kernel("pass", 4)

    assert price_kernel(large, H200, "graph") == pytest.approx(1e-3 + GRAPH_SECONDS)
    assert price_kernel(large, H200, "eager") == pytest.approx(1e-3)
    assert price_kernel(small, H200, "eager") == pytest.approx(5e-6)


def test_a_product_never_beats_a_ceiling():
    for rows, columns, depth in ((1, 6912, 1152), (26, 4608, 1152), (512, 3072, 12288)):
        product = make_product("fc", rows, columns, depth)

        seconds = price_kernel(product, H200, "graph")

        assert seconds > product.bytes / H200.bytes
        assert seconds > product.flops / H200.flops


def test_a_compiler_leaves_one_pass_between_two_products():
    product = make_product("fc", 512, 1152, 1152)
    short, long = Kernel("add", 10), Kernel("multiply", 20)

    assert fuse([short, long, product, product, long, short]) == [long, product, product, long]
