from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokencache_kernels.policies import (
    Action,
    AdaptiveSchedule,
    DuCaConfig,
    IntervalSchedule,
    LearningToCacheConfig,
    Site,
    Step,
    StepSchedule,
    ToCaConfig,
    fora,
    taylor_seer,
)

SITE = Site("main", 0, "mlp")
LATER = Site("main", 5, "mlp")


def full_steps(schedule, total, site=SITE):
    return [index for index in range(total) if schedule.is_full(site, Step(index, total))]


def schedule_of(name, **overrides):
    return ToCaConfig.preset(name, **overrides).schedule


def walk_dit(total, interval):
    """The published loop: counts down, block 0 updates tau and later blocks see the update."""
    tau = interval
    for s in range(total - 1, -1, -1):
        blocks = []
        for block in range(3):
            full = s == total - 1 or s % tau == 0
            if full and block == 0:
                if int(0.2 * total) <= s < int(0.4 * total):
                    tau = 2
                else:
                    tau = int(np.round(np.float32(interval / (1.4 - 0.8 * s / total))))
            blocks.append(full)
        yield blocks


def walk_pixart(total, interval):
    """The published loop: counts up, every block of a full step updates tau."""
    tau = interval
    for s in range(total):
        blocks = []
        for _ in range(3):
            full = s == 0 or s % tau == 0
            if full:
                tau = int(np.round(np.float32(interval / (0.8 + 0.4 * s / total))))
            blocks.append(full)
        yield blocks


def walk_flux(total, interval):
    """The published counter: three full steps, then one whenever it has reached N - 1."""
    counter = 0
    for s in range(total):
        full = s <= 2 or counter == interval - 1
        counter = 0 if full else counter + 1
        yield full


@pytest.mark.parametrize("total", [1, 2, 5, 20, 28, 50, 100, 137, 250])
@pytest.mark.parametrize("interval", [1, 2, 3, 4, 5, 6, 9])
@pytest.mark.parametrize(
    ("preset", "walk"), [("dit-xl-ddim50", walk_dit), ("pixart-alpha", walk_pixart)]
)
def test_mixed_steps_equal_the_published_loop(preset, walk, interval, total):
    schedule = schedule_of(preset, refresh_interval=interval, mixed_steps=True)

    steps = [Step(index, total) for index in range(total)]
    first = [schedule.is_full(SITE, step) for step in steps]
    later = [schedule.is_full(LATER, step) for step in steps]

    assert list(zip(first, later, later, strict=True)) == [tuple(s) for s in walk(total, interval)]


@pytest.mark.parametrize("preset", ["dit-xl-ddim50", "pixart-alpha"])
def test_by_default_block_0_speaks_for_all(preset):
    once = schedule_of(preset, refresh_interval=4)
    mixed = schedule_of(preset, refresh_interval=4, mixed_steps=True)

    assert full_steps(once, 50, LATER) == full_steps(once, 50, SITE) == full_steps(mixed, 50, SITE)
    assert set(full_steps(mixed, 50, LATER)) < set(full_steps(once, 50, LATER))


@pytest.mark.parametrize(
    ("preset", "interval", "total", "full", "block_0_only"),
    [
        pytest.param(
            "dit-xl-ddim50", 3, 50,
            [49, 44, 40, 36, 30, 27, 24, 21, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0], [45, 32],
            id="dit-N3",
        ),
        pytest.param(
            "dit-xl-ddim50", 4, 50,
            [49, 48, 40, 35, 28, 24, 20, 16, 14, 12, 10, 6, 3, 0], [42, 30, 8],
            id="dit-N4",
        ),
    ],
)  # fmt: skip
def test_published_dit_schedules(preset, interval, total, full, block_0_only):
    schedule = schedule_of(preset, refresh_interval=interval, mixed_steps=True)

    later = full_steps(schedule, total, LATER)
    first = full_steps(schedule, total, SITE)

    assert [total - 1 - index for index in later] == full
    assert [total - 1 - index for index in first if index not in later] == block_0_only


def test_published_ddpm250_schedule():
    schedule = schedule_of("dit-xl-ddpm250", mixed_steps=True)

    later = full_steps(schedule, 250, LATER)
    first = full_steps(schedule, 250, SITE)

    assert len(later) == 72
    assert [249 - i for i in later[:10]] == [249, 240, 234, 228, 222, 216, 210, 205, 200, 195]
    assert [249 - i for i in first if i not in later] == [245, 155]


def test_published_pixart_schedule():
    schedule = schedule_of("pixart-alpha", mixed_steps=True)

    assert full_steps(schedule, 20, LATER) == [0, 6, 9, 12, 15, 18]
    assert full_steps(schedule, 20, SITE) == [0, 4, 6, 9, 12, 15, 18]


def test_published_opensora_schedule_has_its_own_cycle_per_module():
    schedule = schedule_of("opensora")

    for module in ("attn", "mlp"):
        site = Site("temporal", 3, module)
        assert full_steps(schedule, 30, site) == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27]
    assert full_steps(schedule, 30, Site("spatial", 3, "cross")) == [0, 1, 2, 6, 12, 18, 24]


@pytest.mark.parametrize(("interval", "last", "count"), [(4, 46, 14), (5, 47, 12), (6, 44, 10)])
def test_published_flux_schedule(interval, last, count):
    steps = full_steps(schedule_of("flux-1-dev", refresh_interval=interval), 50)

    assert steps == [0, 1, *range(2, last + 1, interval)]
    assert len(steps) == count


@given(total=st.integers(1, 300), interval=st.integers(1, 12))
def test_flux_schedule_equals_the_published_counter(total, interval):
    schedule = schedule_of("flux-1-dev", refresh_interval=interval)

    assert [schedule.is_full(SITE, Step(i, total)) for i in range(total)] == list(
        walk_flux(total, interval)
    )


@given(total=st.integers(1, 100), interval=st.integers(1, 12))
def test_fora_is_full_at_every_nth_step(total, interval):
    assert full_steps(IntervalSchedule(interval), total) == list(range(0, total, interval))


def test_dit_without_fresh_tokens_counts_down_in_even_cycles():
    schedule = schedule_of("dit-xl-ddim50", fresh_ratio=0.0, refresh_interval=4)

    assert [49 - i for i in full_steps(schedule, 50)] == [49, *range(48, -1, -4)]


@given(
    schedule=st.one_of(
        st.builds(
            AdaptiveSchedule,
            refresh_interval=st.integers(1, 20),
            slope=st.floats(-0.99, 0.99),
            counts_down=st.booleans(),
            dense_window=st.sampled_from([None, (0.2, 0.4), (0.0, 1.0)]),
            mixed_steps=st.booleans(),
        ),
        st.builds(
            IntervalSchedule,
            refresh_interval=st.integers(1, 20),
            warmup=st.integers(1, 4),
            phase=st.integers(0, 3),
            module_multiple=st.sampled_from([{}, {"mlp": 2}]),
        ),
    ),
    total=st.integers(1, 60),
    layer=st.integers(0, 4),
)
def test_the_first_step_is_always_full(schedule, total, layer):
    assert schedule.is_full(Site("main", layer, "mlp"), Step(0, total))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: IntervalSchedule(0), "refresh_interval must be at least 1, got 0"),
        (lambda: IntervalSchedule(2, warmup=0), "warmup must be at least 1, got 0"),
        (
            lambda: IntervalSchedule(2, module_multiple={"mlp": 0}),
            "module_multiple must be at least 1, got {'mlp': 0}",
        ),
        (lambda: AdaptiveSchedule(0, 0.4, True), "refresh_interval must be at least 1, got 0"),
        (lambda: AdaptiveSchedule(3, 1.0, True), r"slope must be in \(-1, 1\), got 1.0"),
        (
            lambda: AdaptiveSchedule(3, 0.4, True, (0.4, 0.2)),
            r"dense_window must be two rising shares in \[0, 1\], got \(0.4, 0.2\)",
        ),
        (lambda: Step(5, 5), r"Step: index must be in \[0, total = 5\), got 5"),
    ],
)
def test_a_wrong_setting_is_named(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        build()


@pytest.mark.parametrize(
    "policy",
    [
        ToCaConfig.preset("dit-xl-ddim50", refresh_interval=4, last_step_full=True),
        DuCaConfig.preset("flux-1-dev", last_step_full=True),
        fora(4, 50, last_step_full=True),
        taylor_seer(5, 50, last_step_full=True),
        ToCaConfig.constant(0.1, 4, 50, last_step_full=True),
        LearningToCacheConfig(-torch.ones(50, 12), last_step_full=True),
    ],
    ids=lambda policy: type(policy).__name__,
)
def test_the_last_step_is_full_by_name_and_no_other_step_changes(policy):
    schedule = getattr(policy, "toca", policy)
    published = (
        replace(policy, last_step_full=False)
        if isinstance(policy, LearningToCacheConfig)
        else replace(schedule, schedule=schedule.schedule.schedule)
    )

    for index in range(49):
        step = Step(index, 50)
        actions = [one.decide(SITE, step, 64).action for one in (schedule, published)]
        assert actions[0] is actions[1]
    assert policy.decide(SITE, Step(49, 50), 64).action is Action.FULL


def test_full_steps_by_name_are_the_steps_and_places_count_from_them():
    schedule = StepSchedule((0, 3, 4, 9), 10)

    assert full_steps(schedule, 10) == full_steps(schedule, 10, LATER) == [0, 3, 4, 9]
    places = [schedule.place(Step(index, 10)) for index in range(10)]
    assert places == [0, 1, 2, 0, 0, 1, 2, 3, 4, 0]


@pytest.mark.parametrize(("num_full", "total"), [(1, 7), (2, 7), (5, 7), (7, 7), (12, 50)])
def test_even_steps_begin_and_end_full(num_full, total):
    steps = StepSchedule.even(num_full, total).steps

    assert len(steps) == num_full
    assert steps[0] == 0
    assert num_full == 1 or steps[-1] == total - 1
    gaps = np.diff(steps)
    assert num_full == 1 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ((), r"StepSchedule: steps must ascend from 0 without repetition, got \(\)"),
        ((1, 2), "must ascend from 0"),
        ((0, 2, 2), "without repetition"),
        ((0, 5, 3), "must ascend"),
        ((0, 10), "must be below total = 10"),
    ],
)
def test_sets_of_full_steps_that_are_none_are_refused(steps, sentence):
    with pytest.raises(ValueError, match=sentence):
        StepSchedule(steps, 10)


def test_full_steps_for_another_number_of_steps_are_refused_and_not_rescaled():
    with pytest.raises(ValueError, match="total must be 20, the sampler's, got 10"):
        StepSchedule((0, 5), 10).is_full(SITE, Step(0, 20))
