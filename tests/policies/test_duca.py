import pytest

from tokencache_kernels.models import PUBLISHED
from tokencache_kernels.policies import (
    Action,
    DuCaConfig,
    PercentileSchedule,
    RandomSelector,
    ScoreSelector,
    Site,
    Step,
    ToCaConfig,
    make_plan,
    published_shape,
)

DIT_XL = published_shape(PUBLISHED["dit-xl"])

KINDS = {Action.FULL: "F", Action.PARTIAL: "p", Action.REUSE: "r", Action.SKIP: "a"}


MLP = Site("main", 3, "mlp")


def kinds(policy, site=MLP):
    total = policy.num_inference_steps
    steps = (policy.decide(site, Step(index, total), 256).action for index in range(total))
    return "".join(KINDS[action] for action in steps)


def test_partial_and_aggressive_steps_take_turns():
    toca = ToCaConfig.constant(0.5, 5, 12)

    assert kinds(DuCaConfig(toca)) == "FpapaFpapaFp"
    assert kinds(DuCaConfig(toca, skips_odd=True)) == "FapapFapapFa"
    # where partial steps recompute nothing, blocks run all the same: gates are the step's
    assert kinds(DuCaConfig(ToCaConfig.constant(0.0, 3, 6))) == "FraFra"


def test_cross_attention_has_cycles_of_its_own_but_shares_the_aggressive_steps():
    policy = DuCaConfig.preset("opensora", num_inference_steps=15)

    assert kinds(policy, Site("spatial", 0, "mlp")) == "FFFFpaFpaFpaFpa"
    assert kinds(policy, Site("spatial", 0, "cross")) == "FFFrraFrarraFra"


def test_the_published_total_of_dit():
    """Mixed steps are partial: block 0 is full in them."""
    plan = make_plan(DuCaConfig.preset("dit-xl-ddim50", mixed_steps=True), DIT_XL)

    assert plan.flops_ratio == pytest.approx(2.49, rel=0.006)
    assert plan.flops / 1e12 == pytest.approx(9.54, rel=0.006)
    assert [i for i, step in enumerate(plan.steps) if step.is_skipped][:3] == [2, 7, 11]


def test_presets_select_as_published():
    assert DuCaConfig.preset("dit-xl-ddim50").selector.bonus == 0.8
    assert DuCaConfig.preset("opensora").selector == ScoreSelector(
        "value_norm", 0.25 / 3, shares_guidance=True
    )
    assert DuCaConfig.preset("flux-1-dev", seed=3).selector == RandomSelector(3)
    assert DuCaConfig.preset("pixart-alpha").toca.router.time_slope == 0


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (
            lambda: DuCaConfig.preset("dit-xl-ddpm250"),
            "DuCaConfig.preset: name must be one of dit-xl-ddim50, .*, got 'dit-xl-ddpm250'",
        ),
        (
            lambda: DuCaConfig(
                ToCaConfig(
                    PercentileSchedule((1.0, 1.0), 1),
                    ToCaConfig.constant(0.5, 2, 2).router,
                    RandomSelector(),
                    2,
                )
            ),
            "DuCaConfig: toca must have a schedule of cycles, got PercentileSchedule",
        ),
    ],
)
def test_what_cannot_be_is_refused(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()
