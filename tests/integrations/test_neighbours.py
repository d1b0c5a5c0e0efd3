"""The cache beside other libraries' changes to a model: offloading, LoRA, compilation, copies."""

import copy
import gc
import pickle
import threading
from types import SimpleNamespace

import accelerate
import pytest
import torch
from torch import nn

from tokencache_kernels.integrations.diffusers import (
    apply_token_cache,
    remove_token_cache,
    reset_token_cache,
    token_cache_context,
)
from tokencache_kernels.policies import FactorRouter, IntervalSchedule, ScoreSelector, ToCaConfig
from tokencache_kernels.testing.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
STEPS = 6
NAMES = ("DiTTransformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel")


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def policy():
    router = FactorRouter(0.4, module_weight={"attn": 0.0, "cross": 1.0})
    return ToCaConfig(IntervalSchedule(3), router, ScoreSelector(staleness_weight=0.1), STEPS)


def make(name, is_cached=True):
    model = FAMILIES[name].build()
    if is_cached:
        apply_token_cache(model, policy())
    return model


def run(model, name, steps=range(STEPS), prompt=0):
    outputs = []
    for step in steps:
        with torch.no_grad():
            given = FAMILIES[name].inputs(step, prompt, 2)
            outputs.append(model(**given, return_dict=False)[0])
    return torch.stack(outputs)


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_that_is_broken_off_leaves_nothing_to_the_next(name, steps):
    used = make(name)
    run(used, name, range(steps))

    assert torch.equal(run(used, name, prompt=3), run(make(name), name, prompt=3))


@pytest.mark.works_with("an exception or an interrupt in the middle of a run")
def test_an_error_in_the_middle_leaves_nothing_to_the_next(name):
    used = make(name)
    run(used, name, range(1))

    def fail(*_):
        raise KeyboardInterrupt

    with (
        used.transformer_blocks[1].register_forward_hook(fail),
        pytest.raises(KeyboardInterrupt),
    ):
        run(used, name, [3])

    assert torch.equal(run(used, name), run(make(name), name))


@pytest.mark.works_with("guidance in two calls without names")
def test_two_passes_a_step_need_no_names(name):
    model = make(name)
    outputs = [[], []]
    for step in range(STEPS):
        for prompt in (0, 1):
            outputs[prompt].append(run(model, name, [step], prompt=prompt)[0])

    for prompt, got in enumerate(outputs):
        assert torch.equal(torch.stack(got), run(make(name), name, prompt=prompt))


@pytest.mark.works_with("several threads on one model")
def test_threads_have_runs_of_their_own():
    name = "FluxTransformer2DModel"
    model, answers = make(name), {}

    def work(prompt):
        with token_cache_context(model, "cond"):
            answers[prompt] = run(model, name, prompt=prompt)

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    for prompt in range(2):
        assert torch.equal(answers[prompt], run(make(name), name, prompt=prompt))


def test_a_reset_forgets_the_run_in_every_thread(name):
    model = make(name)
    run(model, name, range(2))
    reset_token_cache(model)

    out = run(model, name, [2])[0]

    assert torch.equal(out, run(make(name, is_cached=False), name, [2])[0])


@pytest.mark.works_with("another number of steps than the policy's")
def test_the_number_of_steps_follows_the_scheduler(name):
    class Scheduler:
        timesteps = torch.tensor([900.0 - 60 * step for step in range(4)])

    if name == "FluxTransformer2DModel":
        Scheduler.timesteps = Scheduler.timesteps / 1000
    model, other = FAMILIES[name].build(), FAMILIES[name].build()
    apply_token_cache(model, policy(), scheduler=Scheduler())
    router = FactorRouter(0.4, module_weight={"attn": 0.0, "cross": 1.0})
    selector = ScoreSelector(staleness_weight=0.1)
    apply_token_cache(other, ToCaConfig(IntervalSchedule(3), router, selector, 4))

    assert torch.equal(run(model, name, range(4)), run(other, name, range(4)))


# --- copies ---------------------------------------------------------------------------------------


@pytest.mark.works_with("deep copies and pickles")
def test_a_deep_copy_is_a_model_of_its_own(name):
    original = make(name)
    run(original, name, range(2))
    copied = copy.deepcopy(original)
    changed = make(name)
    for model in (copied, changed):
        for parameter in model.parameters():
            parameter.mul_(1.1)

    assert torch.equal(run(copied, name), run(changed, name))
    assert torch.equal(run(original, name, range(2, STEPS)), run(make(name), name)[2:])


def test_a_copy_of_a_part_alone_is_the_plain_part(name):
    model = make(name)
    plain = FAMILIES[name].build()
    seen = []
    plain.transformer_blocks[0].register_forward_pre_hook(
        lambda _, arguments, named: seen.append((arguments, named)), with_kwargs=True
    )
    run(plain, name, [0])
    arguments, named = seen[0]

    copied = copy.deepcopy(model.transformer_blocks[0])

    with torch.no_grad():
        got, wanted = (
            block(*arguments, **named) for block in (copied, plain.transformer_blocks[0])
        )
    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_a_part_and_its_model_copied_together_go_on_without_the_original(name):
    model = make(name)
    _, copied = copy.deepcopy([model.transformer_blocks[0], model])
    del model
    gc.collect()

    assert torch.equal(run(copied, name), run(make(name), name))


@pytest.mark.works_with("deep copies and pickles")
def test_a_pickle_keeps_the_policy(name):
    model = make(name)

    restored = pickle.loads(pickle.dumps(model))

    assert torch.equal(run(restored, name), run(make(name), name))


@pytest.mark.works_with("`save_pretrained`")
def test_a_saved_model_is_the_plain_one(name, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path)

    loaded = type(FAMILIES[name].build()).from_pretrained(tmp_path).eval()

    assert torch.equal(run(loaded, name), run(make(name, is_cached=False), name))


def test_its_class_counts_as_its_own(name):
    plain, cached = make(name, is_cached=False), make(name)

    assert type(cached) in (type(plain),)
    assert type(cached).__name__ == type(plain).__name__
    remove_token_cache(cached)
    assert type(cached) is type(plain)


# --- neighbours -----------------------------------------------------------------------------------


@pytest.mark.works_with("group offloading")
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading(name, level, order, tmp_path):
    if name == "DiTTransformer2DModel" and level == "block_level":
        pytest.skip("diffusers' block-level offloading does not work on it without a cache either")
    from diffusers.hooks import apply_group_offloading

    blocks = {"num_blocks_per_group": 1} if level == "block_level" else {}
    cpu = torch.device("cpu")
    model = make(name, is_cached=order == "after")
    apply_group_offloading(
        model, onload_device=cpu, offload_device=cpu, offload_type=level,
        offload_to_disk_path=str(tmp_path), **blocks,
    )  # fmt: skip
    if order == "before":
        apply_token_cache(model, policy())

    torch.testing.assert_close(run(model, name), run(make(name), name), rtol=1e-4, atol=1e-4)


@pytest.mark.works_with("layerwise casting")
@pytest.mark.parametrize("order", ["before", "after"])
def test_layerwise_casting(name, order):
    def cast(model):
        model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)

    model, other = make(name, is_cached=False), make(name, is_cached=False)
    cast(other)
    if order == "before":
        cast(model)
    apply_token_cache(model, policy(), tier="auto")
    if order == "after":
        cast(model)
    apply_token_cache(other, policy(), tier="as_is")

    torch.testing.assert_close(run(model, name), run(other, name), rtol=1e-4, atol=1e-4)


@pytest.mark.works_with("model offloading")
@pytest.mark.parametrize("order", ["before", "after"])
def test_model_offloading_that_puts_an_old_forward_back(name, order):
    class Noted(accelerate.hooks.ModelHook):
        pass

    model = make(name, is_cached=order == "after")
    accelerate.hooks.add_hook_to_module(model, Noted())
    if order == "before":
        apply_token_cache(model, policy())
    first = run(model, name)
    accelerate.hooks.remove_hook_from_module(model)
    second = run(model, name)

    plain = run(make(name), name)
    assert torch.equal(first, plain)
    assert torch.equal(second, plain)


@pytest.mark.works_with("sequential offloading")
@pytest.mark.parametrize("order", ["before", "after"])
def test_sequential_offloading(name, order):
    """Weights lie on the meta device between the calls of their layers, and come back later."""
    plain = FAMILIES[name].build()
    apply_token_cache(plain, policy(), tier="as_is")
    wanted = run(plain, name)
    model = make(name, is_cached=order == "after")
    accelerate.cpu_offload(model, torch.device("cpu"))
    if order == "before":
        apply_token_cache(model, policy())

    assert next(model.transformer_blocks[0].parameters()).is_meta
    assert torch.equal(run(model, name), wanted)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    torch.testing.assert_close(run(model, name), wanted, rtol=1e-4, atol=1e-4)


class Added(nn.Module):
    """A layer like LoRA's around another."""

    def __init__(self, base):
        super().__init__()
        self.base_layer = base

    def forward(self, x):
        return self.base_layer(x) + 0.1 * x.mean(-1, keepdim=True)


def wrap(model):
    for block in model.transformer_blocks:
        block.ff.net[2] = Added(block.ff.net[2])
    for block in getattr(model, "single_transformer_blocks", ()):
        block.proj_mlp, block.proj_out = Added(block.proj_mlp), Added(block.proj_out)


@pytest.mark.parametrize("order", ["before", "after", "between runs"])
def test_layers_that_are_wrapped_at_any_time(name, order):
    model, other = make(name, is_cached=order != "before"), make(name, is_cached=False)
    if order == "between runs":
        run(model, name)
    wrap(model)
    if order == "before":
        apply_token_cache(model, policy())
    wrap(other)
    apply_token_cache(other, policy(), tier="as_is")

    torch.testing.assert_close(run(model, name), run(other, name), rtol=1e-4, atol=1e-4)


def test_another_cache_is_refused_by_name():
    from diffusers import FirstBlockCacheConfig

    model = make("FluxTransformer2DModel", is_cached=False)
    model.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="have no other cache, got diffusers' FirstBlockCacheC"):
        apply_token_cache(model, policy())
    model.disable_cache()
    apply_token_cache(model, policy())
    with pytest.raises(ValueError, match="already has a token cache, so FirstBlockCacheConfig"):
        model.enable_cache(FirstBlockCacheConfig())


@pytest.mark.works_with("another dtype between runs (`from_pipe`)")
def test_a_change_of_dtype_between_runs(name):
    used, new = make(name), make(name, is_cached=False).to(torch.float64)
    run(used, name)
    used.to(torch.float64)
    apply_token_cache(new, policy())

    def run_double(model):
        with torch.no_grad():
            return torch.stack([
                model(**cast(FAMILIES[name].inputs(step, 0, 2)), return_dict=False)[0]
                for step in range(STEPS)
            ])  # fmt: skip

    def cast(given):
        return {
            key: value.double()
            if isinstance(value, torch.Tensor) and value.is_floating_point()
            else value
            for key, value in given.items()
        }

    assert torch.equal(run_double(used), run_double(new))


@pytest.mark.works_with("`torch.compile`")
@pytest.mark.parametrize("order", ["before", "after"])
def test_a_compiled_model_is_not_compiled_anew_in_later_runs(name, order):
    torch.compiler.reset()
    frames = []
    model = make(name, is_cached=order == "after")
    model.compile(backend=lambda graph, _: frames.append(1) or graph.forward)
    if order == "before":
        apply_token_cache(model, policy())

    first = run(model, name)
    compiled = len(frames)
    second = run(model, name)

    plain = run(make(name), name)
    torch.testing.assert_close(first, plain, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second, plain, rtol=1e-4, atol=1e-4)
    assert 0 < compiled == len(frames)


# --- pipelines and options ------------------------------------------------------------------------


def test_a_pipeline_with_two_transformers_gets_the_policy_on_both_or_none():
    name = "WanTransformer3DModel"
    first, second = FAMILIES[name].build(), FAMILIES[name].build()
    pipeline = SimpleNamespace(transformer=first, transformer_2=second)
    apply_token_cache(second, policy())

    with pytest.raises(ValueError, match="must not have a token cache yet"):
        apply_token_cache(pipeline, policy())
    remove_token_cache(second)
    plain = run(FAMILIES[name].build(), name)
    assert torch.equal(run(first, name), plain)

    apply_token_cache(pipeline, policy())
    for model in (first, second):
        assert not torch.equal(run(model, name), plain)
    remove_token_cache(pipeline)
    for model in (first, second):
        assert torch.equal(run(model, name), plain)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"tier": "fused"}, "tier must be 'auto' or 'as_is', got 'fused'"),
        ({"steps": "strict"}, "steps must be 'rescale' or 'exact', got 'strict'"),
    ],
)
def test_an_unknown_option_is_refused(options, sentence):
    model = make(NAMES[0], is_cached=False)

    with pytest.raises(ValueError, match=sentence):
        apply_token_cache(model, policy(), **options)

    apply_token_cache(model, policy())
