import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokencache_kernels.models import PUBLISHED
from tokencache_kernels.policies import (
    Action,
    ContentPredictor,
    Decision,
    PercentileSchedule,
    Policy,
    ScoreSelector,
    Site,
    Step,
    TablePredictor,
    TokenCacheConfig,
    TwoPhaseSchedule,
    choose_blocks,
    count_fresh_tokens,
    make_plan,
    published_shape,
)
from tokencache_kernels.testing import randn

DEMO = published_shape(PUBLISHED["demo"])

ANY = Site("main", 1, "mlp")
STEPS, LAYERS, TOKENS = 12, 6, 256


def full_steps(schedule, total):
    return [index for index in range(total) if schedule.is_full(ANY, Step(index, total))]


def predictor(num_layers=LAYERS, num_tokens=TOKENS, num_steps=STEPS):
    made = TablePredictor(num_layers, num_tokens, num_steps)
    scores = randn(num_steps, num_layers, num_tokens).sigmoid()
    made.importance.copy_(scores.sort(descending=True).values)
    return made


def config(**settings):
    return TokenCacheConfig(predictor(), STEPS, **settings)


def test_two_phases_are_two_cycles_that_each_begin_with_a_full_step():
    assert full_steps(TwoPhaseSchedule(3, 1, 0.5), 20) == [0, 4, 8, 10, 12, 14, 16, 18]
    assert full_steps(TwoPhaseSchedule(4, 2, 0.3), 20) == [0, 5, 6, 9, 12, 15, 18]
    assert full_steps(TwoPhaseSchedule(4, 0, 0.5), 10) == [0, 5, 6, 7, 8, 9]
    assert full_steps(TwoPhaseSchedule(4, 1, 0.0), 6) == [0, 2, 4]
    assert full_steps(TwoPhaseSchedule(4, 1, 1.0), 11) == [0, 5, 10]


@given(
    late=st.integers(0, 6), more=st.integers(0, 6), boundary=st.floats(0, 1),
    total=st.integers(1, 80),
)  # fmt: skip
def test_no_phase_waits_longer_than_it_says(late, more, boundary, total):
    schedule = TwoPhaseSchedule(late + more, late, boundary)

    steps = full_steps(schedule, total)

    assert steps[0] == 0
    for step, following in zip(steps, [*steps[1:], total], strict=True):
        allowed = late if step >= int(boundary * total) + 1 else late + more
        assert following - step - 1 <= allowed


@given(total=st.integers(1, 100), data=st.data())
def test_equal_steps_are_full_at_equal_distances(total, data):
    num_full = data.draw(st.integers(1, total))
    value = data.draw(st.floats(1e-6, 1.0))

    steps = full_steps(PercentileSchedule((value,) * total, num_full), total)

    assert steps == [place * total // num_full for place in range(num_full)]


@given(st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=60), st.data())
def test_between_two_full_steps_lies_at_most_one_percentile(importance, data):
    num_full = data.draw(st.integers(1, len(importance)))

    steps = full_steps(PercentileSchedule(tuple(importance), num_full), len(importance))

    assert steps[0] == 0
    assert len(steps) <= num_full
    spacing = sum(importance) / num_full
    for step, following in zip(steps, [*steps[1:], len(importance)], strict=True):
        # a gap without any full step is less than one percentile
        assert sum(importance[step + 1 : following]) <= spacing * (1 + 1e-9)


def test_important_steps_are_full_more_often():
    importance = (0.1,) * 10 + (0.4,) * 10

    steps = full_steps(PercentileSchedule(importance, 5), 20)

    # percentiles at 0, 1, 2, 3 and 4 of a sum of 5; ten steps make up the first
    assert steps == [0, 10, 12, 15, 17]


def test_a_step_that_holds_several_percentiles_is_full_once():
    assert full_steps(PercentileSchedule((1.0, 8.0, 1.0), 3), 3) == [0, 1]


def test_marks_are_counted_over_all_blocks_and_rounded_up_to_a_tile():
    importance = torch.zeros(3, 100)
    importance[0, :20] = 1.0
    importance[1, :29] = 0.5
    importance[2] = 0.1

    # 49 marks of 300: 20 and 29; 0 stays 0
    assert count_fresh_tokens(importance, 1 - 49 / 300 - 1e-6, 16) == (32, 32, 0)
    assert count_fresh_tokens(importance, 0.0, 16) == (100, 100, 100)
    assert count_fresh_tokens(importance, 1.0, 16) == (0, 0, 0)
    # the block that has one mark more than the others' 49
    assert count_fresh_tokens(importance, 1 - 50 / 300 - 1e-6, 64) == (64, 64, 64)


@given(ratio=st.floats(0, 1), seed=st.integers(0, 50), tile=st.sampled_from([16, 32, 64]))
def test_a_block_computes_the_least_tiles_that_hold_its_marks(ratio, seed, tile):
    importance = randn(4, 90, seed=seed).sigmoid()

    counts = count_fresh_tokens(importance, ratio, tile)

    threshold = importance.flatten().sort(descending=True).values
    marks = int((1 - ratio) * 360 + 1e-3)
    for row, count in zip(importance, counts, strict=True):
        marked = int((row >= threshold[marks - 1]).sum()) if marks else 0
        assert count == 90 or count % tile == 0
        # one mark of leeway for the ratio's rounding
        assert count >= min(marked - 1, 90)
        assert count < marked + 1 + tile


def test_equal_blocks_are_marked_from_the_first_on():
    assert count_fresh_tokens(torch.ones(4, 32), 0.5, 16) == (32, 32, 0, 0)


def test_the_blocks_of_least_mean_importance_are_pruned_first():
    importance = torch.tensor([[0.9, 0.9], [0.1, 0.7], [0.5, 0.1], [0.5, 0.3]])

    assert choose_blocks(importance, 0.0) == ()
    assert choose_blocks(importance, 0.25) == (2,)
    assert choose_blocks(importance, 0.5) == (1, 2)
    assert choose_blocks(importance, 0.75) == (1, 2, 3)
    assert choose_blocks(importance, 1.0) == (0, 1, 2, 3)


def test_attention_and_mlp_of_a_block_share_one_decision():
    policy: Policy = config(cache_ratio=0.6)
    seen = set()
    for index in range(STEPS):
        for layer in range(LAYERS):
            decisions = [
                policy.decide(Site("main", layer, module), Step(index, STEPS), TOKENS)
                for module in ("attn", "mlp")
            ]
            assert decisions[0] == decisions[1]
            seen.add(decisions[0].action)
            if decisions[0].action is Action.PARTIAL:
                assert decisions[0].num_fresh == policy.fresh_counts[index][layer]
                assert decisions[0].num_fresh % 16 == 0
    assert Action.FULL in seen
    assert Action.PARTIAL in seen


def test_full_steps_are_those_of_the_schedule():
    plan = make_plan(config(schedule=TwoPhaseSchedule(3, 2, 0.5)), DEMO)

    assert plan.full_steps == (0, 4, 6, 9)


@pytest.mark.parametrize(
    ("variant", "flops"),
    [
        ("kv_all", lambda k, N, D: 4 * k * D * D + 4 * N * D * D + 4 * k * N * D + N * D),
        ("kv_cache", lambda k, N, D: 8 * k * D * D + 4 * k * N * D + k * D),
        ("sel_only", lambda k, N, D: 8 * k * D * D + 4 * k * k * D + k * D),
    ],
)
def test_partial_attention_costs_what_its_variant_does(variant, flops):
    k, N, D, heads = 48, TOKENS, 128, 4
    (module,) = [module for module in DEMO.stacks[0].modules if module.name == "attn"]

    softmax = 5 * heads * k * (k if variant == "sel_only" else N)
    assert module.flops(Decision(Action.PARTIAL, k, variant)) == flops(k, N, D) + softmax


def test_attention_of_all_tokens_costs_as_much_as_in_full():
    (module,) = [module for module in DEMO.stacks[0].modules if module.name == "attn"]

    for variant in ("kv_all", "kv_cache", "sel_only"):
        assert module.flops(Decision(Action.PARTIAL, TOKENS, variant)) == module.flops_full


def test_the_plan_counts_the_predictor_in_the_steps_that_ask_it():
    made = ContentPredictor(LAYERS, TOKENS, STEPS, hidden=128, width=32, num_heads=1)
    made.importance.copy_(predictor().importance)
    schedule = TwoPhaseSchedule(3, 2, 0.5)
    plans = [
        make_plan(TokenCacheConfig(one, STEPS, schedule=schedule), DEMO)
        for one in (made, predictor())
    ]

    for content, table in zip(*(plan.steps for plan in plans), strict=True):
        extra = 0 if content.is_full else 2 * made.flops
        assert content.flops == table.flops + extra


def test_everything_cached_is_reuse_and_nothing_cached_is_full():
    step = Step(1, STEPS)

    assert config(cache_ratio=1.0).decide(ANY, step, TOKENS) == Decision(Action.REUSE, 0)
    assert config(cache_ratio=0.0).decide(ANY, step, TOKENS) == Decision(Action.FULL, TOKENS)


def test_a_block_that_is_not_pruned_is_full():
    policy = config(cache_ratio=0.8, pruned_share=0.5)
    means = policy.predictor.importance[1].mean(dim=1)

    actions = [
        policy.decide(Site("main", layer, "attn"), Step(1, STEPS), TOKENS).action
        for layer in range(LAYERS)
    ]

    kept = set(means.argsort(descending=True)[:3].tolist())
    assert {layer for layer, action in enumerate(actions) if action is Action.FULL} == kept


@given(ratio=st.floats(0, 1))
def test_the_work_of_a_step_is_the_ratio_up_to_the_tiles(ratio):
    policy = config(cache_ratio=ratio)

    for counts in policy.fresh_counts:
        marks = (1 - ratio) * LAYERS * TOKENS
        assert marks - 1 <= sum(counts) < marks + 1 + LAYERS * policy.tile


def test_the_selector_takes_the_scores_as_they_are():
    assert config().selector == ScoreSelector("predicted", staleness_weight=0, normalize=False)


def test_the_selector_takes_the_highest_scores_of_each_sample():
    scores = randn(LAYERS, 2, 40).sigmoid()
    counts = torch.tensor([5, 0, 40, 1, 16, 7], dtype=torch.int32)

    indices, positions = config().selector.select_(
        scores, torch.zeros(LAYERS, 2, 40, dtype=torch.int32), counts, 40,
        sites=[Site("main", layer, "mlp") for layer in range(LAYERS)], step=Step(1, STEPS),
    )  # fmt: skip

    for layer, count in enumerate(counts.tolist()):
        for sample in range(2):
            wanted = scores[layer, sample].topk(count).indices.sort().values
            assert torch.equal(indices[layer, sample, :count].long(), wanted)
            assert int((positions[layer, sample] >= 0).sum()) == count


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: TwoPhaseSchedule(1, 2), "early_cached must be at least late_cached = 2, got 1"),
        (lambda: TwoPhaseSchedule(1, -1), "late_cached must be at least 0, got -1"),
        (lambda: TwoPhaseSchedule(boundary=1.5), r"boundary must be in \[0, 1\], got 1.5"),
        (lambda: PercentileSchedule((1.0,), 2), r"num_full must be in \[1, 1\], got 2"),
        (
            lambda: PercentileSchedule((1.0, float("nan")), 1),
            "importance must be finite and above 0 in each step, got nan",
        ),
        (
            lambda: PercentileSchedule((1.0,) * 3, 1).is_full(ANY, Step(0, 4)),
            "PercentileSchedule: importance must hold 4 steps, got 3",
        ),
        (
            lambda: TokenCacheConfig(predictor(), 50),
            "TokenCacheConfig: predictor must be trained for 50 steps, got one for 12",
        ),
        (
            lambda: config().decide(ANY, Step(1, STEPS + 1), TOKENS),
            "TokenCacheConfig: predictor must be trained for 13 steps, got one for 12",
        ),
        (
            lambda: config().decide(ANY, Step(1, STEPS), 64),
            "TokenCacheConfig: predictor must be trained for 64 tokens, got one for 256",
        ),
        (
            lambda: config().decide(Site("main", 6, "mlp"), Step(1, STEPS), TOKENS),
            "predictor must be trained for a model with a block 6, got one for 6 blocks",
        ),
        (
            lambda: TokenCacheConfig(TablePredictor(2, 4, 3), 3),
            "predictor must be calibrated, got importance that is not finite",
        ),
        (lambda: config(cache_ratio=1.1), r"cache_ratio must be in \[0, 1\], got 1.1"),
        (lambda: config(pruned_share=-1), r"pruned_share must be in \[0, 1\], got -1"),
        (lambda: config(tile=8), "tile must be 16, 32 or 64, got 8"),
        (lambda: config(attention="all"), "attention must be one of kv_all, .*, got 'all'"),
    ],
)
def test_a_wrong_setting_is_named(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()
