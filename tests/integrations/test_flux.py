"""``apply_token_cache`` on a real FLUX, against laws and an independent partial step."""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F

from tokencache_kernels import ops
from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.integrations.diffusers import (
    apply_token_cache,
    remove_token_cache,
    token_cache_context,
)
from tokencache_kernels.integrations.diffusers.interception import interceptor_of
from tokencache_kernels.models import SPECS, Sizes
from tokencache_kernels.policies import (
    FactorRouter,
    IntervalSchedule,
    ScoreSelector,
    ToCaConfig,
    cache_bytes,
    fora,
    make_plan,
    model_shape,
    random_tokens,
)
from tokencache_kernels.testing import randn, tiny_flux

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 8
HEADS, WIDTH = 2, 24


@dataclass(frozen=True)
class Call:
    """The arguments of a sampler in every step, but for the latents."""

    batch: int = 2
    grid: tuple[int, int] = (3, 4)
    text: int = 5
    has_guidance: bool = True
    # a still sampler repeats the first step's inputs
    is_still: bool = False

    def positions(self):
        rows, columns = torch.meshgrid(*(torch.arange(n) for n in self.grid), indexing="ij")
        return torch.stack([0 * rows, rows, columns], dim=-1).flatten(0, 1).float()

    def inputs(self, step, pick=slice(None), dtype=torch.float32):
        height, width = self.grid
        step = 0 if self.is_still else step
        guidance = torch.full((self.batch,), 3.5)[pick] if self.has_guidance else None
        inputs = {
            "hidden_states": randn(self.batch, height * width, 4, seed=10 + step)[pick],
            "encoder_hidden_states": randn(self.batch, self.text, 10)[pick],
            "pooled_projections": randn(self.batch, 6)[pick],
            "timestep": torch.full((self.batch,), 0.9 - 0.1 * step)[pick],
            "guidance": guidance,
        }
        inputs = {name: None if x is None else x.to(dtype) for name, x in inputs.items()}
        # positions stay in float32, as the pipeline's do
        return inputs | {"img_ids": self.positions(), "txt_ids": torch.zeros(self.text, 3)}


def run(model, steps=range(STEPS), call=Call(), pick=slice(None), **more):
    parameter = next(model.parameters())
    outputs = []
    for step in steps:
        inputs = call.inputs(step, pick, parameter.dtype)
        inputs = {name: x if x is None else x.to(parameter.device) for name, x in inputs.items()}
        with torch.no_grad():
            outputs.append(model(**inputs, **more).sample)
    return torch.stack(outputs)


def toca(fresh_ratio=0.5, refresh_interval=4):
    """The published setting with the depth of the tiny model: full steps are 0, 1, 2 and 6."""
    return ToCaConfig.preset(
        "flux-1-dev",
        num_inference_steps=STEPS,
        num_layers=3,
        fresh_ratio=fresh_ratio,
        refresh_interval=refresh_interval,
    )


def runner_of(model):
    return interceptor_of(model).session.passes()[0][1].runner


# --- the published computation, written anew: no code of the package, none of the blocks ----------


def published_step_is_full(stream, layer, step, interval=4):
    return step < 3 or (step - 2) % interval == 0


def published_count(stream, layer, num_tokens, base=0.5):
    """k of a module; the depth of 28 blocks is that of 3 here."""
    ratio = base * (1.5 - layer / 2) * {"double": 0.4, "single": 1.6}[stream]
    return int(torch.tensor(min(max(ratio, 0.0), 1.0), dtype=torch.float32) * num_tokens)


class Published:
    """ToCa on FLUX in plain PyTorch, as its description has it."""

    def __init__(self, model, is_full=published_step_is_full, count=published_count, gain=0.25 / 4):
        self.model, self.is_full, self.count, self.gain = model, is_full, count, gain
        self.cache, self.scores, self.waited = {}, {}, {}

    def run(self, call, steps=range(STEPS)):
        with torch.no_grad():
            return torch.stack([self.forward(step, **call.inputs(step)) for step in steps])

    def forward(self, step, hidden_states, encoder_hidden_states, img_ids, txt_ids, **named):
        model = self.model
        guidance = named["guidance"]
        times = [1000 * time for time in (named["timestep"], guidance) if time is not None]
        temb = model.time_text_embed(*times, named["pooled_projections"])
        self.embedding = F.silu(temb)
        self.ids = torch.cat([txt_ids, img_ids])
        image, text = model.x_embedder(hidden_states), model.context_embedder(encoder_hidden_states)
        for layer, block in enumerate(model.transformer_blocks):
            text, image = self.double(
                block, layer, text, image, self.is_full("double", layer, step)
            )
        x = torch.cat([text, image], dim=1)
        for layer, block in enumerate(model.single_transformer_blocks):
            x = self.single(block, layer, x, self.is_full("single", layer, step))
        scale, shift = model.norm_out.linear(self.embedding).chunk(2, dim=1)
        return model.proj_out(self.modulate(x[:, text.shape[1] :], shift[:, None], scale[:, None]))

    def double(self, block, layer, text, image, is_full):
        streams = {"image": image, "text": text}
        parts = {
            "image": [*self.vectors(block.norm1, 6), block.ff],
            "text": [*self.vectors(block.norm1_context, 6), block.ff_context],
        }
        if is_full:
            normed = {name: self.modulate(x, *parts[name][:2]) for name, x in streams.items()}
            attended, received = self.attend(block.attn, normed["image"], normed["text"])
            text_tokens = text.shape[1]
            self.cache[layer, "text", "attn"] = block.attn.to_add_out(attended[:, :text_tokens])
            self.cache[layer, "image", "attn"] = block.attn.to_out[0](attended[:, text_tokens:])
            self.begin_cycle((layer, "text"), received[:, :text_tokens])
            self.begin_cycle((layer, "image"), received[:, text_tokens:])
        for name, x in streams.items():
            _, _, gate, shift, scale, gate_mlp, mlp = parts[name]
            x = x + gate * self.cache[layer, name, "attn"]
            rows = self.modulate(x, shift, scale)
            if is_full:
                self.cache[layer, name, "mlp"] = self.mlp(mlp, rows)
            else:
                count = self.count("double", layer, x.shape[1])
                for sample, chosen in enumerate(self.select((layer, name), count)):
                    fresh = self.mlp(mlp, rows[sample, chosen])
                    self.cache[layer, name, "mlp"][sample, chosen] = fresh
            streams[name] = x + gate_mlp * self.cache[layer, name, "mlp"]
        return streams["text"], streams["image"]

    def single(self, block, layer, x, is_full):
        shift, scale, gate = self.vectors(block.norm, 3)
        rows = self.modulate(x, shift, scale)
        hidden = F.gelu(block.proj_mlp(rows), approximate="tanh")
        if is_full:
            attended, received = self.attend(block.attn, rows)
            self.cache[layer, "attn"] = attended
            self.begin_cycle((layer, "both"), received)
            self.cache[layer, "total"] = block.proj_out(torch.cat([attended, hidden], dim=-1))
        else:
            count = self.count("single", layer, x.shape[1])
            for sample, chosen in enumerate(self.select((layer, "both"), count)):
                attended = self.cache[layer, "attn"][sample, chosen]
                both = torch.cat([attended, hidden[sample, chosen]], dim=-1)
                self.cache[layer, "total"][sample, chosen] = block.proj_out(both)
        return x + gate * self.cache[layer, "total"]

    def vectors(self, norm, count):
        return [part[:, None] for part in norm.linear(self.embedding).chunk(count, dim=1)]

    def modulate(self, x, shift, scale):
        return F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift

    def mlp(self, feed_forward, rows):
        return feed_forward.net[2](F.gelu(feed_forward.net[0].proj(rows), approximate="tanh"))

    def attend(self, attention, rows, text=None):
        """The result before its projection, and the attention that each token receives."""
        query, key, value = (self.heads(linear(rows)) for linear in (
            attention.to_q, attention.to_k, attention.to_v
        ))  # fmt: skip
        query, key = self.rms(query, attention.norm_q), self.rms(key, attention.norm_k)
        if text is not None:
            added = [self.heads(linear(text)) for linear in (
                attention.add_q_proj, attention.add_k_proj, attention.add_v_proj
            )]  # fmt: skip
            added[0] = self.rms(added[0], attention.norm_added_q)
            added[1] = self.rms(added[1], attention.norm_added_k)
            pairs = zip(added, (query, key, value), strict=True)
            query, key, value = (torch.cat(pair, dim=2) for pair in pairs)
        logits = self.rotate(query) @ self.rotate(key).transpose(-1, -2) / (WIDTH / HEADS) ** 0.5
        weights = logits.softmax(dim=-1)
        return (weights @ value).transpose(1, 2).flatten(2), weights.mean(dim=(1, 2))

    def heads(self, rows):
        return rows.unflatten(-1, (HEADS, -1)).transpose(1, 2)

    def rms(self, x, norm):
        return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + 1e-6) * norm.weight

    def rotate(self, x):
        """Turn each pair of channels by its axis' position; four channels an axis."""
        turned = []
        for axis, part in enumerate(x.double().split(4, dim=-1)):
            angle = self.ids[:, axis, None].double() / 10000 ** torch.tensor([0.0, 0.5]).double()
            pairs = torch.view_as_complex(part.unflatten(-1, (2, 2)).contiguous())
            turn = torch.polar(torch.ones_like(angle), angle)
            turned.append(torch.view_as_real(pairs * turn).flatten(-2))
        return torch.cat(turned, dim=-1).float()

    def begin_cycle(self, key, received):
        self.scores[key], self.waited[key] = received, torch.zeros_like(received)

    def select(self, key, count):
        score = F.normalize(self.scores[key], dim=-1) + self.gain * self.waited[key]
        chosen = score.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        self.waited[key] = (self.waited[key] + 1).scatter(1, chosen, 0.0)
        return chosen


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(Call(), id="batch-2"),
        pytest.param(Call(batch=3, grid=(2, 5), text=7), id="batch-3-wide-long-text"),
        pytest.param(Call(batch=1, has_guidance=False), id="no-guidance-embedding"),
    ],
)
def test_partial_steps_equal_the_published_computation(call, device):
    model = tiny_flux(guidance_embeds=call.has_guidance)
    wanted = Published(model).run(call)
    model = model.to(device)
    apply_token_cache(model, toca())

    out = run(model, call=call)

    torch.testing.assert_close(out.cpu(), wanted, rtol=2e-5, atol=2e-5)


def test_no_fresh_token_reuses_everything(device):
    model = tiny_flux()
    # without fresh tokens the published full steps are 0, 4, 8, ... instead of 0, 1, 2, 6, ...
    every_fourth = Published(model, is_full=lambda _, __, step: step % 4 == 0, count=lambda *_: 0)
    wanted = every_fourth.run(Call())
    model = model.to(device)
    apply_token_cache(model, toca(fresh_ratio=0.0))

    torch.testing.assert_close(run(model).cpu(), wanted, rtol=2e-5, atol=2e-5)


@dataclass(frozen=True)
class EveryOtherLayer:
    """After the first step every other layer is full, in turns."""

    def is_full(self, site, step):
        return step.index == 0 or (site.layer + step.index) % 2 == 0


def test_layers_may_be_full_and_partial_in_one_step(device):
    model = tiny_flux()
    policy = replace(toca(), schedule=EveryOtherLayer())
    wanted = Published(
        model, is_full=lambda _, layer, step: step == 0 or (layer + step) % 2 == 0
    ).run(Call())
    model = model.to(device)
    apply_token_cache(model, policy)

    torch.testing.assert_close(run(model).cpu(), wanted, rtol=2e-5, atol=2e-5)


# --- laws -----------------------------------------------------------------------------------------


def test_full_steps_are_the_original_where_no_statistics_are_taken(device):
    model = tiny_flux().to(device)
    original = run(model)
    apply_token_cache(model, toca())

    out = run(model)

    # a step after 0 and 1 is full again, so nothing selects by their scores
    torch.testing.assert_close(out[:2], original[:2], rtol=0, atol=0)
    torch.testing.assert_close(out[[2, 6]], original[[2, 6]], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(out[3], original[3], atol=1e-2)


@pytest.mark.parametrize(
    "policy", [fora(3, STEPS), random_tokens(0.5, 3, STEPS)], ids=lambda policy: policy.name
)
def test_policies_without_statistics_leave_full_steps_bit_for_bit(policy, device):
    model = tiny_flux().to(device)
    original = run(model)
    apply_token_cache(model, policy)

    out = run(model)

    torch.testing.assert_close(out[[0, 3, 6]], original[[0, 3, 6]], rtol=0, atol=0)
    assert not torch.allclose(out[1], original[1], atol=1e-2)


def test_a_schedule_that_is_always_full_changes_nothing(device):
    model = tiny_flux().to(device)
    original = run(model)
    apply_token_cache(model, toca(refresh_interval=1))

    torch.testing.assert_close(run(model), original, rtol=0, atol=0)


def test_a_removed_cache_leaves_the_original_bit_for_bit(device):
    model = tiny_flux().to(device)
    original = run(model)

    apply_token_cache(model, toca())
    changed = run(model)
    remove_token_cache(model)

    assert not torch.equal(changed, original)
    torch.testing.assert_close(run(model), original, rtol=0, atol=0)


def test_all_tokens_fresh_recompute_the_mlp_path_given_the_cached_attention(device):
    """Freeze attention in a copy of the model; with every token fresh the two must agree."""
    model = tiny_flux().to(device)
    frozen = copy.deepcopy(model)
    apply_token_cache(model, ToCaConfig.constant(1.0, STEPS, STEPS))
    out = run(model)

    attentions = [
        block.attn for block in (*frozen.transformer_blocks, *frozen.single_transformer_blocks)
    ]
    cached = []
    for attention in attentions:
        attention.register_forward_hook(lambda module, inputs, output: cached.append(output))
    run(frozen, steps=[0])
    for attention, output in zip(attentions, cached.copy(), strict=True):
        attention.register_forward_hook(lambda *_, output=output: output)

    torch.testing.assert_close(out, run(frozen), rtol=2e-5, atol=2e-5)


MODULES = ("attn", "mlp", "text_mlp")


@pytest.mark.parametrize("slow", MODULES)
@pytest.mark.parametrize("fresh_ratio", [0.0, 0.5])
def test_nothing_is_lost_between_parts_that_are_full_and_parts_that_are_not(
    slow, fresh_ratio, device
):
    """While nothing changes, whatever is reused is right; ControlNet adds between all blocks."""
    model, call = tiny_flux().to(device), Call(is_still=True)
    residuals = [randn(2, 12, WIDTH, seed=seed, device=device) for seed in range(3)]
    control = {
        "controlnet_block_samples": residuals[:2],
        "controlnet_single_block_samples": residuals,
    }
    original = run(model, [0], call, **control)
    schedule = IntervalSchedule(2, module_multiple={slow: 2})
    router = FactorRouter(fresh_ratio, module_weight={"attn": 0.0})
    apply_token_cache(model, ToCaConfig(schedule, router, ScoreSelector(), 4))

    out = run(model, range(4), call, **control)

    torch.testing.assert_close(out, original.expand_as(out), rtol=1e-5, atol=1e-5)


def test_a_sample_of_a_batch_is_that_sample_alone(device):
    together, alone = tiny_flux().to(device), tiny_flux().to(device)
    call = Call(batch=3)
    apply_token_cache(together, toca())
    apply_token_cache(alone, toca())

    out = run(together, call=call)

    torch.testing.assert_close(out[:, 1:2], run(alone, call=call, pick=slice(1, 2)))


def test_a_run_that_ends_begins_anew(device):
    model = tiny_flux().to(device)
    apply_token_cache(model, toca())

    torch.testing.assert_close(run(model), run(model), rtol=0, atol=0)


def test_cache_contexts_do_not_see_each_other(device):
    """True guidance calls the model twice a step, with texts of different lengths."""
    model, alone = tiny_flux().to(device), tiny_flux().to(device)
    calls = {"cond": Call(batch=1), "uncond": Call(batch=1, text=3)}
    # as a pipeline has that was used before: by then diffusers has listed the hooked parts
    with token_cache_context(model, "cond"):
        run(model, [0], calls["cond"])
    apply_token_cache(model, toca())
    apply_token_cache(alone, toca())
    wanted = {name: run(alone, call=call) for name, call in calls.items()}

    outputs = {name: [] for name in calls}
    for step in range(STEPS):
        for name, call in calls.items():
            with token_cache_context(model, name):
                outputs[name].append(run(model, [step], call))

    for name, parts in outputs.items():
        torch.testing.assert_close(torch.cat(parts), wanted[name], rtol=0, atol=0)


# --- cost --------------------------------------------------------------------------------------


def test_the_cache_takes_the_bytes_that_the_plan_says(device):
    model, policy = tiny_flux().to(device), toca()
    apply_token_cache(model, policy)
    run(model)
    layers = {"transformer_blocks": 2, "single_transformer_blocks": 3}
    sizes = Sizes(layers, WIDTH, HEADS, 4 * WIDTH)
    shape = model_shape(
        SPECS["FluxTransformer2DModel"], sizes, batch=2, image_tokens=12, text_tokens=5
    )
    runner = runner_of(model)
    tokens = [selection.tokens for selection in runner._selections]

    assert cache_bytes(make_plan(policy, shape), shape, element_size=4) == {
        "features": sum(buffer.nbytes for (buffer,) in runner.features._buffers.values()),
        "staleness": sum(each.staleness.nbytes for each in tokens),
        "scores": sum(each.scores.nbytes for each in tokens),
    }


def test_a_buffer_keeps_its_address_from_one_full_step_to_the_next(device):
    model = tiny_flux().to(device)
    apply_token_cache(model, toca())
    addresses = []
    for step in range(7):
        run(model, [step])
        buffers = runner_of(model).features._buffers
        addresses.append({site: buffer.data_ptr() for site, (buffer,) in buffers.items()})

    assert len(addresses[2]) == 2 * 4 + 3 * 2
    assert addresses[6] == addresses[2]


def test_three_launches_select_for_all_layers(device, monkeypatch):
    model = tiny_flux().to(device)
    apply_token_cache(model, toca())
    run(model, range(3))
    selected, select_tokens_ = [], ops.select_tokens_
    monkeypatch.setattr(
        ops, "select_tokens_",
        lambda scores, *args, **named: selected.append(tuple(scores.shape))
        or select_tokens_(scores, *args, **named),
    )  # fmt: skip

    run(model, [3])

    assert sorted(selected) == [(2, 2, 5), (2, 2, 12), (3, 2, 17)]


# --- dtypes ---------------------------------------------------------------------------------------


def test_a_bfloat16_model_keeps_its_dtype(device):
    model = tiny_flux().to(device, torch.bfloat16)
    apply_token_cache(model, toca())

    out = run(model)

    assert out.dtype == torch.bfloat16
    assert out.isfinite().all()
    buffers = runner_of(model).features._buffers.values()
    assert {buffer.dtype for (buffer,) in buffers} == {torch.bfloat16}


def test_a_float16_model_is_clipped_where_the_original_is(device):
    """Residuals beyond float16 would become inf, and the next norm would make NaN of them."""
    model, call = tiny_flux().to(device, torch.float16), Call(is_still=True)
    for block in model.transformer_blocks:
        block.ff_context.net[2].bias += 40000
        block.norm1_context.linear.bias += 2
    for block in model.single_transformer_blocks:
        block.proj_out.bias += 40000
        block.norm.linear.bias += 2
    original = run(model, [0], call)
    # a full layer behind a partial one reads that one's output
    apply_token_cache(model, replace(toca(), schedule=EveryOtherLayer()))

    out = run(model, range(4), call)

    assert original.isfinite().all()
    torch.testing.assert_close(out, original.expand_as(out), rtol=2e-2, atol=2e-2)


# --- refusals ----------------------------------------------------------------------------------


def test_one_prompt_serves_several_pictures(device):
    """Pipelines do not repeat a prompt that was encoded before they were called."""
    model = tiny_flux().to(device)
    apply_token_cache(model, toca())
    repeated, single = Call().inputs(0), Call().inputs(0)
    names = ("encoder_hidden_states", "pooled_projections")
    single |= {name: single[name][:1] for name in names}
    repeated |= {name: single[name].repeat(2, *[1] * (single[name].dim() - 1)) for name in names}

    with torch.no_grad():
        many, one = (
            [
                model(**{name: x.to(device) for name, x in inputs.items()}).sample
                for _ in range(STEPS)
            ]
            for inputs in (repeated, single)
        )

    torch.testing.assert_close(torch.stack(one), torch.stack(many))


def test_another_text_length_begins_a_run_of_its_own(device):
    model = tiny_flux().to(device)
    dense = run(model, [3], Call(text=6))
    apply_token_cache(model, toca())
    run(model, range(3))

    torch.testing.assert_close(run(model, [3], Call(text=6)), dense, rtol=1e-5, atol=1e-5)


def test_a_score_that_the_model_cannot_give_is_refused():
    policy = ToCaConfig.constant(0.5, 2, STEPS, selector=ScoreSelector("attention_entropy"))

    with pytest.raises(UnsupportedInputError, match=r"base_score must be one of .*_entropy'"):
        apply_token_cache(tiny_flux(), policy)


def fuse(model):
    model.fuse_qkv_projections()


def rename_processors(model):
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    class MyProcessor(FluxAttnProcessor):
        pass

    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.attn.set_processor(MyProcessor())


@pytest.mark.parametrize("change", [fuse, rename_processors])
@pytest.mark.parametrize("is_late", [False, True])
def test_attention_may_be_any_that_calls_pytorchs(device, change, is_late):
    plain, changed = tiny_flux().to(device), tiny_flux().to(device)
    apply_token_cache(plain, toca())
    if not is_late:
        change(changed)
    apply_token_cache(changed, toca())
    if is_late:
        change(changed)

    torch.testing.assert_close(run(changed), run(plain), rtol=2e-5, atol=2e-5)


def test_context_parallelism_is_refused():
    model = tiny_flux()
    model.single_transformer_blocks[2].attn.processor._parallel_config = object()

    with pytest.raises(UnsupportedInputError, match="all tokens on one device"):
        apply_token_cache(model, toca())


def test_a_model_with_one_kind_of_blocks_is_refused():
    with pytest.raises(
        UnsupportedInputError, match="blocks in single_transformer_blocks, got none"
    ):
        apply_token_cache(tiny_flux(num_single=0), toca())


def test_arguments_that_are_not_described_keep_the_models_own_code(device, monkeypatch):
    """A block that is given arguments of its attention's own is not composed."""
    model, other = tiny_flux().to(device), tiny_flux().to(device)
    apply_token_cache(model, toca())
    apply_token_cache(other, toca(), tier="as_is")
    blocks = model.transformer_blocks
    kind, calls = type(blocks[0]).__bases__[1], []
    forward = kind.forward

    def count(self, *arguments, **named):
        calls.append(self)
        return forward(self, *arguments, **named)

    monkeypatch.setattr(kind, "forward", count)

    run(model)
    composed = STEPS * len(blocks) - len(calls)
    calls.clear()
    outs = [run(one, joint_attention_kwargs={"unknown": None}) for one in (model, other)]

    assert composed > 0
    assert len(calls) == 2 * STEPS * len(blocks)
    torch.testing.assert_close(*outs, rtol=0, atol=0)


def test_layers_that_lora_wraps_are_called_as_modules(device):
    """Also when they are wrapped after the policy was applied."""

    class Scaled(torch.nn.Module):
        def __init__(self, base):
            super().__init__()
            self.base_layer = base

        def forward(self, x):
            return 2 * self.base_layer(x)

    plain, wrapped = tiny_flux().to(device), tiny_flux().to(device)
    for model in (plain, wrapped):
        apply_token_cache(model, toca())
    for block in plain.single_transformer_blocks:
        for layer in (block.proj_mlp, block.proj_out):
            layer.weight *= 2
            layer.bias *= 2
    for block in wrapped.single_transformer_blocks:
        block.proj_mlp, block.proj_out = Scaled(block.proj_mlp), Scaled(block.proj_out)

    torch.testing.assert_close(run(wrapped), run(plain), rtol=1e-5, atol=1e-5)
