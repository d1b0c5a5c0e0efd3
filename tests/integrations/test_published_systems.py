"""Two published systems on models of our own: their caching, computed anew in plain PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from tokencache_kernels.integrations.diffusers import apply_token_cache, token_cache_context
from tokencache_kernels.integrations.diffusers.interception import interceptor_of
from tokencache_kernels.policies import LearningToCacheConfig, ToCaConfig
from tokencache_kernels.testing import randn
from tokencache_kernels.testing.families import FAMILIES

SOLVER_STEPS, SCALE, BLOCKS = 3, 0.4, 5


def solve(predict, x):
    """A midpoint solver with guidance: two evaluations a step, each of two calls."""
    for index in range(SOLVER_STEPS):
        times = [900.0 - 200 * index, 800.0 - 200 * index]
        guided = [None, None]
        place = x
        for stage, time in enumerate(times):
            cond, uncond = (
                predict(place, time, label, branch, index, stage)
                for branch, label in (("cond", 3), ("uncond", 9))
            )
            guided[stage] = cond + SCALE * (cond - uncond)
            place = x - 0.1 * guided[stage]
        x = x - 0.2 * guided[1]
    return x


def run_blocks(model, tokens, compute, cache):
    """All blocks of a U-ViT; sub-layers that are not computed add what the cache holds."""
    blocks = [*model.in_blocks, model.mid_block, *model.out_blocks]
    skips = []
    for number, block in enumerate(blocks):
        if block.skip_linear is not None:
            tokens = F.linear(
                torch.cat([tokens, skips.pop()], -1), block.skip_linear.weight,
                block.skip_linear.bias,
            )  # fmt: skip
        for place, (norm, module) in enumerate(
            ((block.norm1, block.attn), (block.norm2, block.mlp))
        ):
            entry = 2 * number + place
            if compute[entry]:
                cache[entry] = module(norm(tokens))
            tokens = tokens + cache[entry]
        if number < len(model.in_blocks):
            skips.append(tokens)
    return tokens


@pytest.mark.parametrize("tier", ["auto", "as_is"])
def test_learning_to_cache_on_u_vit_has_a_cache_for_each_branch_of_guidance(tier):
    model, plain = (FAMILIES["UViT"].build() for _ in range(2))
    logits = randn(2 * SOLVER_STEPS, 2 * BLOCKS)
    computed = logits.sigmoid() > 0.5
    apply_token_cache(model, LearningToCacheConfig(logits, 0.5, counts_down=False), tier=tier)

    def cached(x, time, label, branch, index, stage):
        step = 2 * index + stage
        with token_cache_context(
            model, branch, step_index=step, num_inference_steps=2 * SOLVER_STEPS
        ):
            return model(x, torch.tensor([time]), torch.tensor([label]))

    caches = {"cond": {}, "uncond": {}}

    def by_hand(x, time, label, branch, index, stage):
        # the midpoint computes everything, and so does the first step; others live on the midpoint
        is_full = stage == 1 or index == 0
        compute = [True] * (2 * BLOCKS) if is_full else computed[2 * index].tolist()
        rates = torch.exp(-torch.log(torch.tensor(10000.0)) / 12 * torch.arange(12))
        angles = time * rates
        tokens = torch.cat([
            plain.label_emb.weight[label][None, None],
            torch.cat([angles.cos(), angles.sin()])[None, None],
            plain.patch_embed(x),
        ], dim=1) + plain.pos_embed  # fmt: skip
        # what a step of the solver computes anew is not read by the next one
        cache = caches[branch] if is_full else dict(caches[branch])
        tokens = run_blocks(plain, tokens, compute, cache)
        rows = plain.decoder_pred(plain.norm(tokens))[:, 2:].reshape(1, 4, 4, 2, 2, 2)
        return torch.einsum("bhwpqc->bchpwq", rows).reshape(1, 2, 8, 8)

    with torch.no_grad():
        x = randn(1, 2, 8, 8, seed=5)
        wanted = solve(by_hand, x)
        out = solve(cached, x)

    assert 0 < computed[2::2].float().mean() < 1
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)


def run_preset(tier, steps):
    model = FAMILIES["STDiT3"].build()
    apply_token_cache(model, ToCaConfig.preset("opensora", num_inference_steps=12), tier=tier)
    outputs = []
    for step in range(steps):
        given = FAMILIES["STDiT3"].inputs(step, 0, 2)
        # the two halves of guidance
        given["x"][1] = given["x"][0]
        with torch.no_grad():
            outputs.append(model(**given))
    return torch.stack(outputs), interceptor_of(model).session.passes()[0][1].runner


def test_toca_on_stdit3_has_a_cycle_for_each_module():
    outputs, runner = run_preset("auto", 9)
    plan = runner.plan
    full = {
        name: [
            index for index in range(12)
            if plan.decisions[index][site].num_fresh == 48
        ]
        for group in plan.groups for site in group.sites[:1]
        for name in [(site.stream, site.module)]
    }  # fmt: skip

    for stream in ("spatial", "temporal"):
        assert full[stream, "attn"] == full[stream, "mlp"] == [0, 1, 2, 3, 6, 9]
        assert full[stream, "cross"] == [0, 1, 2, 6]
        # int(float32(0.1 * 1.495) * 48) tokens of the MLP, and none of the cross-attention
        site = next(site for site in plan.decisions[4] if site.stream == stream
                    and site.module == "mlp")  # fmt: skip
        assert plan.decisions[4][site].num_fresh == 7
    torch.testing.assert_close(outputs, run_preset("as_is", 9)[0], rtol=1e-4, atol=1e-4)
