"""The runner: the work of each site in a step, the storage, and the selections."""

import pytest
import torch

from tokencache_kernels.blocks import Runner
from tokencache_kernels.errors import CacheMissError, UnsupportedInputError
from tokencache_kernels.policies import (
    Action,
    FactorRouter,
    IntervalSchedule,
    LayerGroup,
    RandomSelector,
    ScoreSelector,
    Site,
    Step,
    ToCaConfig,
    random_tokens,
)
from tokencache_kernels.testing import randn

B, N, L, STEPS = 2, 12, 3, 6
CPU = torch.device("cpu")


def lane(module, **options):
    return LayerGroup(tuple(Site("main", layer, module) for layer in range(L)), N, **options)


def toca(ratio=0.25, interval=3, weights=None, **selector):
    router = FactorRouter(ratio, module_weight=weights or {"attn": 0.0})
    return ToCaConfig(IntervalSchedule(interval), router, ScoreSelector(**selector), STEPS)


def begin(runner, *lanes):
    runner.begin_step(lanes, B, CPU)


def test_each_site_has_its_own_action():
    runner = Runner(toca(), "reference")
    actions = []
    for _ in range(STEPS):
        begin(runner, lane("attn", is_whole=True), lane("mlp"))
        actions.append([runner.action(Site("main", 1, name)) for name in ("attn", "mlp")])
        runner.end_step()

    cached = [Action.REUSE, Action.PARTIAL]
    assert actions == [[Action.FULL] * 2, cached, cached] * 2


def test_only_what_the_next_step_reuses_is_kept():
    runner = Runner(toca(interval=2), "reference")
    site = Site("main", 0, "mlp")
    x = randn(B, N, 4)

    begin(runner, lane("mlp"))
    runner.remember(site, x)
    runner.end_step()
    begin(runner, lane("mlp"))

    torch.testing.assert_close(runner.features.load(site, like=x), x, rtol=0, atol=0)
    always = Runner(toca(interval=1), "reference")
    begin(always, lane("mlp"))
    always.remember(site, x)
    with pytest.raises(CacheMissError, match="no cached output"):
        always.features.load(site, like=x)


def test_selecting_late_and_selecting_at_once_agree_while_scores_stand_still():
    lists = {}
    for late in (False, True):
        runner = Runner(toca(staleness_weight=0.1), "reference")
        lists[late] = []
        for step in range(STEPS):
            begin(runner, lane("mlp", selects_late=late))
            for site in lane("mlp").sites:
                if runner.action(site) is Action.FULL:
                    runner.store_scores(site, randn(B, N, seed=10 * step + site.layer).abs())
                    runner.remember(site, randn(B, N, 4))
                else:
                    lists[late].append(runner.selection(site))
            runner.end_step()

    assert len(lists[True]) == 4 * L
    for one, other in zip(lists[False], lists[True], strict=True):
        assert torch.equal(one[0], other[0])
        assert torch.equal(one[1], other[1])


def test_tokens_of_a_layer_that_selects_none_wait_all_the_same():
    """Layer 2 has a ratio of 0: its staleness must grow, for the steps in which it has more."""
    router = FactorRouter(0.5, num_layers=L, depth_slope=1.0, module_weight={"attn": 0.0})
    policy = ToCaConfig(IntervalSchedule(3), router, ScoreSelector(staleness_weight=1.0), STEPS)
    grown = {}
    for late in (False, True):
        runner = Runner(policy, "reference")
        begin(runner, lane("mlp", selects_late=late))
        for site in lane("mlp").sites:
            runner.remember(site, randn(B, N, 4))
        runner.end_step()
        begin(runner, lane("mlp", selects_late=late))
        for site in lane("mlp").sites:
            if runner.action(site) is Action.PARTIAL:
                runner.selection(site)
        (selection,) = runner._selections
        grown[late] = selection.tokens.staleness

    assert torch.equal(grown[False], grown[True])
    assert (grown[True][2] == 1).all()
    assert (grown[True][0] == 0).all()


def test_refreshed_scores_replace_those_of_the_tokens_named():
    runner = Runner(toca(ratio=0.25, normalize=False), "reference")
    site = Site("main", 0, "mlp")
    begin(runner, lane("mlp", selects_late=True))
    for one in lane("mlp").sites:
        runner.store_scores(one, torch.arange(N).flip(0).expand(B, N).float())
        runner.remember(one, randn(B, N, 4))
    runner.end_step()
    begin(runner, lane("mlp", selects_late=True))

    runner.refresh_scores(site, torch.tensor([[9, 11], [10, -1]]).int(), torch.full((B, 2), 50.0))
    indices, _ = runner.selection(site)

    assert indices.tolist() == [[0, 9, 11], [0, 1, 10]]


def test_lanes_that_share_scores_select_alike():
    runner = Runner(toca(ratio=0.25, weights={"cross": 1.0, "mlp": 2.0}), "reference")
    lanes = lane("cross"), lane("mlp", shares_scores=True)
    begin(runner, *lanes)
    for site in lanes[0].sites:
        runner.store_scores(site, randn(B, N, seed=site.layer).abs())
    runner.end_step()
    begin(runner, *lanes)

    for cross, mlp in zip(lanes[0].sites, lanes[1].sites, strict=True):
        few, many = (runner.selection(site)[0].tolist() for site in (cross, mlp))
        assert all(set(one) < set(other) for one, other in zip(few, many, strict=True))


def test_some_tokens_of_what_is_whole_are_refused():
    runner = Runner(toca(weights={"attn": 1.0}), "reference")

    with pytest.raises(UnsupportedInputError, match=r"got some of Site\(.*'attn'\)"):
        begin(runner, lane("attn", is_whole=True))


def test_a_run_that_changes_its_batch_is_refused():
    runner = Runner(toca(), "reference")
    begin(runner, lane("mlp"))
    runner.end_step()

    with pytest.raises(CacheMissError, match=r"was a batch of 2 .* now a batch of 3"):
        runner.begin_step((lane("mlp"),), 3, CPU)


def test_a_new_run_begins_at_the_same_addresses_and_forgets():
    runner = Runner(toca(staleness_weight=1.0), "reference")
    states, sum_of_scores = [], []
    for step in range(STEPS + 1):
        begin(runner, lane("mlp"))
        (selection,) = runner._selections
        states.append((selection.tokens.scores, selection.tokens.staleness))
        if step % STEPS == 0:
            sum_of_scores.append(states[-1][0].sum().item())
            assert states[-1][1].eq(0).all()
            runner.store_scores(lane("mlp").sites[0], randn(B, N).abs())
            runner.once("text", lambda step=step: torch.full((2,), float(step)))
            assert runner.once("text", lambda: None).tolist() == [step, step]
        runner.end_step()

    assert all(one is other for one, other in zip(states[0], states[-1], strict=True))
    assert sum_of_scores == [L * B * N] * 2


def test_drawn_tokens_are_those_of_the_selector_in_each_lane():
    runner = Runner(random_tokens(0.5, 3, STEPS, seed=4), "reference")
    lanes = lane("cross"), lane("mlp", shares_scores=True)
    for index in range(STEPS):
        begin(runner, *lanes)
        for one in lanes if index % 3 else ():
            wanted, _ = RandomSelector(4).select_(
                None, torch.zeros(L, B, N, dtype=torch.int32), None, N // 2, sites=one.sites,
                step=Step(index, STEPS), backend="reference",
            )  # fmt: skip
            for site in one.sites:
                assert torch.equal(runner.selection(site)[0], wanted[site.layer])
        runner.end_step()


def test_steps_that_launch_the_same_are_of_a_kind():
    runner = Runner(toca(interval=3), "reference")
    kinds = []
    for _ in range(2 * STEPS):
        begin(runner, lane("mlp"))
        kinds.append(runner.kind)
        runner.end_step()

    # full, partial, partial
    assert [kinds.index(kind) for kind in kinds] == [0, 1, 1] * 4


def test_a_prepared_step_that_is_finished_is_over():
    """As when a graph is replayed."""
    runner, other = (Runner(toca(staleness_weight=1.0), "reference") for _ in range(2))
    for one in (runner, other):
        begin(one, lane("mlp"))
        one.end_step()

    runner.prepare_step()
    runner.finish_step(frozenset({"text"}))
    begin(other, lane("mlp"))
    other.end_step()

    assert runner.last_index == other.last_index
    assert runner.known == {"text"}
    begin(runner, lane("mlp"))
    with pytest.raises(CacheMissError, match="now a batch of 3"):
        runner.begin_step((lane("mlp"),), 3, CPU)
