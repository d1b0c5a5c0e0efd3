"""The prices of the roofline are those that the design's tables were made with."""

import pytest

from benchmarks.roofline import (
    GRAPH_SECONDS,
    H200,
    Kernel,
    list_layer,
    list_mlp,
    make_product,
    price,
    price_kernel,
    price_product,
)

# the design's figures, by channels and rows: microseconds of fc1, of fc2, and of fc2 split
PRODUCTS = {
    (1152, 512): (11.3, 19.5, 14.5),
    (1152, 1024): (21.0, 29.5, 23.6),
    (1152, 2048): (30.8, 40.5, 40.5),
    (1152, 4096): (60.0, 79.5, 70.8),
    (1152, 8192): (115, 118, 118),
    (1152, 16384): (229, 236, 236),
    (3072, 512): (53.5, 76.3, 58.4),
    (3072, 1024): (102, 106, 106),
    (3072, 2048): (203, 210, 210),
    (3072, 4096): (405, 405, 405),
    (3072, 8192): (809, 809, 809),
    (3072, 16384): (1583, 1616, 1616),
}
# our MLP branch over eager, eager in a graph, compiled, the library's composition
BRANCHES = {
    (1152, 512): (2.0, 1.5, 1.16, 1.04),
    (1152, 2048): (1.4, 1.3, 1.13, 1.01),
    (1152, 8192): (1.3, 1.3, 1.14, 1.00),
    (3072, 512): (1.2, 1.13, 1.03, 0.97),
    (3072, 2048): (1.08, 1.08, 1.02, 0.96),
    (3072, 16384): (1.06, 1.06, 1.02, 0.96),
}
# microseconds of a whole layer: eager, in a graph, compiled, ours
LAYERS = {
    (16, 256, 26, 1152): (220, 136, 69, 35),
    (64, 256, 26, 1152): (324, 246, 151, 99),
    (8, 1024, 307, 1152): (307, 234, 153, 107),
    (1, 4608, 460, 3072): (355, 275, 190, 149),
    (1, 4608, 1382, 3072): (530, 460, 367, 323),
    (1, 4608, 2304, 3072): (766, 696, 595, 551),
}
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
