import pytest
from hypothesis import given
from hypothesis import strategies as st

from tokencache_kernels.policies import (
    Action,
    Decision,
    RandomSelector,
    ScoreSelector,
    Site,
    Step,
    ToCaConfig,
    fora,
    random_tokens,
)

PRESETS = ["dit-xl-ddim50", "dit-xl-ddpm250", "pixart-alpha", "opensora", "flux-1-dev"]
MLP = Site("main", 3, "mlp")


def decisions(policy, site=MLP, num_tokens=256):
    total = policy.num_inference_steps
    return [policy.decide(site, Step(index, total), num_tokens) for index in range(total)]


@pytest.mark.parametrize("name", PRESETS)
def test_a_decision_names_its_action_and_count(name):
    policy = ToCaConfig.preset(name)

    for decision in decisions(policy):
        wanted = {Action.FULL: decision.num_fresh == 256, Action.REUSE: decision.num_fresh == 0}
        assert wanted.get(decision.action, 0 < decision.num_fresh <= 256)
    assert Action.PARTIAL in {decision.action for decision in decisions(policy)}


@pytest.mark.parametrize("name", PRESETS)
def test_self_attention_is_full_or_reused(name):
    actions = {
        decision.action for decision in decisions(ToCaConfig.preset(name), Site("main", 1, "attn"))
    }

    assert actions == {Action.FULL, Action.REUSE}


@pytest.mark.parametrize("name", PRESETS)
@given(interval=st.integers(1, 9), total=st.integers(1, 60), ratio=st.floats(0, 1))
def test_every_variation_starts_full_and_fills_its_steps(name, interval, total, ratio):
    policy = ToCaConfig.preset(
        name, refresh_interval=interval, num_inference_steps=total, fresh_ratio=ratio
    )

    assert len(decisions(policy)) == total
    assert decisions(policy)[0] == Decision(Action.FULL, 256)


@pytest.mark.parametrize("name", PRESETS)
def test_no_fresh_token_means_reuse_in_every_partial_step(name):
    actions = {decision.action for decision in decisions(ToCaConfig.preset(name, fresh_ratio=0.0))}

    assert actions == {Action.FULL, Action.REUSE}


@given(interval=st.integers(1, 9), total=st.integers(1, 60), num_tokens=st.integers(1, 5000))
def test_fora_is_the_constant_policy_without_fresh_tokens(interval, total, num_tokens):
    plain = decisions(fora(interval, total), num_tokens=num_tokens)

    constant = ToCaConfig.constant(0.0, interval, total)
    assert plain == decisions(constant, num_tokens=num_tokens)
    assert plain == [
        Decision(Action.REUSE, 0) if index % interval else Decision(Action.FULL, num_tokens)
        for index in range(total)
    ]


def test_a_constant_policy_recomputes_the_same_share_everywhere():
    policy = ToCaConfig.constant(0.3, refresh_interval=4, num_inference_steps=50)

    partial = [policy.decide(Site("main", layer, "mlp"), Step(7, 50), 256) for layer in (0, 5)]

    assert partial == [Decision(Action.PARTIAL, 76)] * 2
    assert policy.decide(Site("main", 0, "attn"), Step(7, 50), 256).action is Action.REUSE
    assert policy.selector == ScoreSelector(staleness_weight=0.25 / 4)


def test_random_tokens_differ_from_the_constant_policy_in_the_selector_alone():
    policy = random_tokens(0.3, 4, 50, seed=9)

    assert policy.selector == RandomSelector(9)
    assert decisions(policy) == decisions(ToCaConfig.constant(0.3, 4, 50))


@pytest.mark.parametrize(
    ("name", "steps", "base_score", "tile", "bonus", "shares_guidance"),
    [
        ("dit-xl-ddim50", 50, "attention_received", 2, 0.6, False),
        ("dit-xl-ddpm250", 250, "attention_received", 2, 0.6, False),
        ("pixart-alpha", 20, "attention_entropy", 4, 0.4, True),
        ("opensora", 30, "attention_entropy", 2, 0.0, True),
        ("flux-1-dev", 50, "attention_received", 2, 0.0, False),
    ],
)
def test_presets_select_as_published(name, steps, base_score, tile, bonus, shares_guidance):
    policy = ToCaConfig.preset(name, refresh_interval=5)

    assert policy.num_inference_steps == steps
    assert policy.selector == ScoreSelector(
        base_score, 0.05, tile=tile, bonus=bonus, shares_guidance=shares_guidance
    )


def test_a_preset_with_a_seed_draws_its_tokens():
    assert ToCaConfig.preset("flux-1-dev", seed=4).selector == RandomSelector(4)


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: ToCaConfig.preset("sdxl"),
            "ToCaConfig.preset: name must be one of dit-xl-ddim50, .*, flux-1-dev, got 'sdxl'",
        ),
        (
            lambda: ToCaConfig.preset("flux-1-dev", fresh_ratio=1.5),
            r"FactorRouter: base must be in \[0, 1\], got 1.5",
        ),
        (
            lambda: ToCaConfig.preset("flux-1-dev", refresh_interval=0),
            "IntervalSchedule: refresh_interval must be at least 1, got 0",
        ),
        (
            lambda: ToCaConfig.constant(0.5, 0, 10),
            "IntervalSchedule: refresh_interval must be at least 1, got 0",
        ),
        (lambda: fora(3, 0), "ToCaConfig: num_inference_steps must be at least 1, got 0"),
    ],
)
def test_a_wrong_setting_is_named(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


@pytest.mark.parametrize(("name", "interval"), [("flux-1-dev", 4), ("opensora", 3)])
def test_full_steps_are_evenly_spaced_where_no_token_is_fresh(name, interval):
    policy = ToCaConfig.preset(name, fresh_ratio=0)
    total = policy.num_inference_steps
    site = Site("single", 0, "mlp")

    full = [step for step in range(total) if policy.schedule.is_full(site, Step(step, total))]

    assert full == list(range(0, total, interval))
