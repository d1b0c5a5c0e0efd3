"""The laws of the cache on a tiny model of every described class."""

import copy

import pytest
import torch
from torch import nn

from tokencache_kernels.integrations.diffusers import (
    apply_token_cache,
    cache_summary,
    register_model,
    remove_token_cache,
    token_cache_context,
)
from tokencache_kernels.integrations.diffusers.binding import list_blocks
from tokencache_kernels.integrations.diffusers.fused import Composer
from tokencache_kernels.integrations.diffusers.interception import interceptor_of, is_intercepted
from tokencache_kernels.models import SPECS, Mlp, ModelSpec, Stack, spec
from tokencache_kernels.policies import (
    FactorRouter,
    IntervalSchedule,
    ScoreSelector,
    Taylor,
    ToCaConfig,
    fora,
    taylor_seer,
)
from tokencache_kernels.testing.families import FAMILIES, VARIANTS

# diffusers deprecates parts of its own models
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 6


def policy(ratio=0.4, interval=3, base_score="attention_received", order=0):
    router = FactorRouter(ratio, module_weight={"attn": 0.0, "cross": 1.0})
    selector = ScoreSelector(base_score, staleness_weight=0.1)
    return ToCaConfig(IntervalSchedule(interval), router, selector, STEPS, carrier=Taylor(order))


def first(output):
    output = output[0] if isinstance(output, tuple) else output
    return torch.stack(output) if isinstance(output, list) else output


def run(model, name, steps=range(STEPS), prompt=0, batch=2, pick=None):
    outputs = []
    for step in steps:
        given = {**FAMILIES, **VARIANTS}[name].inputs(step, prompt, batch)
        if pick is not None:
            given = {key: take(value, pick, batch) for key, value in given.items()}
        with torch.no_grad():
            options = {"return_dict": False} if hasattr(model, "config") else {}
            outputs.append(first(model(**given, **options)))
    return torch.stack(outputs)


def take(value, pick, batch):
    if isinstance(value, torch.Tensor) and value.dim() and len(value) == batch:
        return value[pick : pick + 1]
    if isinstance(value, list) and len(value) == batch:
        return value[pick : pick + 1]
    return value


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


@pytest.fixture(params=["auto", "as_is"])
def tier(request):
    return request.param


def test_every_described_class_has_a_family():
    assert SPECS.keys() == FAMILIES.keys()


def test_always_full_is_the_original_bit_for_bit(name, tier):
    model = FAMILIES[name].build()
    original = run(model, name)
    apply_token_cache(model, policy(interval=1), tier=tier)

    assert torch.equal(run(model, name), original)


def test_a_removed_cache_leaves_the_original(name):
    model = FAMILIES[name].build()
    original = run(model, name)
    apply_token_cache(model, policy())
    changed = run(model, name)
    remove_token_cache(model)

    assert not torch.equal(changed, original)
    assert torch.equal(run(model, name), original)
    assert not any(map(is_intercepted, model.modules()))


def cached_modules(model, name):
    """Every module whose output is cached, from the description alone."""
    for stack in SPECS[name].stacks:
        for block in list_blocks(stack, getattr(model, stack.path)):
            for part in stack.parts:
                path = part.fc2 if isinstance(part, spec.Parallel) else part.module
                module = block
                for step in path.split("."):
                    module = getattr(module, step, None)
                if module is not None:
                    yield module


def test_no_fresh_token_is_fora_by_hand(name, tier):
    """Outputs of the cached modules are replaced by those of the last full step, by plain hooks."""
    model = FAMILIES[name].build()
    by_hand = copy.deepcopy(model)
    apply_token_cache(model, fora(3, STEPS), tier=tier)
    kept, state = {}, {"full": True}

    def keep(module, _, output):
        if state["full"]:
            kept[module] = output
            return None
        return kept[module]

    for module in cached_modules(by_hand, name):
        module.register_forward_hook(keep)
    wanted = []
    for step in range(STEPS):
        state["full"] = step % 3 == 0
        wanted.append(run(by_hand, name, [step])[0])

    torch.testing.assert_close(run(model, name), torch.stack(wanted), rtol=1e-4, atol=1e-4)


def test_both_tiers_agree(name):
    fused, as_is = (FAMILIES[name].build() for _ in range(2))
    apply_token_cache(fused, policy())
    apply_token_cache(as_is, policy(), tier="as_is")

    torch.testing.assert_close(run(fused, name), run(as_is, name), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "LTXVideoTransformer3DModel"])
def test_both_tiers_take_the_same_tokens_by_the_attention_to_the_text(name):
    models = [FAMILIES[name].build() for _ in range(2)]
    by_entropy = policy(base_score="attention_entropy")
    for model, tier in zip(models, ("auto", "as_is"), strict=True):
        apply_token_cache(model, by_entropy, tier=tier)

    outputs = [run(model, name, range(3)) for model in models]

    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
    runners = [interceptor_of(model).session.passes()[0][1].runner for model in models]
    for group in runners[0].plan.groups:
        states = [runner.token_state(group.sites[0]) for runner in runners]
        if states[0] is not None:
            assert torch.equal(states[0].staleness, states[1].staleness)
            # fresh tokens have new scores, those of the tokens' own attention
            torch.testing.assert_close(states[0].scores, states[1].scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_laws_hold_for_other_ways_through_a_class(name):
    dense, *models = (VARIANTS[name].build() for _ in range(4))
    steps = range(3)
    original = run(dense, name, steps)
    apply_token_cache(models[0], policy(interval=1))
    apply_token_cache(models[1], policy())
    apply_token_cache(models[2], policy(), tier="as_is")

    full, fused, as_is = (run(model, name, steps) for model in models)

    assert torch.equal(full, original)
    assert not torch.equal(fused, original)
    torch.testing.assert_close(fused, as_is, rtol=1e-4, atol=1e-4)
    assert set(cache_summary(models[1]).tiers.values()) == {"fused"}
    remove_token_cache(models[1])
    assert torch.equal(run(models[1], name, steps), original)


# the reasons that keep some blocks of a class from being composed of sub-layers
AS_IS = {
    "UTransformer2DModel": ["the norm before attn1 is not described"],
    "CogVideoXTransformer3DModel": ["the norm before attn1 is not described"],
    "LTX2VideoTransformer3DModel": ["the norm before attn1 is not described"],
    "LatteTransformer3DModel": ["the norm before attn1 is not described"],
    "SD3Transformer2DModel": [
        "norm1_context makes 2 vectors",
        "the norm before attn2 is not described",
    ],
}


def test_blocks_are_composed_wherever_nothing_is_said(name, monkeypatch):
    model, composed = FAMILIES[name].build(), set()
    own = Composer.run

    def note(composer):
        composed.add(composer._block)
        own(composer)

    monkeypatch.setattr(Composer, "run", note)
    apply_token_cache(model, policy())
    run(model, name)

    tiers = cache_summary(model).tiers
    reasons = {tier.removeprefix("as is: ") for tier in tiers.values() if tier != "fused"}
    assert sorted(reasons) == AS_IS.get(name, [])
    assert len(composed) == list(tiers.values()).count("fused")


def test_some_fresh_tokens_are_neither_all_nor_none(name):
    models = [FAMILIES[name].build() for _ in range(3)]
    dense = run(models[0], name)
    apply_token_cache(models[1], policy(ratio=0.9))
    apply_token_cache(models[2], fora(3, STEPS))

    some, none = run(models[1], name), run(models[2], name)

    assert not torch.equal(some, dense)
    assert not torch.equal(some, none)


def test_a_sample_of_a_batch_is_that_sample_alone(name):
    together, alone = (FAMILIES[name].build() for _ in range(2))
    for model in (together, alone):
        apply_token_cache(model, policy())

    out = run(together, name, batch=2)

    torch.testing.assert_close(out[:, 1:2], run(alone, name, batch=2, pick=1), rtol=1e-4, atol=1e-4)


def test_two_contexts_stay_apart(name):
    model, alone = (FAMILIES[name].build() for _ in range(2))
    for one in (model, alone):
        apply_token_cache(one, policy())
    wanted = [run(alone, name, prompt=prompt) for prompt in (0, 1)]
    outputs = [[], []]
    for step in range(STEPS):
        for prompt in (0, 1):
            with token_cache_context(model, f"request {prompt}"):
                outputs[prompt].append(run(model, name, [step], prompt=prompt)[0])

    for got, of_prompt in zip(outputs, wanted, strict=True):
        assert torch.equal(torch.stack(got), of_prompt)


def test_the_buffers_are_those_of_the_plan(name, tier):
    model = FAMILIES[name].build()
    apply_token_cache(model, policy(order=1), tier=tier)
    run(model, name)
    runner = interceptor_of(model).session.passes()[0][1].runner

    for group in runner.plan.groups:
        for site in group.sites:
            storage = runner.plan.storage(site)
            buffers = runner.features._buffers.get(site, [])
            assert len(buffers) == storage.features + storage.differences, site


@pytest.mark.parametrize("order", [1, 2])
def test_a_forecast_runs_on_every_model(name, order):
    model = FAMILIES[name].build()
    reused = FAMILIES[name].build()
    apply_token_cache(model, taylor_seer(3, STEPS, order))
    apply_token_cache(reused, ToCaConfig(
        IntervalSchedule(3, warmup=3, phase=2), FactorRouter(0.0), ScoreSelector("none"), STEPS
    ))  # fmt: skip

    out = run(model, name)

    assert out.isfinite().all()
    assert not torch.equal(out, run(reused, name))


# --- a model of someone's own ---------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(12), nn.MultiheadAttention(12, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 12))

    def forward(self, tokens, shift):
        rows = self.norm(tokens) + shift[:, None]
        tokens = tokens + self.attention(rows, rows, rows, need_weights=False)[0]
        return tokens + self.mlp(tokens)


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.layers = nn.Linear(1, 12), nn.ModuleList(Block() for _ in range(3))

    def forward(self, tokens, time):
        for layer in self.layers:
            tokens = layer(tokens, self.embed(time[:, None]))
        return tokens


OWN = ModelSpec(
    "Own",
    (Stack("layers", (Mlp("mlp", stream="tokens"),), streams=("tokens",), returns=("tokens",)),),
    conditioning=(),
    latents="tokens",
    timestep="time",
)


def run_own(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return torch.stack([
            model(torch.randn(2, 9, 12, generator=generator), torch.full((2,), 1 - step / 10))
            for step in range(STEPS)
        ])  # fmt: skip


def test_a_model_of_someones_own_takes_ten_lines():
    torch.manual_seed(0)
    model = Own().eval()
    original = run_own(model)
    apply_token_cache(model, policy(base_score="none"), spec=OWN)

    out = run_own(model)

    assert torch.equal(out[[0, 3]], original[[0, 3]])
    assert not torch.equal(out, original)
    remove_token_cache(model)
    assert torch.equal(run_own(model), original)


class WritingBlock(Block):
    """Like ``Block``, but it writes into the outputs of its modules."""

    def forward(self, tokens, shift):
        rows = self.norm(tokens) + shift[:, None]
        attended = self.attention(rows, rows, rows, need_weights=False)[0]
        tokens = attended.add_(tokens)
        out = self.mlp(tokens)
        out += tokens
        return out


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_block_may_write_into_what_its_modules_return(mode):
    torch.manual_seed(0)
    model = Own().eval()
    writing = copy.deepcopy(model)
    for block in writing.layers:
        block.__class__ = WritingBlock
    for one in (model, writing):
        apply_token_cache(one, policy(base_score="none"), spec=OWN)

    with mode():
        runs = [(run_own(model), run_own(writing)) for _ in range(2)]

    for out, written in runs:
        torch.testing.assert_close(written, out, rtol=1e-6, atol=1e-6)


def test_a_block_that_begins_to_write_ends_the_run():
    torch.manual_seed(0)
    model, other = Own().eval(), Own().eval()
    other.load_state_dict(model.state_dict())
    for one in (model, other):
        apply_token_cache(one, policy(base_score="none"), spec=OWN)
    run_own(model)
    forward = Block.forward
    Block.forward = WritingBlock.forward
    try:
        with pytest.raises(NotImplementedError, match="wrote into a cached output"):
            run_own(model)
        again = run_own(model)
    finally:
        Block.forward = forward

    torch.testing.assert_close(again, run_own(other), rtol=1e-6, atol=1e-6)


class TakingAnything(Block):
    """A block whose last argument has no name."""

    def forward(self, tokens, *rest):
        return super().forward(tokens, *rest)


def test_arguments_without_a_name_are_passed_on():
    torch.manual_seed(0)
    model = Own().eval()
    other = copy.deepcopy(model)
    for block in other.layers:
        block.__class__ = TakingAnything
    for one in (model, other):
        apply_token_cache(one, policy(base_score="none"), spec=OWN)

    assert torch.equal(run_own(other), run_own(model))


class GatedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.norm_behind = nn.RMSNorm(12), nn.RMSNorm(12)
        self.up, self.gate, self.down = nn.Linear(12, 24), nn.Linear(12, 24), nn.Linear(24, 12)
        self.mlp = GatedMlp(self.up, self.gate, self.down)

    def forward(self, tokens, shift):
        return tokens + self.norm_behind(self.mlp(self.norm(tokens)))


class GatedMlp(nn.Module):
    def __init__(self, up, gate, down):
        super().__init__()
        self.up, self.gate, self.down = up, gate, down

    def forward(self, rows):
        return self.down(torch.nn.functional.silu(self.gate(rows)) * self.up(rows))


class OwnGated(Own):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(GatedBlock() for _ in range(3))


GATED = ModelSpec(
    "OwnGated",
    (
        Stack(
            "layers",
            (
                Mlp(
                    "mlp",
                    stream="tokens",
                    norm=spec.Norm("norm", "rms"),
                    post_norm=spec.Norm("norm_behind", "rms"),
                    layers=spec.Layers("up", "down", "silu", gate="gate"),
                ),
            ),
            streams=("tokens",),
            returns=("tokens",),
            # the block is given it, and does not read it
            vectors=(spec.Vectors("unused", "argument", argument="shift", count=1),),
        ),
    ),
    conditioning=(),
    latents="tokens",
    timestep="time",
)


def test_a_registered_model_of_someones_own_is_fused():
    register_model(GATED)
    outputs = []
    for tier in ("auto", "as_is"):
        torch.manual_seed(0)
        model = OwnGated().eval().requires_grad_(False)
        apply_token_cache(model, policy(base_score="none"), tier=tier)
        outputs.append(run_own(model))
        wanted = "fused" if tier == "auto" else "as is: tier='as_is' was asked for"
        assert set(cache_summary(model).tiers.values()) == {wanted}

    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_an_undescribed_model_is_told_what_to_give():
    with pytest.raises(NotImplementedError, match=r"described by spec=ModelSpec\(...\), got Own"):
        apply_token_cache(Own(), policy())


def test_a_model_that_cannot_be_cached_is_told_why():
    class SanaTransformer2DModel(Own):
        pass

    with pytest.raises(NotImplementedError, match="the MLP has a convolution"):
        apply_token_cache(SanaTransformer2DModel(), policy())
