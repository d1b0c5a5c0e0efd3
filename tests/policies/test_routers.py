import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencache_kernels.policies import FactorRouter, Site, Step, ToCaConfig, count_fresh


def published_ratio(name, base, layer, s, total, stream, module):
    """The published formulas, in the counting direction of each model."""
    if module == "attn":
        return 0.0
    share = layer / 27
    ratio = {
        "dit-xl-ddim50": lambda: (0.8 + 0.4 * share) * (3 - 4 * s / total) * 2.5,
        "dit-xl-ddpm250": lambda: (1.8 - 1.6 * share) * (1.4 - 0.8 * s / total) * 2.5,
        "pixart-alpha": lambda: (
            (1.6 - 1.2 * share) * (1.9 - 1.8 * s / total) * {"cross": 0.6, "mlp": 1.6}[module]
        ),
        "opensora": lambda: {"cross": -0.005, "mlp": 1.495}[module],
        "flux-1-dev": lambda: (1.5 - share) * {"double": 0.4, "single": 1.6}[stream],
    }[name]()
    return min(max(base * ratio, 0.0), 1.0)


def fresh_counts(name, index, stream, module, layers, num_tokens):
    config = ToCaConfig.preset(name)
    step = Step(index, config.num_inference_steps)
    ratios = [config.router.fresh_ratio(Site(stream, layer, module), step) for layer in layers]
    return [count_fresh(ratio, num_tokens) for ratio in ratios]


@pytest.mark.parametrize(
    ("name", "stream", "module", "layers", "num_tokens"),
    [
        ("dit-xl-ddim50", "main", "mlp", 28, 256),
        ("dit-xl-ddim50", "main", "mlp", 28, 1024),
        ("dit-xl-ddim50", "main", "attn", 28, 256),
        ("dit-xl-ddpm250", "main", "mlp", 28, 256),
        ("pixart-alpha", "main", "mlp", 28, 256),
        ("pixart-alpha", "main", "cross", 28, 4096),
        ("opensora", "spatial", "mlp", 28, 23850),
        ("opensora", "temporal", "cross", 28, 23850),
        ("flux-1-dev", "double", "mlp", 19, 4096),
        ("flux-1-dev", "double", "text_mlp", 19, 512),
        ("flux-1-dev", "single", "mlp", 38, 4608),
    ],
)
def test_counts_equal_the_published_formula(name, stream, module, layers, num_tokens):
    config = ToCaConfig.preset(name)
    total = config.num_inference_steps
    for index in range(total):
        s = total - 1 - index if name.startswith("dit") else index
        for layer in range(layers):
            ratio = published_ratio(name, config.router.base, layer, s, total, stream, module)
            wanted = int(np.float32(ratio) * np.float32(num_tokens))
            got = config.router.fresh_ratio(Site(stream, layer, module), Step(index, total))
            assert count_fresh(got, num_tokens) == wanted, (index, layer)


@pytest.mark.parametrize(
    ("s", "front", "back"),
    [(33, 12, 19), (28, 27, 40), (22, 44, 66), (15, 64, 96), (7, 87, 131), (38, 0, 0), (48, 0, 0)],
)
def test_published_ddim50_counts(s, front, back):
    assert fresh_counts("dit-xl-ddim50", 49 - s, "main", "mlp", [0, 27], 256) == [front, back]


@pytest.mark.parametrize(
    ("s", "front", "back"), [(248, 48, 5), (188, 64, 7), (125, 80, 8), (41, 102, 11), (4, 111, 12)]
)
def test_published_ddpm250_counts(s, front, back):
    assert fresh_counts("dit-xl-ddpm250", 249 - s, "main", "mlp", [0, 27], 256) == [front, back]


@pytest.mark.parametrize(
    ("index", "cross", "mlp"),
    [
        (1, [133, 33], [256, 88]),
        (5, [106, 26], [256, 71]),
        (10, [73, 18], [196, 49]),
        (14, [47, 11], [125, 31]),
        (19, [14, 3], [37, 9]),
    ],
)
def test_published_pixart_counts(index, cross, mlp):
    assert fresh_counts("pixart-alpha", index, "main", "cross", [0, 27], 256) == cross
    assert fresh_counts("pixart-alpha", index, "main", "mlp", [0, 27], 256) == mlp


def test_published_opensora_counts():
    assert fresh_counts("opensora", 7, "spatial", "mlp", [0, 27], 23850) == [3565, 3565]
    assert fresh_counts("opensora", 7, "temporal", "cross", [0, 27], 23850) == [0, 0]


def test_published_flux_counts():
    single = fresh_counts("flux-1-dev", 7, "single", "mlp", range(38), 4608)

    assert fresh_counts("flux-1-dev", 7, "double", "mlp", [0, 9, 18], 4096) == [245, 191, 136]
    assert fresh_counts("flux-1-dev", 7, "double", "text_mlp", [0, 18], 512) == [30, 17]
    assert single[:3] + [single[18]] + single[-2:] == [1105, 1078, 1051, 614, 122, 95]


@pytest.mark.parametrize(
    ("ratio", "num_tokens", "wanted"),
    # 0.7 in float32 is below 0.7, but its float32 product with 10 is 7 again
    [(0.7, 10, 7), (0.0, 5, 0), (1.0, 5, 5), (0.199999, 5, 0)],
)
def test_a_count_is_the_float32_product_truncated(ratio, num_tokens, wanted):
    assert count_fresh(ratio, num_tokens) == wanted


@given(
    small=st.floats(0, 1),
    large=st.floats(0, 1),
    depth=st.floats(-1, 1),
    time=st.floats(-2, 2),
    layer=st.integers(0, 40),
    index=st.integers(0, 19),
    num_tokens=st.integers(1, 5000),
)
def test_a_larger_base_never_means_fewer_tokens(
    small, large, depth, time, layer, index, num_tokens
):
    small, large = sorted((small, large))
    site, step = Site("main", layer, "mlp"), Step(index, 20)
    counts = [
        count_fresh(FactorRouter(base, 28, depth, time).fresh_ratio(site, step), num_tokens)
        for base in (small, large)
    ]

    assert 0 <= counts[0] <= counts[1] <= num_tokens


def test_the_depth_slope_spans_the_layers_that_there_are():
    def ratios(num_layers):
        router = ToCaConfig.preset("dit-xl-ddpm250", num_layers=num_layers).router
        sites = (Site("main", layer, "mlp") for layer in (0, num_layers - 1))
        return [router.fresh_ratio(site, Step(100, 250)) for site in sites]

    assert ratios(6) == pytest.approx(ratios(28))
    assert ratios(6)[0] == pytest.approx(9 * ratios(6)[1])


def test_one_layer_is_a_model_too():
    assert FactorRouter(0.5, 1).fresh_ratio(Site("main", 0, "mlp"), Step(0, 1)) == 0.5


@pytest.mark.parametrize("base", [-0.1, 1.5, float("nan")])
def test_a_base_outside_0_and_1_is_refused(base):
    with pytest.raises(ValueError, match=r"FactorRouter: base must be in \[0, 1\], got"):
        FactorRouter(base)


def test_no_layer_is_refused():
    with pytest.raises(ValueError, match="FactorRouter: num_layers must be at least 1, got 0"):
        FactorRouter(0.5, 0)
