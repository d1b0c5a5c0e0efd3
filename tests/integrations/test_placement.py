"""The place of a call in its run, from its arguments."""

import pytest
import torch

from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.integrations.diffusers.placement import (
    Conditioning,
    Table,
    Timestep,
    Tracker,
    read_timestep,
)

STEPS = 6


def follow(timesteps, table=None, time_rises=False, steps=STEPS, rescales=True):
    tracker = Tracker(time_rises)
    return [
        tracker.locate(Timestep(float(time)), table, None, steps, rescales) for time in timesteps
    ]


def places(found):
    return [(place.index, place.begins) for place in found]


def test_steps_are_counted_within_a_run_and_a_run_begins_where_time_turns_back():
    found = places(follow([900, 800, 700, 950, 850]))

    assert found == [(0, True), (1, False), (2, False), (0, True), (1, False)]


@pytest.mark.parametrize("time_rises", [True, None])
def test_time_may_rise(time_rises):
    found = places(follow([0.1, 0.2, 0.3, 0.1], time_rises=time_rises))

    assert found == [(0, True), (1, False), (2, False), (0, True)]


def test_the_first_step_once_more_is_a_new_run():
    assert places(follow([900, 900, 800])) == [(0, True), (0, True), (1, False)]


def test_a_later_step_once_more_is_refused():
    with pytest.raises(UnsupportedInputError, match=r"at timestep 800 .* name each"):
        follow([900, 800, 800])


def test_a_scheduler_that_evaluates_a_timestep_twice_says_so_in_its_table():
    table = Table(torch.tensor([900.0, 800, 800, 700, 700]))

    found = follow([900, 800, 800, 700, 700], table)

    assert places(found) == [(0, True), *((index, False) for index in range(1, 5))]
    assert {place.total for place in found} == {5}


def test_a_table_tells_where_an_image_to_image_run_begins():
    table = Table(torch.linspace(1000, 100, 10))

    found = follow([500, 400], table)

    assert [(place.index, place.total, place.begins) for place in found] == [
        (5, 10, True), (6, 10, False),
    ]  # fmt: skip


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_timesteps_are_found_as_pipelines_round_them(scale, dtype):
    timesteps = torch.linspace(1000, 20, 50)
    table, tracker = Table(timesteps), Tracker(False)

    for index, time in enumerate(timesteps):
        given = read_timestep((time / scale).to(dtype).expand(2))
        assert tracker.locate(given, table, None, STEPS, True).index == index


def test_another_table_begins_a_run_where_the_timestep_would_go_on():
    tracker = Tracker(False)
    first, second = Table(torch.tensor([900.0, 800, 700])), Table(torch.tensor([700.0, 600]))
    for time in (900, 800):
        tracker.locate(Timestep(time), first, None, STEPS, True)

    place = tracker.locate(Timestep(700), second, None, STEPS, True)

    assert (place.index, place.total, place.begins) == (0, 2, True)


def test_a_run_longer_than_the_policy_is_refused_where_its_length_is_not_known():
    with pytest.raises(UnsupportedInputError, match="goes on behind the 6 steps of the policy"):
        follow(range(900, 200, -100))


def test_an_exact_policy_refuses_another_number_of_steps():
    with pytest.raises(UnsupportedInputError, match="is for 6 steps, but the sampler takes 3"):
        follow([900], Table(torch.tensor([900.0, 800, 700])), rescales=False)


def test_a_caller_may_say_the_place():
    tracker = Tracker(False)

    found = [tracker.locate(None, None, told, STEPS, True) for told in ((2, 8), (3, 8), (7, 8))]

    assert [(place.index, place.begins) for place in found] == [(2, True), (3, False), (7, True)]


def test_conditioning_is_told_by_identity_and_by_value():
    text = torch.randn(2, 3)
    kept = Conditioning({"text": text})

    assert kept.is_same({"text": text})
    assert kept.is_same({"text": text.clone()})
    assert not kept.is_same({"text": text + 1})
    assert not kept.is_same({})
    text += 1
    assert not kept.is_same({"text": text})


def test_a_timestep_for_each_token_counts_by_the_largest():
    assert read_timestep(torch.tensor([[0.0, 900.0], [0.0, 900.0]])).value == 900
