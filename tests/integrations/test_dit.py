"""``apply_token_cache`` on a real DiT, against laws and an independent partial step."""

import copy

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import AttnProcessor2_0

from tokencache_kernels import ops
from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.integrations.diffusers import (
    apply_token_cache,
    remove_token_cache,
    reset_token_cache,
    token_cache_context,
)
from tokencache_kernels.policies import (
    AdaptiveSchedule,
    FactorRouter,
    IntervalSchedule,
    ScoreSelector,
    ToCaConfig,
    fora,
    random_tokens,
)
from tokencache_kernels.testing import randn, tiny_dit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 7


def inputs(step, batch=2, device="cpu"):
    latents = randn(batch, 2, 8, 8, seed=10 + step, device=device)
    timestep = torch.full((batch,), 900 - 100 * step, device=device)
    labels = torch.arange(batch, device=device) % 10
    return latents, timestep, labels


def run(model, steps=range(STEPS), batch=2, pick=slice(None)):
    device = next(model.parameters()).device
    outputs = []
    for step in steps:
        latents, timestep, labels = (value[pick] for value in inputs(step, batch, device))
        with torch.no_grad():
            outputs.append(model(latents, timestep=timestep, class_labels=labels).sample)
    return torch.stack(outputs)


def toca(fresh_ratio=0.3, refresh_interval=3, **selector):
    settings = {"staleness_weight": 0.25 / refresh_interval, "bonus": 0.6, **selector}
    return ToCaConfig.constant(
        fresh_ratio, refresh_interval, STEPS, selector=ScoreSelector(**settings)
    )


def partial_steps(model, policy_interval, num_fresh, selector):
    """The published partial step in plain PyTorch, written anew: no code of the package."""
    blocks = model.transformer_blocks
    outputs, features, maps, ages = [], {}, {}, {}
    for step in range(STEPS):
        latents, timestep, labels = inputs(step)
        with torch.no_grad():
            x = model.pos_embed(latents)
            for layer, block in enumerate(blocks):
                embedding = block.norm1.emb(timestep, labels, hidden_dtype=x.dtype)
                parts = block.norm1.linear(F.silu(embedding)).chunk(6, dim=1)
                b1, g1, a1, b2, g2, a2 = (part[:, None] for part in parts)
                if step % policy_interval == 0:
                    y = F.layer_norm(x, (24,), eps=1e-6) * (1 + g1) + b1
                    q, k, v = (
                        getattr(block.attn1, name)(y).unflatten(-1, (3, 8)).transpose(1, 2)
                        for name in ("to_q", "to_k", "to_v")
                    )
                    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
                    features[layer, "attn"] = block.attn1.to_out[0](
                        (weights @ v).transpose(1, 2).flatten(2)
                    )
                    maps[layer] = weights.mean(1).sum(1)
                    ages[layer] = torch.zeros(2, 16)
                    x = x + a1 * features[layer, "attn"]
                    y = F.layer_norm(x, (24,), eps=1e-5) * (1 + g2) + b2
                    features[layer, "mlp"] = block.ff(y)
                else:
                    x = x + a1 * features[layer, "attn"]
                    score = F.normalize(maps[layer], dim=-1)
                    score = score + selector["weight"] * ages[layer]
                    for sample in score:
                        for top in range(0, 4, 2):
                            for left in range(0, 4, 2):
                                square = [(top + i) * 4 + left + j for i in (0, 1) for j in (0, 1)]
                                best = max(square, key=lambda token: sample[token].item())
                                sample[best] *= 1 + selector["bonus"]
                    chosen = score.argsort(-1, descending=True)[:, :num_fresh]
                    ages[layer] = ages[layer] + 1
                    for b in range(2):
                        ages[layer][b, chosen[b]] = 0
                        rows = F.layer_norm(x[b, chosen[b]], (24,), eps=1e-5)
                        rows = rows * (1 + g2[b]) + b2[b]
                        features[layer, "mlp"][b, chosen[b]] = block.ff(rows)
                x = x + a2 * features[layer, "mlp"]
            embedding = blocks[0].norm1.emb(timestep, labels, hidden_dtype=x.dtype)
            shift, scale = model.proj_out_1(F.silu(embedding)).chunk(2, dim=1)
            x = model.norm_out(x) * (1 + scale[:, None]) + shift[:, None]
            x = model.proj_out_2(x).reshape(2, 4, 4, 2, 2, 2)
            outputs.append(torch.einsum("nhwpqc->nchpwq", x).reshape(2, 2, 8, 8))
    return torch.stack(outputs)


def test_partial_steps_equal_the_published_computation(device):
    model = tiny_dit()
    wanted = partial_steps(model, 3, 4, {"weight": 0.25 / 3, "bonus": 0.6})
    model = model.to(device)
    apply_token_cache(model, toca(fresh_ratio=0.25))

    out = run(model)

    torch.testing.assert_close(out.cpu(), wanted, rtol=2e-5, atol=2e-5)


def test_a_removed_cache_leaves_the_original_bit_for_bit(device):
    model = tiny_dit().to(device)
    original = run(model)

    apply_token_cache(model, toca())
    changed = run(model)
    remove_token_cache(model)

    assert not torch.equal(changed, original)
    torch.testing.assert_close(run(model), original, rtol=0, atol=0)


@pytest.mark.parametrize("base_score", ["none", "attention_received"])
def test_full_steps_are_the_original(device, base_score):
    model = tiny_dit().to(device)
    original = run(model)
    apply_token_cache(model, toca(refresh_interval=3, base_score=base_score))

    out = run(model)

    # where tokens are scored, another fused attention may run than the model's
    budget = {"rtol": 0, "atol": 0} if base_score == "none" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out[[0, 3, 6]], original[[0, 3, 6]], **budget)
    assert not torch.allclose(out[1], original[1], atol=1e-4)


def test_attention_is_scored_without_a_map(device, monkeypatch):
    """The statistics get the log-sum-exp of the attention that gave the output."""
    seen = []
    received = ops.attention_received
    monkeypatch.setattr(
        ops, "attention_received", lambda *a, **k: seen.append(k["lse"]) or received(*a, **k)
    )
    model = tiny_dit().to(device)
    apply_token_cache(model, toca(refresh_interval=3))

    run(model, steps=range(4))

    # the steps 0 and 3 are full, and each is reused
    assert len(seen) == 2 * len(model.transformer_blocks)
    assert all(lse.shape == (2, 3, 16) for lse in seen)


def test_a_schedule_that_is_always_full_changes_nothing(device):
    model = tiny_dit().to(device)
    original = run(model)
    apply_token_cache(model, toca(refresh_interval=1))

    torch.testing.assert_close(run(model), original, rtol=0, atol=0)


def test_no_fresh_token_is_fora(device):
    first, second = tiny_dit().to(device), tiny_dit().to(device)
    apply_token_cache(first, toca(fresh_ratio=0.0))
    apply_token_cache(second, fora(3, STEPS))

    torch.testing.assert_close(run(first), run(second), rtol=0, atol=0)


def test_all_tokens_fresh_recompute_the_mlp_path_given_the_cached_attention(device):
    """Freeze attention in a copy of the model; with every token fresh the two must agree."""
    model = tiny_dit().to(device)
    frozen = copy.deepcopy(model)
    apply_token_cache(model, toca(fresh_ratio=1.0, refresh_interval=STEPS))
    out = run(model)

    cached = []
    for block in frozen.transformer_blocks:
        block.attn1.register_forward_hook(lambda module, args, output: cached.append(output))
    run(frozen, steps=[0])
    for block, output in zip(frozen.transformer_blocks, cached.copy(), strict=True):
        block.attn1.register_forward_hook(lambda *_, output=output: output)

    torch.testing.assert_close(out, run(frozen), rtol=2e-5, atol=2e-5)


def test_a_sample_of_a_batch_is_that_sample_alone(device):
    together, alone = tiny_dit().to(device), tiny_dit().to(device)
    apply_token_cache(together, toca())
    apply_token_cache(alone, toca())

    out = run(together, batch=3)

    torch.testing.assert_close(out[:, 1:2], run(alone, batch=3, pick=slice(1, 2)))


def test_a_run_that_ends_begins_anew(device):
    model = tiny_dit().to(device)
    apply_token_cache(model, toca())

    torch.testing.assert_close(run(model), run(model), rtol=0, atol=0)


def test_a_run_that_is_broken_off_can_be_reset(device):
    model = tiny_dit().to(device)
    apply_token_cache(model, toca())
    wanted = run(model)
    run(model, steps=range(2))

    reset_token_cache(model)

    torch.testing.assert_close(run(model), wanted, rtol=0, atol=0)


def test_cache_contexts_do_not_see_each_other(device):
    model, alone = tiny_dit().to(device), tiny_dit(seed=0).to(device)
    apply_token_cache(model, toca())
    apply_token_cache(alone, toca())
    wanted = {
        name: run(alone, pick=pick) for name, pick in (("a", slice(0, 1)), ("b", slice(1, 2)))
    }

    outputs = {"a": [], "b": []}
    for step in range(STEPS):
        for name, pick in (("a", slice(0, 1)), ("b", slice(1, 2))):
            with token_cache_context(model, name):
                outputs[name].append(run(model, steps=[step], pick=pick))

    for name, parts in outputs.items():
        torch.testing.assert_close(torch.cat(parts), wanted[name], rtol=0, atol=0)


def test_another_batch_begins_a_run_of_its_own(device):
    model = tiny_dit().to(device)
    dense = run(model, steps=[1], batch=1)
    apply_token_cache(model, toca())
    run(model, steps=range(1))

    torch.testing.assert_close(run(model, steps=[1], batch=1), dense, rtol=1e-5, atol=1e-5)


def test_random_tokens_draw_the_same_for_both_halves_of_guidance(device):
    model = tiny_dit().to(device)
    apply_token_cache(model, random_tokens(0.5, 3, STEPS))
    latents, timestep, _ = inputs(0, 1, device)
    outputs = []
    for step in range(3):
        with torch.no_grad():
            outputs.append(
                model(
                    torch.cat([latents, latents]) * (1 + step),
                    timestep=torch.cat([timestep, timestep]) - step,
                    class_labels=torch.tensor([3, 3], device=device),
                ).sample
            )

    for output in outputs:
        torch.testing.assert_close(output[0], output[1])


def test_mixed_steps_differ_from_steps_decided_once(device):
    schedule = AdaptiveSchedule(3, slope=0.4, counts_down=True, mixed_steps=True)
    once = AdaptiveSchedule(3, slope=0.4, counts_down=True)
    outputs = []
    for chosen in (schedule, once):
        model = tiny_dit().to(device)
        router = FactorRouter(0.5, module_weight={"attn": 0.0})
        apply_token_cache(model, ToCaConfig(chosen, router, ScoreSelector(), 20))
        outputs.append(run(model, steps=range(20)))

    assert not torch.equal(*outputs)
    assert outputs[0].isfinite().all()


def test_a_lora_like_layer_is_called_as_a_module(device):
    """A subclass of nn.Linear is not a plain linear layer, so the module itself must run."""

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    plain, scaled = tiny_dit().to(device), tiny_dit().to(device)
    for block_plain, block in zip(plain.transformer_blocks, scaled.transformer_blocks, strict=True):
        old = block.ff.net[2]
        block.ff.net[2] = Scaled(96, 24).to(device).requires_grad_(False)
        block.ff.net[2].load_state_dict(old.state_dict())
        block_plain.ff.net[2].weight *= 2
        block_plain.ff.net[2].bias *= 2
    apply_token_cache(plain, toca())
    apply_token_cache(scaled, toca())

    torch.testing.assert_close(run(scaled), run(plain), rtol=1e-5, atol=1e-5)


def test_an_affine_norm_is_folded_into_the_modulation(device):
    model = tiny_dit(norm_elementwise_affine=True).to(device)
    original = run(model, steps=range(1))
    apply_token_cache(model, toca(fresh_ratio=1.0, refresh_interval=STEPS))
    out = run(model, steps=[0, 0])

    # nothing changed between the two steps, so recomputing every token changes nothing
    torch.testing.assert_close(out[1], original[0], rtol=1e-5, atol=1e-5)


def test_a_bfloat16_model_keeps_its_dtype(device):
    model = tiny_dit().to(device, torch.bfloat16)
    apply_token_cache(model, toca())
    latents, timestep, labels = inputs(0, device=device)
    for _ in range(3):
        with torch.no_grad():
            out = model(latents.bfloat16(), timestep=timestep, class_labels=labels).sample
        assert out.dtype == torch.bfloat16
        assert out.isfinite().all()


def test_a_model_that_is_not_supported_is_named_with_those_that_are():
    with pytest.raises(UnsupportedInputError, match=r"DiTTransformer2DModel, .*got Linear"):
        apply_token_cache(torch.nn.Linear(2, 2), toca())


def test_a_score_that_the_model_cannot_give_is_refused():
    with pytest.raises(
        UnsupportedInputError, match=r"base_score must be one of .*'attention_entropy'"
    ):
        apply_token_cache(tiny_dit(), toca(base_score="attention_entropy"))


def test_an_attention_that_is_not_plain_is_not_recomputed_in_part():
    class MyProcessor(AttnProcessor2_0):
        pass

    model = tiny_dit()
    model.transformer_blocks[1].attn1.processor = MyProcessor()
    router = FactorRouter(0.5)
    apply_token_cache(model, ToCaConfig(IntervalSchedule(3), router, ScoreSelector(), STEPS))

    with pytest.raises(UnsupportedInputError, match=r"processor must be .* got MyProcessor"):
        run(model)


def test_a_second_policy_must_wait_for_the_removal_of_the_first():
    model = tiny_dit()
    apply_token_cache(model, toca())

    with pytest.raises(ValueError, match="remove_token_cache first"):
        apply_token_cache(model, toca())
