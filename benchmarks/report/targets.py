"""What the package set out to reach, each against the strongest baseline in the same run."""

from .claims import (
    Claim,
    microseconds,
    over,
    run_over_dense,
    share_of_ceiling,
    times_as_long,
)
from .records import Problem

_DIT_LAYER = Problem(("layer",), {"B": 16, "N": 256, "S": 26, "D": 1152})
_FLUX_LAYER = Problem(("layer",), {"B": 1, "N": 4608, "S": 460, "D": 3072})
_WITH_STATISTICS = Problem(("attention_with_received",), {"B": 1, "N": 4608, "D": 3072})

# a batch is of pictures, of which guidance makes two rows each
ON_GPU = (
    Claim(
        "target/layer/dit-xl/eager",
        "partial layer, DiT-XL/2 256 px, B = 16, 10 % fresh, over eager",
        over(_DIT_LAYER, "eager/stream"),
        low=6,
    ),
    Claim(
        "target/layer/dit-xl/compiled",
        "the same over torch.compile in a graph",
        over(_DIT_LAYER, "eager/compiled"),
        low=2,
    ),
    Claim(
        "target/layer/flux/eager",
        "partial layer, FLUX 1024 px, B = 1, 10 % fresh, over eager",
        over(_FLUX_LAYER, "eager/stream"),
        low=2.4,
    ),
    Claim(
        "target/layer/flux/compiled",
        "the same over torch.compile in a graph",
        over(_FLUX_LAYER, "eager/compiled"),
        low=1.3,
    ),
    Claim(
        "target/row-pass",
        "row pass of 10 MB and more: share of the measured copy, at worst",
        share_of_ceiling(Problem(("row_pass_",), min_bytes=10_000_000)),
        low=0.75,
        unit="%",
    ),
    Claim(
        "target/select/dit-xl",
        "selection of a whole step, 28 layers of 32 samples of 256 tokens",
        microseconds(Problem(("select_tokens_",), {"L": 28, "B": 32, "N": 256})),
        high=15,
        unit="us",
    ),
    Claim(
        "target/select/flux",
        "selection of a whole step, 57 layers of 4,608 tokens",
        microseconds(Problem(("select_tokens_",), {"L": 57, "B": 1, "N": 4608})),
        high=40,
        unit="us",
    ),
    Claim(
        "target/products",
        "each product of packed rows over the library's, at worst",
        over(Problem(("linear", "linear_gathered", "linear_scatter_", "project_qkv_"))),
        low=0.9,
    ),
    Claim(
        "target/statistics",
        "attention with statistics over the best fused forward without, N = 4,608",
        times_as_long(_WITH_STATISTICS, "sdpa*"),
        high=1.7,
    ),
    Claim(
        "target/run/flux",
        "ToCa N = 6 on FLUX.1-dev, 50 steps, over the dense model with fused attention in a graph",
        run_over_dense("flux-1-dev-1024px-1", "graph"),
        low=3.5,
    ),
    Claim(
        "target/run/flux/compiled",
        "the same over the dense model compiled",
        run_over_dense("flux-1-dev-1024px-1", "compiled"),
        low=3.5,
    ),
    Claim(
        "target/run/dit-xl-8",
        "ToCa N = 3 on DiT-XL/2, 50 DDIM steps, batch 8, over the dense model in a graph",
        run_over_dense("dit-xl-256px-16", "graph"),
        low=2.2,
    ),
    Claim(
        "target/run/dit-xl-1",
        "the same, batch 1",
        run_over_dense("dit-xl-256px-2", "graph"),
        low=1.9,
    ),
)


def _cpu_layer(dtype: str, fresh: int, low: float) -> Claim:
    sizes = {"B": 2, "N": 256, "S": fresh, "D": 1152}
    return Claim(
        f"target/cpu/layer/{dtype}/{fresh}",
        f"partial layer, DiT-XL/2 256 px, B = 2, {fresh} fresh, {dtype}, over eager",
        over(Problem(("layer-of-given-tokens",), sizes, dtype), "eager/stream"),
        low=low,
    )


ON_CPU = (
    *(_cpu_layer("bfloat16", fresh, low) for fresh, low in ((26, 2), (64, 2), (128, 1.6))),
    *(_cpu_layer("float32", fresh, low) for fresh, low in ((26, 1.4), (64, 1.3), (128, 1.1))),
    Claim(
        "target/cpu/select",
        "selection, DiT-XL/2 256 px, B = 2, over the published way",
        over(Problem(("select_tokens_",), {"B": 2, "N": 256}), "argsort/*"),
        low=5,
    ),
    *(
        Claim(
            f"target/cpu/statistics/{dtype}",
            f"attention received over the explicit map, N = 1,024, {dtype}",
            over(Problem(("attention_received",), {"N": 1024}, dtype), "eager/*"),
            low=2,
        )
        for dtype in ("bfloat16", "float32")
    ),
)
