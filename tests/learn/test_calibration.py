"""Calibration on a small sampler in float64 whose answers can be had otherwise."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.learn import calibration
from tokencache_kernels.learn.calibration import (
    Candidate,
    Settings,
    calibrate,
    choose_steps,
    judge_table,
    record,
    solve_table,
)
from tokencache_kernels.policies import StepTable, Taylor

T, D = 8, 24


class Velocity(nn.Module):
    """A velocity that depends on the latents, and that bends over time."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(D, D, generator=generator).double() / D**0.5)

    def forward(self, hidden_states, time):
        return torch.sin(hidden_states @ self.mix + 2 * time) + time**2


@pytest.fixture
def model():
    return Velocity().requires_grad_(False)


def make_latents(seeds):
    generator = torch.Generator()
    rows = [torch.randn(D, generator=generator.manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).double()


@pytest.fixture
def sample(model):
    """An Euler sampler."""

    def draw(seeds):
        latents = make_latents(seeds)
        for index in range(T):
            latents = 0.98 * latents + 0.1 * model(latents, torch.tensor(index / T))
        return latents

    return draw


@pytest.fixture
def guided(model):
    """The same with guidance: a batch of two halves, the second at another time."""

    def draw(seeds):
        latents = make_latents(seeds)
        shift = torch.cat([torch.zeros(len(seeds), 1), torch.ones(len(seeds), 1)]).double()
        for index in range(T):
            both = model(torch.cat([latents, latents]), index / T + 0.3 * shift)
            one, other = both.chunk(2)
            latents = 0.98 * latents + 0.1 * (other + 1.5 * (one - other))
        return latents

    return draw


def test_a_recording_knows_how_the_sampler_steps(model, sample, guided):
    plain, halves = record(model, sample, range(5), T), record(model, guided, range(5), T)

    for one in plain.transitions:
        assert one == pytest.approx((0.98, 0.1), rel=1e-6)
    for one in halves.transitions:
        assert one == pytest.approx((0.98, 0.15, -0.05), rel=1e-5)
    assert len(plain.latents) == T + 1
    assert "forward" not in vars(model)


def test_samplers_that_are_not_linear_or_call_otherwise_are_refused(model, sample):
    with pytest.raises(UnsupportedInputError, match=f"in each of {T + 1} steps, got {T}"):
        record(model, sample, range(3), T + 1)

    def noisy(seeds):
        latents = make_latents(seeds)
        for index in range(T):
            latents = model(latents, torch.tensor(0.1)) + make_latents([s + index for s in seeds])
        return latents

    with pytest.raises(UnsupportedInputError, match="must be linear in its latents"):
        record(model, noisy, range(3), T)
    assert "forward" not in vars(model)


@pytest.mark.parametrize("draw", ["sample", "guided"])
def test_every_step_lands_as_near_to_dense_as_the_outputs_allow(model, draw, request):
    """An independent sampler that solves by lstsq at every step gives the same samples."""
    draw = request.getfixturevalue(draw)
    seeds, full = range(6), (0, 2, 5)
    recording = record(model, draw, seeds, T)

    judged = solve_table(model, draw, seeds, recording, Candidate(full, 2, True), 2.0)

    again = judge_table(model, draw, seeds, recording.samples, judged.table, 2.0)
    torch.testing.assert_close(again.psnr, judged.psnr, rtol=1e-5, atol=1e-3)
    latents, kept = recording.latents[0], []
    halves = len(recording.outputs[0])
    for index in range(T):
        if index in full:
            times = [index / T] if halves == 1 else [index / T, index / T + 0.3]
            outputs = [Velocity.forward(model, latents, torch.tensor(time)) for time in times]
            scale = (1.0,) if halves == 1 else (1.5, -0.5)
            kept.append(sum(s * o for s, o in zip(scale, outputs, strict=True)))
        velocity = kept[-1]
        if index > 0:
            basis = torch.stack([one.flatten() for one in (*kept[-2:], latents)], dim=1)
            wanted = (recording.latents[index + 1] - 0.98 * latents) / 0.1
            velocity = basis @ torch.linalg.lstsq(basis, wanted.flatten()[:, None]).solution
            velocity = velocity.reshape(latents.shape)
        latents = 0.98 * latents + 0.1 * velocity
    psnr = calibration.measure_psnr(latents, recording.samples, 2.0)
    torch.testing.assert_close(judged.psnr, psnr, rtol=1e-4, atol=1e-2)


def test_solved_weights_beat_reuse_on_unseen_seeds(model, sample):
    seeds, unseen, full = range(12), range(100, 110), (0, 2, 4, 6)
    recording = record(model, sample, seeds, T)

    solved = solve_table(model, sample, seeds, recording, Candidate(full, 3, True), 2.0)

    dense = sample(unseen)
    reuse = StepTable.from_carrier(full, Taylor(0), T)
    scores = [
        judge_table(model, sample, unseen, dense, table, 2.0).psnr
        for table in (solved.table, reuse)
    ]
    assert (scores[0] > scores[1]).all()


def test_dynamic_programming_finds_the_cheapest_set(model, sample):
    recording = record(model, sample, range(4), T)
    settings = Settings(T, 4)

    steps = choose_steps(recording, settings)

    costs = calibration._tabulate_gaps(recording, settings)

    def cost(steps):
        ends = (*steps[1:], T)
        return sum(
            costs.get((steps[max(place - 1, 0) : place + 1], end), 0.0)
            for place, end in enumerate(ends)
        )

    sets = [(0, a, b, c) for a in range(1, T) for b in range(a + 1, T) for c in range(b + 1, T)]
    assert cost(steps) == pytest.approx(min(map(cost, sets)))


def test_a_search_improves_and_is_judged_on_unseen_seeds(model, sample):
    settings = Settings(T, 4, trials=12)

    judged = calibrate(model, sample, settings, range(6), range(50, 55), peak=2.0, facts={"a": 1})

    recording = record(model, sample, range(6), T)
    even = Candidate((0, 2, 5, 7), 3, True)
    first = solve_table(model, sample, range(6), recording, even, 2.0)
    facts = judged.table.facts
    assert facts["a"] == 1
    assert facts["psnr_seen"]["mean"] + facts["psnr_seen"]["worst"] >= (
        first.psnr.mean() + first.psnr.min() - 0.02
    )
    again = judge_table(model, sample, range(50, 55), sample(range(50, 55)), judged.table, 2.0)
    torch.testing.assert_close(again.psnr, judged.psnr, rtol=1e-5, atol=1e-3)
    assert facts["psnr_unseen"]["worst"] == pytest.approx(float(again.psnr.min()), abs=0.01)
    assert len(judged.table.full_steps) == 4


def test_a_search_that_was_broken_off_goes_on(model, sample, tmp_path, monkeypatch):
    settings = Settings(T, 3, trials=10)
    whole = calibrate(model, sample, settings, range(4), range(50, 53), peak=2.0)
    calls = []
    solve = calibration.solve_table

    def count(*arguments):
        calls.append(arguments)
        if len(calls) == 7:
            raise KeyboardInterrupt
        return solve(*arguments)

    monkeypatch.setattr(calibration, "solve_table", count)
    path = tmp_path / "state"
    run = {"peak": 2.0, "state_path": path}
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, sample, settings, range(4), range(50, 53), **run)
    with path.open("a") as file:
        file.write('{"key": "cut sh')
    calls.clear()

    resumed = calibrate(model, sample, settings, range(4), range(50, 53), **run)

    assert len(calls) < 7
    assert resumed.table.weights == whole.table.weights
    assert all(json.loads(line)["score"] for line in path.read_text().splitlines()[:6])


def test_one_full_step_and_all_full_steps_need_no_search(model, sample):
    for num_full in (1, T):
        settings = Settings(T, num_full, trials=30)
        judged = calibrate(model, sample, settings, range(3), range(50, 52), peak=2.0)
        assert judged.table.full_steps == tuple(range(num_full))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_full": 0}, r"Settings: num_full must be in \[1, 8\], got 0"),
        ({"num_full": 9}, r"num_full must be in \[1, 8\], got 9"),
        ({"trials": 0}, "trials must be at least 1"),
        ({"histories": ()}, "histories must be numbers of at least 1"),
        ({"tail_share": 2.0}, r"tail_share must be in \[0, 1\]"),
    ],
)
def test_searches_that_cannot_be_are_refused(changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        replace(Settings(T, 4), **changes)


def test_seeds_to_judge_on_are_others(model, sample):
    with pytest.raises(ValueError, match="unseen_seeds must have none of the seeds"):
        calibrate(model, sample, Settings(T, 4), range(5), range(4, 8), peak=2.0)
