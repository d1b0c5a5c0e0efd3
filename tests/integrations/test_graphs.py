"""Captured steps on real models: the same bits as uncaptured ones, and clear refusals.

Without a GPU a tape stands for CUDA: it repeats the launches of the captured step, on the same
tensors, and overwrites everything that a graph may not rely on.
"""

import copy
from functools import cache

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from tokencache_kernels.blocks import CudaCapture, GraphCounts
from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.integrations.diffusers import apply as apply_module
from tokencache_kernels.integrations.diffusers import (
    apply_token_cache,
    count_graph_steps,
    remove_token_cache,
    reset_token_cache,
    token_cache_context,
)
from tokencache_kernels.learn.train_predictor import (
    make_content_predictor,
    make_table_predictor,
)
from tokencache_kernels.policies import (
    DuCaConfig,
    FactorRouter,
    IntervalSchedule,
    LearningToCacheConfig,
    ScoreSelector,
    Taylor,
    ToCaConfig,
    TokenCacheConfig,
    fora,
    random_tokens,
    taylor_seer,
)
from tokencache_kernels.policies.decisions import ATTENTION_VARIANTS
from tokencache_kernels.testing import Tape, randn, tiny_dit, tiny_flux, tiny_pixart

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
STEPS = 7
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OTHER_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float64


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    """Let a tape capture where CUDA cannot."""
    if DEVICE == "cpu":
        monkeypatch.setattr(apply_module, "CudaCapture", Tape)


def dit_inputs(call):
    return {
        "hidden_states": randn(2, 2, 16, 16, seed=call),
        "timestep": torch.tensor([900, 880]) - 7 * call,
        "class_labels": torch.tensor([call // STEPS % 10, 3]),
    }


def pixart_inputs(call):
    return {
        "hidden_states": randn(2, 2, 8, 12, seed=call),
        **text(call // STEPS),
        "timestep": torch.full((2,), 900 - 7 * call),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


@cache
def text(run):
    """Text and mask: the same tensors during a run, as in a pipeline."""
    mask = torch.arange(5) < torch.tensor([[3], [5 - run % 4]])
    return {
        "encoder_hidden_states": randn(2, 5, 10, seed=run).to(DEVICE),
        "encoder_attention_mask": mask.long().to(DEVICE),
    }


def flux_inputs(call):
    return {
        "hidden_states": randn(2, 6, 4, seed=call),
        "encoder_hidden_states": randn(2, 5, 10, seed=call // STEPS),
        "pooled_projections": randn(2, 6, seed=call // STEPS),
        "timestep": torch.full((2,), 0.9 - 0.01 * call),
        "guidance": torch.full((2,), 3.5),
        "img_ids": (torch.arange(18).view(6, 3) + call) % 5.0,
        "txt_ids": torch.zeros(5, 3),
    }


INPUTS = {"dit": dit_inputs, "pixart": pixart_inputs, "flux": flux_inputs}
MODELS = {
    "dit": lambda: tiny_dit(2, sample_size=16),
    "pixart": lambda: tiny_pixart(2),
    "flux": lambda: tiny_flux(2, 2),
}


def make(name, device=DEVICE):
    return MODELS[name]().to(device)


def inputs(name, call, convert=lambda value: value.to(DEVICE)):
    return {
        key: convert(value) if isinstance(value, torch.Tensor) else value
        for key, value in INPUTS[name](call).items()
    }


def constant(base_score="none", ratio=0.3, interval=3, order=0, **selector):
    router = FactorRouter(ratio, module_weight={"attn": 0.0})
    selector = ScoreSelector(base_score, staleness_weight=0.1, **selector)
    return ToCaConfig(IntervalSchedule(interval), router, selector, STEPS, carrier=Taylor(order))


def trained(variant="kv_all", make_predictor=make_table_predictor):
    """A predictor with random weights, for a DiT of 2 blocks with 64 tokens."""
    predictor = make_predictor(MODELS["dit"](), STEPS).requires_grad_(False)
    for index, parameter in enumerate(predictor.parameters()):
        parameter.copy_(randn(*parameter.shape, seed=index))
    predictor.importance.copy_(randn(STEPS, 2, 64).sigmoid())
    return TokenCacheConfig(predictor, STEPS, attention=variant)


def preset(name, **options):
    return ToCaConfig.preset(name, num_inference_steps=STEPS, num_layers=2, **options)


EVERYWHERE = {
    "fora": lambda: fora(3, STEPS),
    "random": lambda: random_tokens(0.3, 3, STEPS),
    "taylor-1": lambda: taylor_seer(2, STEPS, 1),
    "taylor-2": lambda: taylor_seer(2, STEPS, 2),
    "toca-forecast": lambda: constant(order=1, interval=2),
    "attention-received": lambda: constant("attention_received"),
}
OWN = {
    "dit": {
        "toca": lambda: preset("dit-xl-ddim50"),
        "toca-mixed": lambda: preset("dit-xl-ddim50", mixed_steps=True),
        "duca": lambda: DuCaConfig(preset("dit-xl-ddim50", fresh_ratio=0.4)),
        "duca-random": lambda: DuCaConfig(preset("dit-xl-ddim50", fresh_ratio=0.4, seed=1)),
        "value-norm": lambda: constant("value_norm"),
        "learning-to-cache": lambda: LearningToCacheConfig(randn(STEPS, 4), threshold=0.5),
        "tokencache-content": lambda: trained(make_predictor=make_content_predictor),
        **{f"tokencache-{one}": lambda one=one: trained(one) for one in ATTENTION_VARIANTS},
    },
    "pixart": {
        "toca": lambda: preset("pixart-alpha"),
        "entropy": lambda: constant("attention_entropy"),
    },
    "flux": {
        "toca": lambda: preset("flux-1-dev", refresh_interval=3),
        "duca": lambda: DuCaConfig(preset("flux-1-dev", refresh_interval=4), skips_odd=True),
    },
}  # fmt: skip
CASES = [
    pytest.param(model, make_policy, id=f"{model}-{name}")
    for model, own in OWN.items()
    for name, make_policy in {**EVERYWHERE, **own}.items()
]


def twins(name, policy, **options):
    """The same model twice, without and with graphs."""
    pair = [make(name), make(name)]
    for model, graphs in zip(pair, (False, True), strict=True):
        apply_token_cache(model, policy, cuda_graphs=graphs, **options)
    return pair


@torch.no_grad()
def call(model, named, **options):
    return model(**named, **options, return_dict=False)[0]


@pytest.mark.parametrize(("name", "make_policy"), CASES)
def test_a_captured_run_is_the_uncaptured_one_bit_for_bit(name, make_policy):
    """Over runs with other inputs in each, and in two cache contexts that share a memory."""
    plain, captured = twins(name, make_policy())

    for step in range(3 * STEPS):
        for offset, context in enumerate(("cond", "uncond")):
            named = inputs(name, step + offset * STEPS)
            outs = []
            for model in (plain, captured):
                with token_cache_context(model, context):
                    outs.append(call(model, named))
            assert torch.equal(*outs), f"call {step} of {context}"

    counts = count_graph_steps(captured)
    assert counts.uncaptured == counts.captured <= 2 * STEPS
    assert counts.replayed == 6 * STEPS - 2 * counts.captured >= 2 * STEPS


@pytest.mark.parametrize("name", MODELS)
def test_runs_may_be_in_inference_mode_and_outside_in_turn(name):
    still = make(name)
    apply_token_cache(still, constant())
    changing = twins(name, constant())

    for step in range(4 * STEPS):
        named = inputs(name, step)
        expected = call(still, named)
        with torch.inference_mode(step // STEPS % 2 == 0):
            outs = [call(model, named) for model in changing]
        assert all(torch.equal(out, expected) for out in outs), f"call {step}"


@pytest.mark.parametrize("name", MODELS)
def test_no_python_of_a_block_runs_in_a_replayed_step(name):
    model = make(name)
    apply_token_cache(model, fora(3, STEPS), cuda_graphs=True)
    seen = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: seen.append(len(counted)))
    counted = []

    for step in range(2 * STEPS):
        before = count_graph_steps(model)
        call(model, inputs(name, step))
        counted.append(count_graph_steps(model).replayed > before.replayed)

    # the second of each kind is captured; behind the last step nothing is kept
    kinds = "full", "reuse", "reuse", "full", "reuse", "reuse", "last"
    first = [kinds.index(kind) for kind in kinds]
    python = sorted({*first, kinds.index("reuse", 2), kinds.index("full", 1), STEPS + 6})
    assert seen == python
    assert counted == [step not in python for step in range(2 * STEPS)]
    assert count_graph_steps(model) == GraphCounts(3, 3, 2 * STEPS - 6)


def test_a_ratio_that_changes_from_step_to_step_needs_a_graph_for_each():
    model = make("dit")
    policy = ToCaConfig(
        IntervalSchedule(3), FactorRouter(0.3, time_slope=0.5), ScoreSelector("none"), STEPS
    )
    apply_token_cache(model, policy, cuda_graphs=True)

    for step in range(3 * STEPS):
        call(model, inputs("dit", step))

    # the full ones are all alike but for the last, behind which nothing is kept
    kinds = STEPS - 1
    assert count_graph_steps(model) == GraphCounts(kinds, kinds, 3 * STEPS - 2 * kinds)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_that_was_broken_off_can_be_reset(name):
    plain, captured = twins(name, constant())
    for model in (plain, captured):
        for step in range(STEPS + 4):
            call(model, inputs(name, step))
        reset_token_cache(model)

    for step in range(2 * STEPS):
        assert torch.equal(*(call(model, inputs(name, step)) for model in (plain, captured)))


@pytest.mark.parametrize("name", MODELS)
def test_another_batch_and_another_dtype_are_captured_anew(name):
    plain, captured = twins(name, constant())

    def compare(convert):
        for step in range(2 * STEPS):
            named = inputs(name, step, convert)
            assert torch.equal(call(plain, named), call(captured, named))

    def cast(value):
        return value.to(DEVICE, OTHER_DTYPE if value.is_floating_point() else value.dtype)

    compare(lambda value: value.to(DEVICE))
    # the ids of FLUX have no batch
    compare(lambda value: (value[:1] if value.shape[0] == 2 else value).to(DEVICE))
    for model in (plain, captured):
        model.to(OTHER_DTYPE)
    compare(cast)
    compare(cast)

    counts = count_graph_steps(captured)
    assert counts.uncaptured == counts.captured
    # PixArt's text is projected once in a run: that step has a graph of its own
    assert counts.replayed >= 4 * STEPS - 2


class Scaled(torch.nn.Module):
    """A layer like LoRA's, with the old one inside and a scale that is no parameter."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.scaling = {"default": 1.5}

    def forward(self, rows):
        return self.layer(rows) * self.scaling["default"]


def wrap(model):
    feed_forward = model.transformer_blocks[1].ff.net
    feed_forward[2] = Scaled(feed_forward[2]).eval()


def rescale(model):
    model.transformer_blocks[1].ff.net[2].scaling["default"] = 0.5


def move(model):
    weight = model.transformer_blocks[0].ff.net[2].weight
    weight.data = 1.5 * weight.data


def test_a_model_that_changes_between_runs_is_captured_anew():
    plain, captured = twins("dit", constant())

    for prepare in (lambda model: None, wrap, rescale, move):
        before = count_graph_steps(captured).captured
        prepare(plain)
        prepare(captured)
        for step in range(2 * STEPS):
            named = inputs("dit", step)
            assert torch.equal(call(plain, named), call(captured, named))
        # full, partial, and the last
        assert count_graph_steps(captured).captured == before + 3


def test_a_weight_that_is_written_in_place_is_seen():
    plain, captured = twins("dit", constant())
    for step in range(2 * STEPS):
        for model in (plain, captured):
            model.transformer_blocks[0].ff.net[2].weight.mul_(1.01)
        named = inputs("dit", step)
        assert torch.equal(call(plain, named), call(captured, named))


def test_another_text_in_the_middle_of_a_run_is_seen():
    plain, captured = twins("pixart", constant("attention_entropy"))

    for step in range(4 * STEPS):
        named = {**inputs("pixart", step % STEPS), **text(step // 2 % 3)}
        assert torch.equal(call(plain, named), call(captured, named))

    assert count_graph_steps(captured).replayed > STEPS


def test_removing_the_cache_gives_the_model_back():
    model = make("dit")
    wanted = call(model, inputs("dit", 0))
    apply_token_cache(model, constant(), cuda_graphs=True)
    for step in range(STEPS):
        call(model, inputs("dit", step))

    remove_token_cache(model)

    assert torch.equal(call(model, inputs("dit", 0)), wanted)
    with pytest.raises(ValueError, match="must have a token cache with cuda_graphs=True"):
        count_graph_steps(model)
    apply_token_cache(model, constant(), cuda_graphs=True)
    assert torch.equal(call(model, inputs("dit", 0)), wanted)


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_captures_graphs_of_its_own(name):
    plain, captured = twins(name, constant())
    copied = copy.deepcopy(captured)

    for step in range(3 * STEPS):
        named = inputs(name, step)
        assert torch.equal(call(copied, named), call(plain, named)), f"call {step}"

    assert count_graph_steps(copied).replayed >= STEPS
    assert count_graph_steps(captured) == GraphCounts()


def test_the_output_is_not_overwritten_by_the_next_step():
    plain, captured = twins("dit", fora(3, STEPS))

    outs = [
        [call(model, inputs("dit", step)) for step in range(2 * STEPS)]
        for model in (plain, captured)
    ]

    for one, other in zip(*outs, strict=True):
        assert torch.equal(one, other)


def test_outputs_have_the_type_that_is_asked_for():
    model = make("dit")
    wanted = type(model(**inputs("dit", 0)))
    apply_token_cache(model, fora(3, 4), cuda_graphs=True)

    with torch.no_grad():
        outs = [model(**inputs("dit", step % 4)) for step in range(12)]

    assert {type(out) for out in outs} == {wanted}
    assert count_graph_steps(model).replayed > 0


def changed(**changes):
    return {**inputs("dit", 1), **changes}


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        pytest.param(
            changed(hidden_states=randn(1, 2, 16, 16).to(DEVICE)),
            r"cuda_graphs: hidden_states must be a tensor of shape \(2, 2, 16, 16\) and "
            r"torch.float32 in all steps of a run, got a tensor of shape \(1, 2, 16, 16\)",
            id="batch",
        ),
        pytest.param(
            changed(cross_attention_kwargs={"scale": 0.5}),
            r"cross_attention_kwargs\['scale'\] must be none in all steps of a run, got 0.5",
            id="more",
        ),
        pytest.param(
            changed(timestep=893), "timestep must be a tensor .* got 893; reset", id="number"
        ),
        pytest.param(
            changed(timestep=torch.tensor([5, 5], device="meta")),
            "timestep must be on .* like the model, got a tensor on meta",
            id="device",
        ),
        pytest.param(
            changed(cross_attention_kwargs={"mask": object()}),
            r"cross_attention_kwargs\['mask'\] must hold tensors, .* alone, got object",
            id="object",
        ),
    ],
)  # fmt: skip
def test_arguments_that_change_within_a_run_are_refused(second, sentence):
    model = make("dit")
    apply_token_cache(model, constant(), cuda_graphs=True)
    call(model, inputs("dit", 0))

    with pytest.raises(UnsupportedInputError, match=sentence):
        call(model, second)


def test_a_module_that_is_replaced_within_a_run_is_refused():
    model = make("dit")
    apply_token_cache(model, constant(), cuda_graphs=True)
    call(model, inputs("dit", 0))
    model.transformer_blocks[0].ff.net[2] = torch.nn.Linear(96, 24).to(DEVICE)

    with pytest.raises(UnsupportedInputError, match=r"modules and parameters .* others; reset the"):
        call(model, inputs("dit", 1))


def offload(model):
    model.transformer_blocks[1].ff._hf_hook = torch.nn.Identity()


def hook_otherwise(model):
    from diffusers.hooks import HookRegistry, ModelHook

    registry = HookRegistry.check_if_exists_or_initialize(model.transformer_blocks[1])
    registry.register_hook(ModelHook(), "group_offloading")


@torch.no_grad()
def apply_and_call(model, prepare):
    apply_token_cache(model, constant(), cuda_graphs=True)
    prepare(model)
    # not by way of a compiler
    model.forward(**inputs("dit", 0))


@pytest.mark.parametrize("is_late", [False, True], ids=["on apply", "in the first call"])
@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (offload, "no hook that moves them, got Identity on transformer_blocks.1.ff"),
        (hook_otherwise, "no hook that is not ours, got group_offloading on transformer_blocks.1"),
        (torch.nn.Module.train, "must be in evaluation mode, got training mode on the transformer"),
        (
            lambda model: model.transformer_blocks[1].train(),
            "in evaluation mode, got training mode on transformer_blocks.1",
        ),
        (
            lambda model: model.compile(),
            "transformer must not be compiled, got torch.compile on the transf",
        ),
    ],
    ids=["offloaded", "hooked", "training", "training in part", "compiled"],
)
def test_models_that_cannot_be_captured_are_refused(prepare, sentence, is_late):
    model = make("dit")
    if not is_late:
        prepare(model)

    with pytest.raises(UnsupportedInputError, match=sentence):
        apply_and_call(model, prepare)


def test_gradients_and_autocast_are_refused():
    model = make("dit")
    apply_token_cache(model, constant(), cuda_graphs=True)

    with pytest.raises(UnsupportedInputError, match=r"a call must be under torch.no_grad\(\)"):
        model(**inputs("dit", 0))
    with (
        pytest.raises(UnsupportedInputError, match="a call must be without autocast"),
        torch.autocast(DEVICE),
    ):
        call(model, inputs("dit", 0))


def test_a_step_that_waits_for_the_device_is_named_with_its_cause():
    model = make("dit")
    block = model.transformer_blocks[1]
    forward = block.ff.net[2].forward
    block.ff.net[2].forward = lambda rows: forward(rows) * rows.abs().max().item()
    apply_token_cache(model, constant(), cuda_graphs=True)
    for step in range(2):
        call(model, inputs("dit", step))

    sentence = "a step must be such that it can be captured, got .*Error: "
    with pytest.raises(UnsupportedInputError, match=sentence) as caught:
        call(model, inputs("dit", 2))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_without_a_cuda_device_graphs_are_refused(monkeypatch):
    monkeypatch.setattr(apply_module, "CudaCapture", CudaCapture)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    with pytest.raises(UnsupportedInputError, match="the machine must have a CUDA device"):
        apply_token_cache(tiny_dit(), constant(), cuda_graphs=True)


def test_a_model_on_the_cpu_is_refused_in_its_first_call(monkeypatch):
    """A pipeline may be moved after the cache was applied."""
    monkeypatch.setattr(apply_module, "CudaCapture", CudaCapture)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = make("dit", "cpu")
    apply_token_cache(model, constant(), cuda_graphs=True)

    with pytest.raises(UnsupportedInputError, match="must be on a CUDA device, got cpu"):
        call(model, dit_inputs(0))


class _HostWatch(TorchDispatchMode):
    """Refuses calls on a tensor that is not on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        tensors = [one for one in tree_iter((args, kwargs, output)) if torch.is_tensor(one)]
        assert all(tensor.device.type == "meta" for tensor in tensors), f"{func} on the host"
        return output


class MetaCapture:
    """Captures on a device without values, where nothing can wait for one."""

    def refusal(self, device):
        return None

    def capture(self, launch, device):
        with _HostWatch():
            output = launch()
        return lambda: output


@pytest.mark.parametrize(("name", "make_policy"), CASES)
def test_a_captured_step_leaves_the_host_alone(monkeypatch, name, make_policy):
    monkeypatch.setattr(apply_module, "CudaCapture", MetaCapture)
    # it knows no such device
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _: False)
    model, policy = make(name, "meta"), make_policy()
    if isinstance(policy, TokenCacheConfig):
        # counted while the predictor has values
        assert policy.fresh_counts
    apply_token_cache(model, policy, cuda_graphs=True)

    for step in range(2 * STEPS):
        named = inputs(name, step, lambda value: value.to("meta"))
        # its lengths are read before the step
        named.pop("encoder_attention_mask", None)
        call(model, named)

    assert count_graph_steps(model).captured > 0
