"""What was predicted when the package was designed, before anything was measured.

Figures of a model with two measured ceilings and assumed overheads, typed here once: they are there
to be tested. ``tests/test_roofline.py`` holds the prices of ``benchmarks/roofline.py`` to them.
"""

from collections.abc import Sequence

from .claims import (
    Claim,
    Measure,
    between,
    microseconds,
    over,
    share_of_ceiling,
    times_as_long,
)
from .records import Problem, Record

# the two products of an MLP, by channels and rows: microseconds of fc1, of fc2, of fc2 split
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
# our MLP branch over eager, eager in a graph, compiled, the library's parts
BRANCHES = {
    (1152, 512): (2.0, 1.5, 1.16, 1.04),
    (1152, 2048): (1.4, 1.3, 1.13, 1.01),
    (1152, 8192): (1.3, 1.3, 1.14, 1.00),
    (3072, 512): (1.2, 1.13, 1.03, 0.97),
    (3072, 2048): (1.08, 1.08, 1.02, 0.96),
    (3072, 16384): (1.06, 1.06, 1.02, 0.96),
}
# microseconds of a whole partial layer: eager, in a graph, compiled, ours; by B, N, S, D
LAYERS = {
    (16, 256, 26, 1152): (220, 136, 69, 35),
    (64, 256, 26, 1152): (324, 246, 151, 99),
    (8, 1024, 307, 1152): (307, 234, 153, 107),
    (1, 4608, 460, 3072): (355, 275, 190, 149),
    (1, 4608, 1382, 3072): (530, 460, 367, 323),
    (1, 4608, 2304, 3072): (766, 696, 595, 551),
}
_WAYS = {
    "eager": "eager/stream",
    "eager, in a graph": "eager/graph",
    "compiled": "eager/compiled",
    "the library's parts": "library/*",
}
# what is said of the sizes of FLUX.1-dev
_FLUX = {"B": 1, "N": 4608, "D": 3072}
_LAYER_DIT = Problem(("layer",), {"B": 16, "N": 256, "S": 26, "D": 1152})
_ROW_PASS = Problem(("row_pass_",), min_bytes=10_000_000)
_RECEIVED = Problem(("attention_received",), _FLUX)
_WITH_STATISTICS = Problem(("attention_with_received",), _FLUX)


def _exactly(key: str, what: str, measure: Measure, value: float, unit: str = "x") -> Claim:
    return Claim(key, what, measure, value, value, unit)


def _measured_by_nothing(records: Sequence[Record]) -> None:
    """What no benchmark of the suite tells."""


def list_layers() -> list[Claim]:
    """Whole partial layers: how long each way takes."""
    claims = []
    for (B, N, S, D), times in LAYERS.items():
        problem = Problem(("layer",), {"B": B, "N": N, "S": S, "D": D})
        where = f"partial layer of {B} x {N} tokens, {S} fresh, D = {D}"
        for way, value in zip((*list(_WAYS)[:3], "ours"), times, strict=True):
            measure = microseconds(problem, _WAYS.get(way))
            key = f"layer/{B}x{N}/{S}/{D}/{way}"
            claims.append(_exactly(key, f"{where}: {way}", measure, value, "us"))
    return claims


def list_branches() -> list[Claim]:
    """MLPs of packed rows: how many times longer others take than ours."""
    return [
        _exactly(
            f"mlp/{D}/{R}/{way}",
            f"MLP of {R} rows, D = {D}: over {way}",
            over(Problem(("mlp_",), {"rows": R, "D": D}), pattern),
            value,
        )
        for (D, R), values in BRANCHES.items()
        for (way, pattern), value in zip(_WAYS.items(), values, strict=True)
    ]


def list_products() -> list[Claim]:
    """The library's products: how long they take."""
    return [
        _exactly(
            f"product/{D}/{R}/{name}",
            f"{name} of {R} rows, D = {D}, the library's",
            microseconds(Problem((op,), {"rows": R, "D": D, "extra": 0}), pattern),
            value,
            "us",
        )
        for (D, R), (fc1, _, fc2) in PRODUCTS.items()
        for name, op, pattern, value in (
            ("fc1", "linear", "addmm/*", fc1),
            ("fc2", "linear_scatter_", "eager/*", fc2),
        )
    ]


# the five moves that were to gain the most
MOVES = (
    Claim(
        "move/select/step",
        "selection of a whole step, 28 layers of 32 samples of 256 tokens",
        microseconds(Problem(("select_tokens_",), {"L": 28, "B": 32, "N": 256})),
        high=10,
        unit="us",
    ),
    Claim(
        "move/select/topk",
        "the same over the library's top-k",
        over(Problem(("select_tokens_",), {"L": 28, "B": 32, "N": 256}), "topk/*"),
        low=8,
        high=15,
    ),
    Claim(
        "move/row-pass/share",
        "row pass of 10 MB and more: share of the measured copy, at worst",
        share_of_ceiling(_ROW_PASS),
        low=0.75,
        unit="%",
    ),
    _exactly(
        "move/row-pass/flux",
        "row pass of 4,608 tokens, 460 fresh, D = 3072",
        microseconds(Problem(("row_pass_",), {**_FLUX, "S": 461})),
        28,
        "us",
    ),
    _exactly(
        "move/row-pass/dit",
        "row pass of 16 x 256 tokens, 26 fresh, D = 1152",
        microseconds(Problem(("row_pass_",), {"B": 16, "N": 256, "S": 26, "D": 1152})),
        11,
        "us",
    ),
    Claim(
        "move/statistics/map",
        "attention received, N = 4,608, over the explicit map",
        over(_RECEIVED, "eager/*"),
        low=2,
    ),
    _exactly(
        "move/statistics/pass",
        "attention received after a forward, N = 4,608, D = 3072",
        microseconds(_RECEIVED),
        290,
        "us",
    ),
    _exactly(
        "move/statistics/forward",
        "attention with statistics over the best fused forward, N = 4,608",
        times_as_long(_WITH_STATISTICS, "sdpa*"),
        1.67,
    ),
    _exactly(
        "move/statistics/dense",
        "the best fused forward, N = 4,608, D = 3072",
        microseconds(_WITH_STATISTICS, "sdpa*"),
        435,
        "us",
    ),
    Claim(
        "move/products",
        "each product of packed rows over the library's, at worst",
        over(Problem(("linear", "linear_gathered", "linear_scatter_", "project_qkv_"))),
        low=0.9,
    ),
    Claim(
        "move/graph",
        "partial layer of 16 x 256 tokens, 26 fresh: eager over eager in a graph",
        between(_LAYER_DIT, "eager/stream", "eager/graph"),
        low=1.5,
        high=2,
    ),
    Claim(
        "move/split",
        "fc2 of at most 1,024 rows, split along its depth, over not split",
        _measured_by_nothing,
        low=1.25,
        high=1.35,
    ),
    Claim(
        "move/dependent-launch",
        "a kernel boundary, without and with programmatic dependent launch: the difference",
        _measured_by_nothing,
        low=1,
        high=2,
        unit="us",
    ),
    Claim(
        "move/attention",
        "the best attention over the default, N = 4,608",
        between(_WITH_STATISTICS, "sdpa/*", "sdpa*"),
        low=1.4,
        high=1.7,
    ),
)


def list_claims() -> list[Claim]:
    """All of them, the five moves first."""
    return [*MOVES, *list_layers(), *list_branches(), *list_products()]
