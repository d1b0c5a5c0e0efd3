from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokencache_kernels.models import PUBLISHED, SPECS, Sizes
from tokencache_kernels.policies import (
    Action,
    DuCaConfig,
    Site,
    Taylor,
    ToCaConfig,
    cache_bytes,
    fora,
    make_plan,
    model_shape,
    published_shape,
    random_tokens,
    taylor_seer,
)

DIT = published_shape(PUBLISHED["dit-xl"])
PIXART = published_shape(PUBLISHED["pixart-alpha"])
OPENSORA = published_shape(PUBLISHED["opensora"])
FLUX = published_shape(PUBLISHED["flux-1-dev"], as_published=True)
DEMO = published_shape(PUBLISHED["demo"])
SHAPES = {name: published_shape(model) for name, model in PUBLISHED.items()}
MIB = 2**20


def preset(name, **overrides):
    return ToCaConfig.preset(name, mixed_steps=True, **overrides)


@pytest.mark.parametrize(
    ("policy", "shape", "tera", "dense_tera"),
    [
        pytest.param(preset("dit-xl-ddim50"), DIT, 10.19, 23.68, id="dit-ddim50-N3"),
        pytest.param(
            preset("dit-xl-ddim50", refresh_interval=4), DIT, 8.69, 23.68, id="dit-ddim50-N4"
        ),
        pytest.param(preset("dit-xl-ddpm250"), DIT, 43.24, 118.38, id="dit-ddpm250"),
        pytest.param(preset("pixart-alpha", fresh_ratio=0.4), PIXART, 6.31, 11.16, id="pixart-40"),
        pytest.param(preset("pixart-alpha"), PIXART, 5.76, 11.16, id="pixart-30"),
        pytest.param(preset("pixart-alpha", fresh_ratio=0.2), PIXART, 5.02, 11.16, id="pixart-20"),
        pytest.param(preset("pixart-alpha", fresh_ratio=0.1), PIXART, 4.23, 11.16, id="pixart-10"),
        pytest.param(preset("opensora"), OPENSORA, 1392.8, 3282.4, id="opensora"),
        pytest.param(preset("flux-1-dev"), FLUX, 1262.1, 3718.1, id="flux-N4"),
        pytest.param(preset("flux-1-dev", refresh_interval=5), FLUX, 1125.7, 3718.1, id="flux-N5"),
        pytest.param(preset("flux-1-dev", refresh_interval=6), FLUX, 989.3, 3718.1, id="flux-N6"),
    ],
)
def test_published_totals(policy, shape, tera, dense_tera):
    plan = make_plan(policy, shape)

    assert plan.flops / 1e12 == pytest.approx(tera, rel=0.005)
    assert plan.dense_flops / 1e12 == pytest.approx(dense_tera, rel=0.005)
    # the small terms, which the published totals leave out, cancel in the ratio
    assert plan.flops_ratio == pytest.approx(dense_tera / tera, rel=0.0025)


def test_deciding_once_per_step_costs_the_extra_full_steps():
    mixed = make_plan(preset("dit-xl-ddim50"), DIT)
    once = make_plan(ToCaConfig.preset("dit-xl-ddim50"), DIT)

    assert len(mixed.full_steps) == 18
    assert set(once.full_steps) - set(mixed.full_steps) == {49 - 45, 49 - 32}
    assert mixed.flops_ratio == pytest.approx(2.32, abs=0.01)
    assert once.flops_ratio == pytest.approx(2.14, abs=0.01)


def test_a_mixed_step_is_full_in_block_0_alone():
    step = make_plan(preset("dit-xl-ddim50"), DIT).steps[49 - 32]

    assert not step.is_full
    assert step.full_layers("main", "mlp") == (0,)
    assert step.full_layers("main", "attn") == (0,)
    # the others follow the ratio: 0.07 * 0.8148 * 0.44 * 2.5 of 256 tokens in layer 1
    assert step.num_fresh("main", "mlp")[:2] == (256, 16)


def test_a_dit_step_costs_what_its_matrices_cost():
    D, N, B, L, H, M = 1152, 256, 2, 28, 16, 4608
    plan = make_plan(preset("dit-xl-ddim50"), DIT)
    attention = 8 * N * D * D + 4 * N * N * D + 5 * H * N * N + N * D
    mlp = 4 * D * M + 6 * M + D
    step = plan.steps[49 - 22]

    assert DIT.dense_flops == plan.steps[0].flops == B * L * (attention + N * mlp)
    assert step.flops == B * mlp * sum(step.num_fresh("main", "mlp"))


def test_the_demo_model_saves_what_larger_ones_save():
    plan = make_plan(ToCaConfig.preset("dit-xl-ddim50", num_layers=6), DEMO)
    D, N, M, L, B = 128, 256, 512, 6, 2
    matrices = B * L * N * (8 * D * D + 4 * N * D + 4 * D * M)

    assert matrices < DEMO.dense_flops < 1.1 * matrices
    assert 1.8 < plan.flops_ratio < 2.5
    assert make_plan(fora(3, 51), DEMO).flops_ratio == pytest.approx(3)


def test_projecting_once_per_cycle_saves_a_quarter_of_a_partial_flux_step():
    policy = preset("flux-1-dev")
    published, ours = (
        make_plan(policy, shape).steps[7].flops for shape in (FLUX, SHAPES["flux-1-dev"])
    )

    assert published / 1e12 == pytest.approx(6.141, rel=0.005)
    assert (published - ours) / 1e12 == pytest.approx(1.652, rel=0.001)


@given(
    ratios=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    interval=st.integers(1, 6),
    total=st.integers(1, 12),
)
def test_more_fresh_tokens_never_cost_less(ratios, interval, total):
    plans = [
        make_plan(ToCaConfig.constant(ratio, interval, total), DEMO) for ratio in sorted(ratios)
    ]

    assert plans[0].flops <= plans[1].flops <= plans[1].dense_flops
    assert plans[0].flops == sum(step.flops for step in plans[0].steps)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_fora_costs_its_full_steps(shape):
    plan = make_plan(fora(4, 10), shape)

    assert plan.full_steps == (0, 4, 8)
    assert plan.flops == 3 * shape.dense_flops
    assert {d.action for d in plan.steps[1].decisions.values()} == {Action.REUSE}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_all_tokens_fresh_cost_a_full_step_without_self_attention(shape):
    step = make_plan(ToCaConfig.constant(1.0, 2, 2), shape).steps[1]
    self_attention = shape.batch * sum(
        len(stack.sites(module)) * module.flops_full
        for stack in shape.stacks
        for module in stack.modules
        if module.name == "attn"
    )

    assert step.flops == shape.dense_flops - self_attention


def test_a_plan_knows_every_site_of_a_model():
    sites = make_plan(preset("flux-1-dev", num_inference_steps=1), FLUX).steps[0].decisions

    assert len(sites) == 19 * 3 + 38 * 2
    assert Site("double", 18, "text_mlp") in sites
    assert Site("single", 37, "mlp") in sites


def test_only_what_a_later_step_reuses_is_kept():
    every = make_plan(fora(1, 4), DEMO)
    some = make_plan(fora(2, 2), DEMO)
    last = make_plan(ToCaConfig.constant(0.5, 1, 1), DEMO)

    for plan in (every, last):
        assert kept(plan, DEMO, 4) == {}
    # attention and MLP
    assert kept(some, DEMO, 2) == {"features": 2 * 6 * 2 * 256 * 128 * 2}


def kept(plan, shape, element_size):
    return {name: size for name, size in cache_bytes(plan, shape, element_size).items() if size}


def test_staleness_and_scores_are_four_bytes_a_token_of_what_is_computed_in_part():
    plan = make_plan(ToCaConfig.preset("pixart-alpha"), PIXART)

    assert kept(plan, PIXART, 2) == {
        "features": 3 * 28 * 2 * 256 * 1152 * 2,
        "text": 2 * 28 * 2 * 20 * 1152 * 2,
        "staleness": 2 * 28 * 2 * 256 * 4,  # cross-attention and MLP
        "scores": 28 * 2 * 256 * 4,  # both
    }


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "policy",
    [
        ToCaConfig.constant(0.3, 3, 5),
        fora(2, 3),
        fora(1, 3),
        random_tokens(0.5, 2, 4),
        DuCaConfig(ToCaConfig.constant(0.3, 3, 5)),
        taylor_seer(2, 6, order=1),
        taylor_seer(3, 6, order=2),
        taylor_seer(4, 4, order=2),
        replace(ToCaConfig.constant(0.3, 3, 5), carrier=Taylor(2)),
    ],
    ids=lambda policy: f"{getattr(policy, 'name', 'duca')}-{policy.num_inference_steps}",
)
def test_the_cache_of_a_run_is_as_large_as_the_plan_says(policy):
    pytest.importorskip("diffusers")
    from tokencache_kernels.integrations.diffusers import apply_token_cache
    from tokencache_kernels.testing import tiny_dit

    model = tiny_dit()
    apply_token_cache(model, policy)
    labels = torch.tensor([1, 2])
    for step in range(policy.num_inference_steps):
        model(torch.randn(2, 2, 8, 8), timestep=labels * 0 + 900 - step, class_labels=labels)
    runner = runner_of(model)
    states = [selection.tokens for selection in runner._selections]

    sizes = Sizes({"transformer_blocks": 3}, 24, 3, 96)
    shape = model_shape(SPECS["DiTTransformer2DModel"], sizes, batch=2, image_tokens=16)
    sizes = cache_bytes(make_plan(policy, shape), shape, 4)
    assert sizes["features"] + sizes.get("differences", 0) == num_bytes(runner.features)
    assert sizes.get("output", 0) == num_bytes(runner._outputs)
    assert sizes["staleness"] == sum(state.staleness.nbytes for state in states)
    assert sizes["scores"] == sum(state.scores.nbytes for state in states)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "policy",
    [
        ToCaConfig.preset("flux-1-dev", num_inference_steps=6),
        fora(3, 4),
        taylor_seer(2, 6),
        replace(ToCaConfig.constant(0.3, 3, 5), carrier=Taylor(1)),
    ],
    ids=lambda policy: f"{policy.name}-{policy.carrier.order}",
)
def test_flux_keeps_what_the_plan_says_and_nothing_that_is_not_read(policy):
    pytest.importorskip("diffusers")
    from tokencache_kernels.integrations.diffusers import apply_token_cache
    from tokencache_kernels.testing import tiny_flux

    model = tiny_flux()
    apply_token_cache(model, policy)
    text, pooled = torch.randn(2, 5, 10), torch.randn(2, 6)
    for step in range(policy.num_inference_steps):
        model(
            hidden_states=torch.randn(2, 6, 4), encoder_hidden_states=text,
            pooled_projections=pooled, timestep=torch.full((2,), 0.9 - 0.1 * step),
            guidance=torch.ones(2), img_ids=torch.zeros(6, 3), txt_ids=torch.zeros(5, 3),
        )  # fmt: skip
    features = runner_of(model).features

    sizes = Sizes({"transformer_blocks": 2, "single_transformer_blocks": 3}, 24, 2, 96)
    shape = model_shape(
        SPECS["FluxTransformer2DModel"], sizes, batch=2, image_tokens=6, text_tokens=5
    )
    plan = make_plan(policy, shape)
    sizes = cache_bytes(plan, shape, 4)
    assert sizes["features"] + sizes.get("differences", 0) == num_bytes(features)
    attention = features._buffers.get(Site("single", 0, "attn"), [])
    assert len(attention) == any(
        any(step.num_fresh("single", "mlp")) and not step.is_full for step in plan.steps
    )


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "policy",
    [ToCaConfig.preset("pixart-alpha", num_inference_steps=5, num_layers=3), fora(3, 4)],
    ids=lambda policy: policy.name,
)
def test_pixart_keeps_the_keys_of_its_text_where_the_plan_says(policy):
    pytest.importorskip("diffusers")
    from tokencache_kernels.integrations.diffusers import apply_token_cache
    from tokencache_kernels.testing import tiny_pixart

    model, text = tiny_pixart(), torch.randn(2, 7, 10)
    apply_token_cache(model, policy)
    for step in range(policy.num_inference_steps):
        model(
            torch.randn(2, 2, 8, 8), encoder_hidden_states=text,
            timestep=torch.full((2,), 900 - step),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )  # fmt: skip
    runner = runner_of(model)

    sizes = Sizes({"transformer_blocks": 3}, 24, 3, 96)
    shape = model_shape(
        SPECS["PixArtTransformer2DModel"], sizes, batch=2, image_tokens=16, text_tokens=7
    )
    sizes = cache_bytes(make_plan(policy, shape), shape, 4)
    assert sizes.get("text", 0) == num_bytes(runner._once)
    assert sizes["features"] == num_bytes(runner.features)


def num_bytes(cache):
    return sum(buffer.nbytes for buffers in cache._buffers.values() for buffer in buffers)


def runner_of(model):
    from tokencache_kernels.integrations.diffusers.interception import interceptor_of

    return interceptor_of(model).session.passes()[0][1].runner


@pytest.mark.parametrize(
    ("name", "mean", "highest", "share_of_none"),
    [("dit-xl-ddim50", 43, 156, 0.28), ("dit-xl-ddpm250", 43, 112, 0.0)],
)
def test_published_dit_counts_over_a_run(name, mean, highest, share_of_none):
    counts = [
        decision.num_fresh
        for step in make_plan(preset(name), DIT).steps
        for site, decision in step.decisions.items()
        if site.module == "mlp" and decision.action is not Action.FULL
    ]

    assert round(sum(counts) / len(counts)) == mean
    assert max(counts) == highest
    assert counts.count(0) / len(counts) == pytest.approx(share_of_none, abs=0.005)
