"""TokenCache on a real DiT, against laws and an independent partial step."""

import pytest
import torch
import torch.nn.functional as F

from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.integrations.diffusers import apply_token_cache, remove_token_cache
from tokencache_kernels.integrations.diffusers.interception import interceptor_of
from tokencache_kernels.learn.train_predictor import (
    make_content_predictor,
    make_table_predictor,
)
from tokencache_kernels.models import SPECS, Sizes
from tokencache_kernels.policies import (
    REUSE,
    Action,
    Decision,
    FactorRouter,
    ScoreSelector,
    ToCaConfig,
    TokenCacheConfig,
    TwoPhaseSchedule,
    cache_bytes,
    make_plan,
    model_shape,
)
from tokencache_kernels.testing import randn, tiny_dit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS, LAYERS, TOKENS = 6, 3, 64
VARIANTS = ("kv_all", "kv_cache", "sel_only")


def small_dit():
    """8 x 8 tokens, so that a block can compute some tiles of 16 and not the others."""
    return tiny_dit(LAYERS, sample_size=16)


def table(model):
    predictor = make_table_predictor(model, STEPS).requires_grad_(False)
    predictor.logits.copy_(2 * randn(STEPS, LAYERS, TOKENS) + randn(LAYERS, 1))
    predictor.importance.copy_(predictor.logits.sigmoid().sort(descending=True).values)
    return predictor


def content(model):
    predictor = make_content_predictor(model, STEPS).requires_grad_(False)
    predictor.score.weight.copy_(randn(LAYERS, 24))
    predictor.importance.copy_(randn(STEPS, LAYERS, TOKENS).sigmoid())
    return predictor


def inputs(step):
    return randn(2, 2, 16, 16, seed=10 + step), torch.full((2,), 900 - 100 * step)


def run(model, steps=range(STEPS)):
    device = next(model.parameters()).device
    outputs = []
    for step in steps:
        latents, timestep = (value.to(device) for value in inputs(step))
        with torch.no_grad():
            labels = torch.arange(2, device=device)
            outputs.append(model(latents, timestep=timestep, class_labels=labels).sample)
    return torch.stack(outputs)


def plain_run(model, policy):
    """The method in plain PyTorch, written anew: no code of the package but the predictor's."""
    blocks, outputs, features, keys = model.transformer_blocks, [], {}, {}

    def project(layer, y):
        attention = blocks[layer].attn1
        return [
            getattr(attention, name)(y).unflatten(-1, (3, 8)) for name in ("to_q", "to_k", "to_v")
        ]

    def attend(layer, q, k, v):
        weights = torch.einsum("qhe,khe->hqk", q, k).div(8**0.5).softmax(-1)
        out = torch.einsum("hqk,khe->qhe", weights, v)
        return blocks[layer].attn1.to_out[0](out.flatten(1))

    for step in range(STEPS):
        latents, timestep = inputs(step)
        labels = torch.arange(2)
        x = model.pos_embed(latents)
        c = blocks[0].norm1.emb(timestep, labels, hidden_dtype=x.dtype)
        scores = policy.predictor(x, c, step)
        for layer, block in enumerate(blocks):
            embedding = block.norm1.emb(timestep, labels, hidden_dtype=x.dtype)
            parts = block.norm1.linear(F.silu(embedding)).chunk(6, dim=1)
            for b in range(2):
                b1, g1, a1, b2, g2, a2 = (part[b] for part in parts)
                count = policy.fresh_counts[step][layer]
                if step in (0, 3, 5):
                    count = TOKENS
                chosen = scores[layer, b].argsort(descending=True, stable=True)[:count]
                y = F.layer_norm(x[b], (24,), eps=1e-6) * (1 + g1) + b1
                q, k, v = project(layer, y)
                if policy.attention == "kv_cache" and count < TOKENS:
                    old_k, old_v = keys[layer, b]
                    old_k[chosen], old_v[chosen] = k[chosen], v[chosen]
                    k, v = old_k, old_v
                keys[layer, b] = (k, v)
                if policy.attention == "sel_only":
                    k, v = k[chosen], v[chosen]
                if step == 0:
                    features[layer, b] = torch.zeros(2, TOKENS, 24)
                attention, mlp = features[layer, b]
                if count:
                    attention[chosen] = attend(layer, q[chosen], k, v)
                x[b] += a1 * attention
                y = F.layer_norm(x[b], (24,), eps=block.norm3.eps) * (1 + g2) + b2
                mlp[chosen] = block.ff(y[chosen])
                x[b] += a2 * mlp
        shift, scale = model.proj_out_1(F.silu(c)).chunk(2, dim=1)
        x = model.norm_out(x) * (1 + scale[:, None]) + shift[:, None]
        x = model.proj_out_2(x).reshape(2, 8, 8, 2, 2, 2)
        outputs.append(torch.einsum("nhwpqc->nchpwq", x).reshape(2, 2, 16, 16))
    return torch.stack(outputs)


def policy_for(predictor, **settings):
    # full in the steps 0, 3 and 5
    schedule = TwoPhaseSchedule(early_cached=2, late_cached=1, boundary=0.5)
    return TokenCacheConfig(predictor, STEPS, schedule=schedule, **settings)


@pytest.mark.parametrize("make", [table, content])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cached_steps_equal_an_independent_computation(device, variant, make):
    model = small_dit()
    policy = policy_for(make(model), attention=variant, cache_ratio=0.7)
    counts = {count for step in (1, 2, 4) for count in policy.fresh_counts[step]}
    assert counts & {16, 32, 48}
    with torch.no_grad():
        wanted = plain_run(model, policy)
    model = model.to(device)
    apply_token_cache(model, policy)

    out = run(model)

    torch.testing.assert_close(out.cpu(), wanted, rtol=2e-5, atol=2e-5)


def test_a_block_that_is_not_pruned_refreshes_its_keys_too(device):
    model = small_dit()
    policy = policy_for(table(model), attention="kv_cache", cache_ratio=0.8, pruned_share=0.7)
    assert {TOKENS, 16} <= {count for step in (1, 2) for count in policy.fresh_counts[step]}
    with torch.no_grad():
        wanted = plain_run(model, policy)
    model = model.to(device)
    apply_token_cache(model, policy)

    torch.testing.assert_close(run(model).cpu(), wanted, rtol=2e-5, atol=2e-5)


class AllFresh:
    """A policy whose cached steps recompute all tokens as if they were some."""

    def __init__(self, policy, module=None):
        self.carrier = REUSE
        self.num_layers = self.predictor = None
        self.num_inference_steps, self.selector = STEPS, ScoreSelector("none")
        self.policy, self.module = policy, module

    def decide(self, site, step, num_tokens):
        if self.policy.schedule.is_full(site, step) or site.module == self.module:
            return Decision(Action.FULL, num_tokens)
        return Decision(Action.PARTIAL, num_tokens, self.policy.attention)


@pytest.mark.parametrize("module", [None, "attn", "mlp"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_all_tokens_fresh_are_the_dense_model(device, variant, module):
    """Also where attention is in full and the MLP is not, and the other way round."""
    model = small_dit().to(device)
    dense = run(model)
    apply_token_cache(model, AllFresh(policy_for(table(model), attention=variant), module))

    torch.testing.assert_close(run(model), dense, rtol=2e-5, atol=2e-5)


def test_nothing_cached_is_the_dense_model_bit_for_bit(device):
    model = small_dit().to(device)
    dense = run(model)
    apply_token_cache(model, policy_for(table(model), cache_ratio=0.0))

    torch.testing.assert_close(run(model), dense, rtol=0, atol=0)


def test_everything_cached_is_pure_reuse(device):
    model, reused = small_dit().to(device), small_dit().to(device)
    policy = policy_for(table(model), cache_ratio=1.0)
    apply_token_cache(model, policy)
    router = FactorRouter(0.0)
    apply_token_cache(reused, ToCaConfig(policy.schedule, router, ScoreSelector("none"), STEPS))

    torch.testing.assert_close(run(model), run(reused), rtol=0, atol=0)


def test_full_steps_are_the_dense_model_bit_for_bit(device):
    model = small_dit().to(device)
    dense = run(model)
    apply_token_cache(model, policy_for(content(model).to(device)))

    out = run(model)

    torch.testing.assert_close(out[[0, 3, 5]], dense[[0, 3, 5]], rtol=0, atol=0)
    for step in (1, 2, 4):
        assert not torch.allclose(out[step], dense[step], atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_layer_like_lora_is_called_as_a_module(device, variant):
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, scaled = small_dit(), small_dit()
    predictor = table(plain)
    for one, other in zip(plain.transformer_blocks, scaled.transformer_blocks, strict=True):
        lora = Scaled(24, 24).requires_grad_(False)
        lora.load_state_dict(other.attn1.to_v.state_dict())
        other.attn1.to_v = lora
        one.attn1.to_v.weight *= 2
        one.attn1.to_v.bias *= 2
    for model in (plain, scaled):
        apply_token_cache(model.to(device), policy_for(predictor, attention=variant))

    torch.testing.assert_close(run(scaled), run(plain), rtol=1e-5, atol=1e-5)


def test_a_step_asks_the_predictor_once_and_selects_once(device, monkeypatch):
    model = small_dit().to(device)
    predictor = content(model).to(device)
    asked, selected = [], []
    predictor.register_forward_hook(lambda module, arguments, scores: asked.append(arguments[2]))
    select = ScoreSelector.select_

    def count(selector, *arguments, **named):
        selected.append(named["step"].index)
        return select(selector, *arguments, **named)

    monkeypatch.setattr(ScoreSelector, "select_", count)
    apply_token_cache(model, policy_for(predictor))

    run(model)

    assert asked == [1, 2, 4]
    assert selected == [1, 2, 4]


def test_a_step_that_reuses_everything_does_not_ask_the_predictor():
    model = small_dit()
    predictor = content(model)
    predictor.register_forward_hook(lambda *_: pytest.fail("asked"))
    apply_token_cache(model, policy_for(predictor, cache_ratio=1.0))

    run(model)


def test_a_bfloat16_model_keeps_its_dtype(device):
    model = small_dit()
    predictor = content(model).to(device)
    model = model.to(device, torch.bfloat16)
    apply_token_cache(model, policy_for(predictor, attention="kv_cache"))

    with torch.no_grad():
        for step in range(3):
            latents, timestep = (value.to(device) for value in inputs(step))
            labels = torch.arange(2, device=device)
            out = model(latents.bfloat16(), timestep=timestep, class_labels=labels).sample
            assert out.dtype == torch.bfloat16
            assert out.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_cache_of_a_run_is_as_large_as_the_plan_says(variant):
    model = small_dit()
    policy = policy_for(table(model), attention=variant)
    apply_token_cache(model, policy)
    run(model)
    runner = interceptor_of(model).session.passes()[0][1].runner
    (selection,) = runner._selections

    sizes = Sizes({"transformer_blocks": LAYERS}, 24, 3, 96)
    shape = model_shape(SPECS["DiTTransformer2DModel"], sizes, batch=2, image_tokens=TOKENS)
    assert cache_bytes(make_plan(policy, shape), shape, 4) == {
        "features": sum(buffer.nbytes for (buffer,) in runner.features._buffers.values()),
        "staleness": selection.tokens.staleness.nbytes,
        "scores": selection.tokens.scores.nbytes,
    }


def test_a_removed_cache_leaves_the_original_bit_for_bit(device):
    model = small_dit().to(device)
    dense = run(model)
    apply_token_cache(model, policy_for(table(model), attention="kv_cache"))
    run(model)

    remove_token_cache(model)

    torch.testing.assert_close(run(model), dense, rtol=0, atol=0)


def test_a_predictor_for_another_depth_is_refused_before_anything_is_hooked():
    model, deeper = small_dit(), tiny_dit(LAYERS + 1, sample_size=16)
    predictor = make_table_predictor(deeper, STEPS)
    predictor.importance.fill_(0.5)

    with pytest.raises(ValueError, match="policy must be for 3 blocks, got one for 4"):
        apply_token_cache(model, policy_for(predictor))
    assert interceptor_of(model.transformer_blocks[0]) is None


def test_a_policy_without_a_predictor_cannot_go_by_predicted_scores():
    policy = ToCaConfig.constant(0.5, 2, STEPS, selector=ScoreSelector("predicted"))

    with pytest.raises(UnsupportedInputError, match=r"none .*got 'predicted'"):
        apply_token_cache(small_dit(), policy)


def test_a_predictor_for_another_token_count_is_refused():
    model = small_dit()
    apply_token_cache(model, policy_for(table(model)))

    with pytest.raises(ValueError, match="predictor must be trained for 16 tokens, got one for 64"):
        model(randn(1, 2, 8, 8), timestep=torch.tensor([9]), class_labels=torch.tensor([1]))
