"""Decisions that are read back, and tokens that the caller chooses."""

import pytest
import torch

from tokencache_kernels.integrations.diffusers import (
    apply,
    apply_token_cache,
    count_graph_steps,
    inspect_token_cache,
    token_cache_context,
)
from tokencache_kernels.policies import (
    Action,
    FactorRouter,
    GivenSelector,
    IntervalSchedule,
    RandomSelector,
    Site,
    ToCaConfig,
    fora,
)
from tokencache_kernels.testing import Tape, tiny_dit
from tokencache_kernels.testing.families import FAMILIES

# diffusers deprecates parts of its own models
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 6
MASK = torch.zeros(16, dtype=torch.bool).index_fill_(0, torch.tensor([3, 5, 10, 11]), True)


def given_policy(mask=MASK, ratio=0.25):
    router = FactorRouter(ratio, module_weight={"attn": 0.0, "cross": 1.0})
    return ToCaConfig(IntervalSchedule(3), router, GivenSelector(mask), STEPS)


def call(model, name, step):
    with torch.no_grad():
        model(**FAMILIES[name].inputs(step, 0, 2), return_dict=False)


@pytest.mark.parametrize(
    "name", ["DiTTransformer2DModel", "PixArtTransformer2DModel", "SD3Transformer2DModel"]
)
def test_the_tokens_of_a_mask_are_fresh_and_no_others(name):
    model = FAMILIES[name].build()
    apply_token_cache(model, given_policy())
    stream = "double" if name.startswith("SD3") else "main"

    for step in range(3):
        call(model, name, step)
        (run,) = inspect_token_cache(model)
        mlp = run.sites[Site(stream, 1, "mlp")]
        assert run.step.index == step
        assert mlp.action is (Action.PARTIAL if step else Action.FULL)
        wanted = MASK if step else torch.ones_like(MASK)
        assert torch.equal(mlp.is_fresh, wanted.expand(2, -1))
        assert torch.equal(mlp.staleness, (~wanted).expand(2, -1).int() * step)

    assert mlp.indices(1).tolist() == [3, 5, 10, 11]
    assert run.sites[Site(stream, 1, "attn")].is_fresh is None


def test_a_mask_for_each_sample_and_a_joined_sequence():
    masks = torch.stack([MASK, MASK.flip(0)])
    selector = GivenSelector(masks)
    staleness = torch.zeros(1, 2, 21, dtype=torch.int32)

    scores = selector.draw_scores([Site("single", 0, "mlp")], None, staleness)
    last = GivenSelector(masks, is_text_first=False).draw_scores([], None, staleness)

    assert torch.equal(scores[0, :, 5:].bool(), masks)
    assert not scores[..., :5].any()
    assert torch.equal(last[0, :, :16].bool(), masks)
    # a text is shorter than the picture
    assert not selector.draw_scores([], None, staleness[..., :5]).any()


@pytest.mark.parametrize(
    ("mask", "sentence"),
    [
        (torch.zeros(4), r"mask must be bool of shape \(M,\) or \(B, M\), got torch.float32"),
        (torch.zeros(1, 2, 3, dtype=torch.bool), r"got torch.bool of shape \(1, 2, 3\)"),
    ],
)
def test_what_is_no_mask_is_refused(mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        GivenSelector(mask)


def test_masks_of_another_batch_are_refused():
    selector = GivenSelector(MASK.expand(3, -1))

    with pytest.raises(ValueError, match="mask must have 2 rows, as the batch, got 3"):
        selector.draw_scores([], None, torch.zeros(1, 2, 16, dtype=torch.int32))


def test_replayed_steps_are_read_like_others(monkeypatch):
    """A tape stands for CUDA."""
    monkeypatch.setattr(apply, "CudaCapture", Tape)
    name = "DiTTransformer2DModel"
    models = [tiny_dit(), tiny_dit()]
    router = FactorRouter(0.4, module_weight={"attn": 0.0})
    selector = RandomSelector(shares_guidance=False)
    policy = ToCaConfig(IntervalSchedule(3), router, selector, STEPS)
    for model, is_captured in zip(models, (True, False), strict=True):
        apply_token_cache(model, policy, cuda_graphs=is_captured)

    for step in range(3 * STEPS):
        seen = []
        for model in models:
            call(model, name, step % STEPS)
            (run,) = inspect_token_cache(model)
            seen.append(run)
        captured, plain = seen
        assert captured.step == plain.step
        for site, one in plain.sites.items():
            other = captured.sites[site]
            assert one.action is other.action
            if one.is_fresh is not None:
                assert torch.equal(one.is_fresh, other.is_fresh)
                assert torch.equal(one.staleness, other.staleness)
    assert count_graph_steps(models[0]).replayed > STEPS


def test_runs_are_told_by_context_and_none_is_there_before_the_first_step():
    model = tiny_dit()
    with pytest.raises(ValueError, match="transformer must have a token cache, got one without"):
        inspect_token_cache(model)
    apply_token_cache(model, fora(3, STEPS))
    assert inspect_token_cache(model) == []

    for context in ("cond", "uncond"):
        with token_cache_context(model, context):
            call(model, "DiTTransformer2DModel", 0)

    assert [run.context for run in inspect_token_cache(model)] == ["cond", "uncond"]
    with pytest.raises(ValueError, match="site must have selected tokens"):
        inspect_token_cache(model)[0].sites[Site("main", 0, "mlp")].indices(0)
