import math

import pytest
import torch

from tokencache_kernels.policies import RandomSelector, ScoreSelector, Site, Step, ToCaConfig
from tokencache_kernels.testing import distinct_scores, randn

SITES = [Site("main", layer, "mlp") for layer in range(2)]
STEP = Step(1, 8)


def fresh_staleness(L=2, B=2, N=12):
    return torch.zeros(L, B, N, dtype=torch.int32)


def select(selector, scores, staleness, num_fresh=4, step=STEP, grid=None, sites=SITES):
    return selector.select_(scores, staleness, None, num_fresh, sites=sites, step=step, grid=grid)


def test_score_selector_takes_the_highest_in_ascending_order():
    scores = distinct_scores(2, 2, 12)

    indices, positions = select(ScoreSelector(), scores, fresh_staleness())

    wanted = scores.argsort(-1, descending=True)[..., :4].sort(-1).values
    assert torch.equal(indices.long(), wanted)
    assert torch.equal(positions.gather(-1, wanted), torch.arange(4).int().expand(2, 2, 4))


def test_constant_scores_visit_every_token_before_any_returns():
    selector, staleness = ScoreSelector(staleness_weight=0.25 / 3), fresh_staleness(N=12)
    scores = torch.ones(2, 2, 12)

    visited = [select(selector, scores, staleness, 4)[0] for _ in range(3)]

    assert torch.equal(torch.cat(visited, -1), torch.arange(12).int().expand(2, 2, 12))


def test_without_staleness_a_shorter_list_is_part_of_a_longer_one():
    scores, staleness = distinct_scores(2, 2, 12), fresh_staleness()

    lists = [select(ScoreSelector(), scores, staleness, count)[0] for count in (3, 3, 7)]

    assert torch.equal(lists[0], lists[1])
    assert set(lists[0][0, 0].tolist()) < set(lists[2][0, 0].tolist())


def test_the_bonus_goes_to_the_best_of_each_tile():
    # 2 x 4 tokens, two tiles; without the bonus the right tile holds the three highest scores
    scores = torch.tensor([[[0.5, 0.1, 0.6, 0.61], [0.1, 0.1, 0.62, 0.1]]]).reshape(1, 1, 8)
    site = SITES[:1]

    plain, _ = select(ScoreSelector(), scores, fresh_staleness(1, 1, 8), 2, sites=site)
    spread, _ = select(
        ScoreSelector(bonus=0.6), scores, fresh_staleness(1, 1, 8), 2, grid=(2, 4), sites=site
    )

    assert plain.tolist() == [[[3, 6]]]
    assert spread.tolist() == [[[0, 6]]]


def test_no_base_score_leaves_staleness_alone_to_decide():
    staleness = fresh_staleness()
    staleness[..., 5:9] = 3

    indices, _ = select(ScoreSelector("none", staleness_weight=0.1), None, staleness)

    assert torch.equal(indices, torch.arange(5, 9).int().expand(2, 2, 4))
    assert staleness[..., 5:9].eq(0).all()
    assert staleness[..., :5].eq(1).all()


def test_shared_entropy_is_that_of_the_mean_map():
    text = 6
    maps = randn(4, 9, text).softmax(-1)
    halves = torch.zeros(2, 9, 2, text)
    halves[:, :, 0] = maps[:2] / 2
    halves[:, :, 1] = maps[2:] / 2
    joint = halves.flatten(2)
    wanted = 1 - (joint * joint.clamp_min(1e-30).log()).sum(-1)
    entropy = -(maps * maps.log()).sum(-1)
    selector = ScoreSelector("attention_entropy", shares_guidance=True, staleness_weight=0.05)
    staleness, other = fresh_staleness(1, 4, 9), fresh_staleness(1, 4, 9)
    staleness[..., ::2] = other[..., ::2] = 2

    indices, _ = select(selector, entropy[None], staleness, 3, sites=SITES[:1])

    plain = ScoreSelector(staleness_weight=0.05)
    expected, _ = select(plain, wanted.repeat(2, 1)[None], other, 3, sites=SITES[:1])
    assert torch.equal(indices, expected)
    assert torch.equal(indices[:, :2], indices[:, 2:])


def test_entropy_that_is_not_shared_is_chosen_per_sample():
    scores = distinct_scores(2, 2, 12)

    indices, _ = select(ScoreSelector("attention_entropy"), scores, fresh_staleness())

    assert torch.equal(indices, select(ScoreSelector(), scores, fresh_staleness())[0])


def test_staleness_grows_also_when_nothing_is_selected():
    staleness = fresh_staleness()

    for _ in range(2):
        select(ToCaConfig.preset("dit-xl-ddim50").selector, torch.ones(2, 2, 12), staleness, 0,
               grid=(3, 4))  # fmt: skip

    assert staleness.eq(2).all()


def test_random_lists_do_not_depend_on_the_features():
    selector = RandomSelector(seed=7)

    first, _ = select(selector, None, fresh_staleness())
    again, _ = select(selector, randn(2, 2, 12), fresh_staleness() + 5)

    assert torch.equal(first, again)
    assert first.diff(dim=-1).gt(0).all()
    assert first.ge(0).all()


def test_random_lists_differ_by_seed_step_site_and_sample():
    def draw(seed=0, step=STEP, sites=SITES, shares_guidance=True):
        selector = RandomSelector(seed, shares_guidance)
        return select(selector, None, fresh_staleness(2, 4, 64), 16, step=step, sites=sites)[0]

    lists = draw()

    assert not torch.equal(lists, draw(seed=1))
    assert not torch.equal(lists, draw(step=Step(2, 8)))
    assert not torch.equal(lists[0], lists[1])
    assert not torch.equal(lists[:, 0], lists[:, 1])
    assert torch.equal(lists.flip(0), draw(sites=SITES[::-1]))
    assert torch.equal(lists[:, :2], lists[:, 2:])
    apart = draw(shares_guidance=False)
    assert not torch.equal(apart[:, :2], apart[:, 2:])


def test_random_tokens_are_drawn_evenly():
    counts = torch.zeros(40)
    selector = RandomSelector()
    for index in range(200):
        staleness = fresh_staleness(1, 2, 40)
        indices, _ = select(selector, None, staleness, 10, step=Step(index, 200), sites=SITES[:1])
        counts[indices[0, 0].long()] += 1

    # binomial(200, 1/4): mean 50, deviation 6.1
    assert counts.sum() == 2000
    assert (counts - 50).abs().max() < 5 * math.sqrt(200 * 0.25 * 0.75)


@pytest.mark.parametrize(
    ("act", "sentence"),
    [
        (lambda: ScoreSelector("norm"), "base_score must be one of attention_received, .*'norm'"),
        (lambda: ScoreSelector(tile=0), "tile must be at least 1, got 0"),
        (lambda: ScoreSelector(bonus=-1.0), "bonus must be finite and not negative, got -1.0"),
        (
            lambda: ScoreSelector(staleness_weight=math.nan),
            "staleness_weight must be finite and not negative, got nan",
        ),
        (
            lambda: select(ScoreSelector(), None, fresh_staleness()),
            "scores must hold the attention_received, got None",
        ),
        (
            lambda: select(ScoreSelector(bonus=0.6), torch.ones(2, 2, 12), fresh_staleness()),
            "grid must be given for a spatial bonus, got None",
        ),
        (
            lambda: select(RandomSelector(), None, fresh_staleness(B=3)),
            "shares_guidance must be False for an odd batch, got 3 samples",
        ),
    ],
)
def test_a_wrong_setting_is_named(act, sentence):
    with pytest.raises(ValueError, match=sentence):
        act()
