"""``apply_token_cache`` on a real PixArt, against laws and an independent partial step."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from tokencache_kernels import backends
from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.integrations.diffusers import (
    apply_token_cache,
    remove_token_cache,
    reset_token_cache,
    token_cache_context,
)
from tokencache_kernels.integrations.diffusers.interception import interceptor_of
from tokencache_kernels.policies import (
    FactorRouter,
    IntervalSchedule,
    ScoreSelector,
    ToCaConfig,
    fora,
    random_tokens,
)
from tokencache_kernels.testing import randn, tiny_pixart

STEPS = 8
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])


def inputs(step, batch=4, text_seed=1, is_pair=True):
    """4 x 6 tokens, so that the second column of 4 x 4 tiles is cut; text of four lengths."""
    images = batch // 2 if is_pair and batch % 2 == 0 else batch
    return {
        # guidance sees each image twice
        "hidden_states": randn(images, 2, 8, 12, seed=10 + step).repeat(batch // images, 1, 1, 1),
        "encoder_hidden_states": randn(batch, 5, 10, seed=text_seed),
        "timestep": torch.full((batch,), 900 - 100 * step),
        "encoder_attention_mask": MASK[:batch],
    }


def run(model, steps=range(STEPS), pick=slice(None), **options):
    """All steps see the same text, as a pipeline gives it."""
    parameter = next(model.parameters())
    text = {}
    outputs = []
    for step in steps:
        named = {name: value[pick] for name, value in inputs(step, **options).items()}
        named = {
            name: value.to(parameter.device, parameter.dtype if value.is_floating_point() else None)
            for name, value in named.items()
        }
        for name in ("encoder_hidden_states", "encoder_attention_mask"):
            named[name] = text.setdefault(name, named[name])
        with torch.no_grad():
            outputs.append(model(**named, added_cond_kwargs={}).sample)
    return torch.stack(outputs)


def toca(**options):
    return ToCaConfig.preset("pixart-alpha", num_inference_steps=STEPS, **options)


def constant(fresh_ratio=0.3, refresh_interval=3, **selector):
    router = FactorRouter(fresh_ratio, module_weight={"attn": 0.0})
    selector = ScoreSelector(**{"base_score": "attention_entropy", **selector})
    return ToCaConfig(IntervalSchedule(refresh_interval), router, selector, STEPS)


def find_full_steps():
    """The steps that are full in block 0, and those that are in blocks which ask once more."""
    tau, first, others = 3, [], []
    for step in range(STEPS):
        if step % tau == 0:
            first.append(step)
            tau = round(3 / (0.8 + 0.4 * step / STEPS))
            if step % tau == 0:
                others.append(step)
    return first, others


class Published:
    """The published computation in plain PyTorch, written anew: no code of the package."""

    def __init__(self, model, shares_guidance, mixed_steps):
        self.model, self.shares_guidance = model, shares_guidance
        first, others = find_full_steps()
        self.full_steps = [first, *[others if mixed_steps else first] * 2]
        self.features, self.maps, self.ages = {}, {}, {}

    def run(self):
        return torch.stack([self.step(step) for step in range(STEPS)])

    def heads(self, linear, x):
        return linear(x).unflatten(-1, (3, 8)).transpose(1, 2)

    def attend(self, attention, x, context, mask=None):
        """The output, and the map averaged over the heads."""
        q = self.heads(attention.to_q, x)
        k, v = self.heads(attention.to_k, context), self.heads(attention.to_v, context)
        logits = q @ k.transpose(-1, -2) / 8**0.5
        if mask is not None:
            logits = logits.masked_fill(mask[:, None, None] == 0, -math.inf)
        weights = logits.softmax(-1)
        return attention.to_out[0]((weights @ v).transpose(1, 2).flatten(2)), weights.mean(1)

    def choose(self, layer, module, step):
        """The published scores, and the tokens with the highest ones; ages grow."""
        cross_map = self.maps[layer]
        entropy = -(cross_map * (cross_map + 1e-12).log()).sum(-1)
        if self.shares_guidance:
            # the keys of both halves side by side, each half of the row
            unconditional, conditional = cross_map.chunk(2)
            row = torch.cat([unconditional / 2, conditional / 2], dim=-1)
            entropy = -(row * (row + 1e-12).log()).sum(-1).repeat(2, 1)
        score = F.normalize(1 + entropy, dim=-1) + 0.25 / 3 * self.ages[layer, module]
        for sample in score:
            for rows in (range(4),):
                for columns in (range(4), range(4, 6)):
                    tile = [row * 6 + column for row in rows for column in columns]
                    sample[max(tile, key=lambda token: sample[token].item())] *= 1.4
        weight = {"cross": 0.6, "mlp": 1.6}[module]
        ratio = 0.3 * (1.6 - 1.2 * layer / 27) * (1.9 - 1.8 * step / STEPS) * weight
        chosen = score.argsort(dim=-1, descending=True)[:, : int(min(ratio, 1) * 24)]
        self.ages[layer, module] += 1
        self.ages[layer, module].scatter_(1, chosen, 0)
        return chosen

    @torch.no_grad()
    def step(self, step):
        model, given = self.model, inputs(step)
        mask = given["encoder_attention_mask"]
        x = model.pos_embed(given["hidden_states"])
        text = model.caption_projection(given["encoder_hidden_states"])
        time, embedded = model.adaln_single(
            given["timestep"], {}, batch_size=4, hidden_dtype=x.dtype
        )
        for layer, block in enumerate(model.transformer_blocks):
            table = block.scale_shift_table[None] + time.reshape(4, 6, 24)
            b1, g1, a1, b2, g2, a2 = (part[:, None] for part in table.unbind(1))

            def perceive(x, block=block, g2=g2, b2=b2):
                return block.ff(F.layer_norm(x, (24,), eps=1e-6) * (1 + g2) + b2)

            def attend_text(x, mask=mask, block=block):
                return self.attend(block.attn2, x, text, mask)

            if step in self.full_steps[layer]:
                y = F.layer_norm(x, (24,), eps=1e-6) * (1 + g1) + b1
                self.features[layer, "attn"], _ = self.attend(block.attn1, y, y)
                x = x + a1 * self.features[layer, "attn"]
                self.features[layer, "cross"], self.maps[layer] = attend_text(x)
                x = x + self.features[layer, "cross"]
                self.features[layer, "mlp"] = perceive(x)
                for module in ("cross", "mlp"):
                    self.ages[layer, module] = torch.zeros(4, 24)
            else:
                x = x + a1 * self.features[layer, "attn"]
                fresh = self.choose(layer, "cross", step)
                every_row, every_map = attend_text(x)
                for b in range(4):
                    self.features[layer, "cross"][b, fresh[b]] = every_row[b, fresh[b]]
                    self.maps[layer][b, fresh[b]] = every_map[b, fresh[b]]
                x = x + self.features[layer, "cross"]
                fresh = self.choose(layer, "mlp", step)
                every_row = perceive(x)
                for b in range(4):
                    self.features[layer, "mlp"][b, fresh[b]] = every_row[b, fresh[b]]
            x = x + a2 * self.features[layer, "mlp"]
        shift, scale = (model.scale_shift_table[None] + embedded[:, None]).chunk(2, dim=1)
        x = model.proj_out(model.norm_out(x) * (1 + scale) + shift)
        x = x.reshape(4, 4, 6, 2, 2, 4)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(4, 4, 8, 12)


@pytest.mark.parametrize("shares_guidance", [True, False], ids=["guidance", "no-guidance"])
@pytest.mark.parametrize("mixed_steps", [False, True], ids=["whole-steps", "mixed-steps"])
def test_partial_steps_equal_the_published_computation(device, shares_guidance, mixed_steps):
    model = tiny_pixart()
    options = {"shares_guidance": shares_guidance, "mixed_steps": mixed_steps}
    wanted = Published(model, **options).run()
    model = model.to(device)
    apply_token_cache(model, toca(**options))

    out = run(model)

    torch.testing.assert_close(out.cpu(), wanted, rtol=2e-5, atol=2e-5)


def test_full_steps_are_the_original_bit_for_bit(device):
    model = tiny_pixart().to(device)
    original = run(model)
    apply_token_cache(model, toca())

    out = run(model)

    torch.testing.assert_close(out[[0, 4, 6]], original[[0, 4, 6]], rtol=0, atol=0)
    assert not torch.allclose(out[1], original[1], atol=1e-3)


def test_a_schedule_that_is_always_full_changes_nothing(device):
    model = tiny_pixart().to(device)
    original = run(model)
    apply_token_cache(model, constant(refresh_interval=1))

    torch.testing.assert_close(run(model), original, rtol=0, atol=0)


def test_a_removed_cache_leaves_the_original_bit_for_bit(device):
    model = tiny_pixart().to(device)
    original = run(model)

    apply_token_cache(model, toca())
    changed = run(model)
    remove_token_cache(model)

    assert not torch.equal(changed, original)
    torch.testing.assert_close(run(model), original, rtol=0, atol=0)


def test_no_fresh_token_is_fora(device):
    first, second = tiny_pixart().to(device), tiny_pixart().to(device)
    apply_token_cache(first, constant(fresh_ratio=0.0))
    apply_token_cache(second, fora(3, STEPS))

    torch.testing.assert_close(run(first), run(second), rtol=0, atol=0)


def freeze_self_attention(model):
    """A copy whose self-attention repeats its first output in every step."""
    frozen, cached = copy.deepcopy(model), []
    for block in frozen.transformer_blocks:
        block.attn1.register_forward_hook(lambda module, args, output: cached.append(output))
    run(frozen, steps=[0])
    for block, output in zip(frozen.transformer_blocks, cached.copy(), strict=True):
        block.attn1.register_forward_hook(lambda *_, output=output: output)
    return frozen


def test_all_tokens_fresh_recompute_all_but_self_attention(device):
    model = tiny_pixart().to(device)
    wanted = run(freeze_self_attention(model))
    apply_token_cache(model, constant(fresh_ratio=1.0, refresh_interval=STEPS))

    torch.testing.assert_close(run(model), wanted, rtol=2e-5, atol=2e-5)


def test_another_text_begins_a_run_of_its_own(device):
    model = tiny_pixart().to(device)
    dense = run(model, steps=[2], text_seed=2)
    apply_token_cache(model, toca())
    run(model, steps=[0, 1])

    torch.testing.assert_close(run(model, steps=[2], text_seed=2), dense, rtol=0, atol=0)


def test_a_sample_of_a_batch_is_that_sample_alone(device):
    together, single = tiny_pixart().to(device), tiny_pixart().to(device)
    apply_token_cache(together, toca(shares_guidance=False))
    apply_token_cache(single, toca(shares_guidance=False))

    out = run(together, batch=3)

    torch.testing.assert_close(out[:, 1:2], run(single, batch=3, pick=slice(1, 2)))


def test_padding_of_the_text_changes_nothing(device):
    """A sample of three text tokens in a batch of five, and without the two that it lacks."""
    padded, cut = tiny_pixart().to(device), tiny_pixart().to(device)
    for model in (padded, cut):
        apply_token_cache(model, toca(shares_guidance=False))

    outputs = []
    for model, tokens in ((padded, 5), (cut, 3)):
        text = randn(1, 5, 10, seed=1, device=device)[:, :tokens]
        mask = torch.tensor([[1, 1, 1, 0, 0]], device=device)[:, :tokens]
        # without a mask all tokens count
        mask = mask if tokens == 5 else None
        for step in range(3):
            with torch.no_grad():
                output = model(
                    randn(1, 2, 8, 8, seed=step, device=device),
                    encoder_hidden_states=text,
                    encoder_attention_mask=mask,
                    timestep=torch.tensor([900 - step], device=device),
                    added_cond_kwargs={},
                )
            outputs.append(output.sample)

    torch.testing.assert_close(torch.stack(outputs[:3]), torch.stack(outputs[3:]))


def test_a_bias_counts_as_the_mask_it_was_made_of(device):
    outputs = []
    for convert in (lambda mask: mask.bool(), lambda mask: (1 - mask[:, None]) * -10000.0):
        model = tiny_pixart().to(device)
        apply_token_cache(model, toca())
        for step in range(2):
            named = {name: value.to(device) for name, value in inputs(step).items()}
            named["encoder_attention_mask"] = convert(named["encoder_attention_mask"])
            with torch.no_grad():
                outputs.append(model(**named, added_cond_kwargs={}).sample)

    torch.testing.assert_close(outputs[1], outputs[3], rtol=0, atol=0)


def test_cache_contexts_do_not_see_each_other(device):
    model, single = tiny_pixart().to(device), tiny_pixart().to(device)
    apply_token_cache(model, toca(shares_guidance=False))
    apply_token_cache(single, toca(shares_guidance=False))
    picks = {"cond": slice(0, 1), "uncond": slice(1, 2)}
    wanted = {name: run(single, pick=pick) for name, pick in picks.items()}

    outputs = {name: [] for name in picks}
    for step in range(STEPS):
        for name, pick in picks.items():
            with token_cache_context(model, name):
                outputs[name].append(run(model, steps=[step], pick=pick))

    for name, parts in outputs.items():
        torch.testing.assert_close(torch.cat(parts), wanted[name], rtol=0, atol=0)


def test_a_run_that_is_broken_off_can_be_reset(device):
    model = tiny_pixart().to(device)
    apply_token_cache(model, toca())
    wanted = run(model)
    run(model, steps=range(2))

    reset_token_cache(model)

    torch.testing.assert_close(run(model), wanted, rtol=0, atol=0)


@pytest.mark.parametrize(
    "policy",
    [
        pytest.param(fora(3, STEPS), id="fora"),
        pytest.param(random_tokens(0.3, 3, STEPS), id="random"),
        pytest.param(ToCaConfig.constant(0.3, 3, STEPS), id="attention-received"),
        pytest.param(
            ToCaConfig.constant(0.3, 3, STEPS, selector=ScoreSelector("none")), id="in-order"
        ),
    ],
)
def test_policies_without_entropy_keep_full_steps_exact(device, policy):
    model = tiny_pixart().to(device)
    original = run(model)
    apply_token_cache(model, policy)

    out = run(model)

    torch.testing.assert_close(out[[0, 3, 6]], original[[0, 3, 6]], rtol=0, atol=0)
    assert not torch.allclose(out[[1, 2, 4, 5, 7]], original[[1, 2, 4, 5, 7]], atol=1e-2)


def test_attention_is_full_where_only_other_modules_are_cached(device):
    """Modules on schedules of their own: every block is composed, and attention still runs."""
    model = tiny_pixart().to(device)
    original = run(model)
    router = FactorRouter(1.0, module_weight={"cross": 1.0})
    schedule = IntervalSchedule(1, module_multiple={"mlp": STEPS})
    policy = ToCaConfig(schedule, router, ScoreSelector("attention_entropy"), STEPS)
    apply_token_cache(model, policy)

    # the MLP recomputes every token in part, the rest is full: nothing may change
    torch.testing.assert_close(run(model), original, rtol=2e-5, atol=2e-5)


def test_a_lora_like_layer_is_called_as_a_module(device):
    """A subclass of nn.Linear is not a plain linear layer, so the module itself must run."""

    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    def scale(holder, name):
        old = getattr(holder, name) if isinstance(name, str) else holder[name]
        new = Scaled(old.in_features, old.out_features).to(device).requires_grad_(False)
        new.load_state_dict(old.state_dict())
        if isinstance(name, str):
            setattr(holder, name, new)
        else:
            holder[name] = new
        return old

    plain, scaled = tiny_pixart().to(device), tiny_pixart().to(device)
    for first, second in zip(plain.transformer_blocks, scaled.transformer_blocks, strict=True):
        for name in ("to_q", "to_k", "to_v"):
            scale(second.attn2, name)
            getattr(first.attn2, name).weight *= 2
            getattr(first.attn2, name).bias *= 2
        scale(second.attn2.to_out, 0)
        first.attn2.to_out[0].weight *= 2
        first.attn2.to_out[0].bias *= 2
    for model in (plain, scaled):
        apply_token_cache(model, toca())

    torch.testing.assert_close(run(scaled), run(plain), rtol=1e-5, atol=1e-5)


def test_launches_of_a_partial_layer(device):
    """Our own taps on the query projection must not keep its weights from the fused path."""
    reason = backends.unavailable("triton", "attention", torch.device(device), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    from tokencache_kernels.testing.counting import count_launches

    model = tiny_pixart(num_layers=1).to(device)
    apply_token_cache(model, toca(), backend="triton")
    run(model, steps=[0], batch=2)

    with count_launches() as launches:
        run(model, steps=[1], batch=2)

    assert launches == [
        "_select_tokens_kernel", "_add_branches_kernel", "_linear_kernel",
        "_attention_head_mean_kernel", "_scatter_rows_kernel", "_linear_scatter_kernel",
        "_select_tokens_kernel", "_row_pass_kernel", "_linear_kernel", "_linear_scatter_kernel",
        "_add_branches_kernel",
    ]  # fmt: skip


def test_additional_conditions_pass_through(device):
    model = tiny_pixart(use_additional_conditions=True).to(device)
    conditions = {
        "resolution": torch.tensor([[8.0, 12.0]] * 2, device=device),
        "aspect_ratio": torch.tensor([[0.7]] * 2, device=device),
    }
    outputs = []
    for policy in (None, constant(refresh_interval=1)):
        if policy is not None:
            apply_token_cache(model, policy)
        named = {name: value.to(device) for name, value in inputs(0, batch=2).items()}
        with torch.no_grad():
            outputs.append(model(**named, added_cond_kwargs=conditions).sample)

    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_a_bfloat16_model_keeps_its_dtype(device):
    model = tiny_pixart().to(device, torch.bfloat16)
    apply_token_cache(model, toca())

    out = run(model)

    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()


@pytest.mark.parametrize(
    "row",
    [
        pytest.param([1, 0, 1, 1, 0], id="hole"),
        pytest.param([0, 0, 1, 1, 1], id="left-padding"),
        pytest.param([0, 0, 0, 0, 0], id="nothing"),
        pytest.param([1, 1, 0.5, 0, 0], id="in-between"),
    ],
)
def test_a_mask_that_is_no_prefix_is_refused(row):
    model = tiny_pixart()
    apply_token_cache(model, toca())
    named = inputs(0, batch=2)
    named["encoder_attention_mask"] = torch.tensor([row, [1, 1, 1, 1, 1]])

    with pytest.raises(UnsupportedInputError, match="encoder_attention_mask must keep the first"):
        model(**named, added_cond_kwargs={})


def test_a_model_without_text_is_refused():
    model = tiny_pixart()
    apply_token_cache(model, toca())

    with pytest.raises(UnsupportedInputError, match="encoder_hidden_states must be given"):
        model(randn(1, 2, 8, 8), timestep=torch.tensor([1]), added_cond_kwargs={})


@pytest.mark.parametrize("batch", [3, 4])
def test_images_that_are_no_guidance_pair_share_no_selection(device, batch):
    first, second = tiny_pixart().to(device), tiny_pixart().to(device)
    apply_token_cache(first, toca())
    apply_token_cache(second, toca(shares_guidance=False))

    outs = [run(model, batch=batch, is_pair=False) for model in (first, second)]

    torch.testing.assert_close(*outs, rtol=0, atol=0)


def rename(block):
    class MyProcessor(type(block.attn2.processor)):
        pass

    block.attn2.processor = MyProcessor()


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(rename, id="processor"),
        pytest.param(lambda block: block.attn2.fuse_projections(), id="fused"),
        pytest.param(
            lambda block: setattr(block.attn2, "norm_q", torch.nn.LayerNorm(8)), id="qk-norm"
        ),
    ],
)
def test_a_block_that_is_not_plain_runs_its_own_code_around_cached_modules(device, change):
    """Partial steps equal those of a model all of whose blocks do."""
    models = [tiny_pixart().to(device) for _ in range(2)]
    for model, tier in zip(models, ("auto", "as_is"), strict=True):
        change(model.transformer_blocks[1])
        apply_token_cache(model, toca(), tier=tier)

    torch.testing.assert_close(run(models[0]), run(models[1]), rtol=2e-5, atol=2e-5)


def test_a_description_that_does_not_fit_is_refused_before_anything_is_changed():
    model = tiny_pixart()
    del model.transformer_blocks[1].ff

    with pytest.raises(UnsupportedInputError, match="got no ff in block 1 of transformer_blocks"):
        apply_token_cache(model, toca())
    assert interceptor_of(model.transformer_blocks[0]) is None


def test_an_attention_that_shows_no_map_is_refused_where_tokens_are_scored(device):
    class Shortcut:
        """Calls no attention of PyTorch's."""

        def __call__(self, attention, hidden_states, *_, **__):
            return hidden_states

    model = tiny_pixart().to(device)
    apply_token_cache(model, toca())
    model.transformer_blocks[1].attn2.set_processor(Shortcut())

    with pytest.raises(UnsupportedInputError, match="scaled_dot_product_attention once, got 0"):
        run(model)


def test_a_score_that_the_model_cannot_give_is_refused():
    with pytest.raises(UnsupportedInputError, match=r"base_score must be one of .*'predicted'"):
        apply_token_cache(tiny_pixart(), constant(base_score="predicted"))
