"""Captured steps on real models: the same bits as uncaptured ones, and clear refusals.

There need be no GPU: a tape stands for CUDA, which runs what was launched when the step was
captured, on the same tensors, and overwrites what a graph may not rely on.
"""

import pytest
import torch

from tokencache_kernels.blocks import GraphCounts
from tokencache_kernels.errors import UnsupportedInputError
from tokencache_kernels.integrations.diffusers import apply as apply_module
from tokencache_kernels.integrations.diffusers import (
    apply_token_cache,
    count_graph_steps,
    remove_token_cache,
    reset_token_cache,
    token_cache_context,
)
from tokencache_kernels.integrations.diffusers.predict import (
    make_content_predictor,
    make_table_predictor,
)
from tokencache_kernels.policies import (
    DuCaConfig,
    FactorRouter,
    IntervalSchedule,
    LearningToCacheConfig,
    ScoreSelector,
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


@pytest.fixture(autouse=True)
def tape(monkeypatch):
    """Let a tape capture."""
    monkeypatch.setattr(apply_module, "CudaCapture", Tape)


def dit_inputs(call):
    return {
        "hidden_states": randn(2, 2, 16, 16, seed=call),
        "timestep": torch.tensor([900, 880]) - 7 * call,
        "class_labels": torch.tensor([call % 10, 3]),
    }


def pixart_inputs(call):
    """Text and mask stay the same tensors during a run, as in a pipeline."""
    text, mask = TEXTS[call // STEPS % len(TEXTS)]
    return {
        "hidden_states": randn(2, 2, 8, 12, seed=call),
        "encoder_hidden_states": text,
        "encoder_attention_mask": mask,
        "timestep": torch.full((2,), 900 - 7 * call),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


TEXTS = [
    (randn(2, 5, 10, seed=seed), (torch.arange(5) < torch.tensor([[3], [5 - seed]])).long())
    for seed in range(4)
]


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


MODELS = {
    "dit": (lambda: tiny_dit(2, sample_size=16), dit_inputs),
    "pixart": (lambda: tiny_pixart(2), pixart_inputs),
    "flux": (lambda: tiny_flux(2, 2), flux_inputs),
}


def constant(base_score="none", ratio=0.3, interval=3, order=0, **selector):
    router = FactorRouter(ratio, module_weight={"attn": 0.0})
    selector = ScoreSelector(base_score, staleness_weight=0.1, **selector)
    return ToCaConfig(IntervalSchedule(interval), router, selector, STEPS, forecast_order=order)


def trained(variant="kv_all", make=make_table_predictor):
    """A predictor with random weights, for a DiT of 2 blocks with 64 tokens."""
    predictor = make(MODELS["dit"][0](), STEPS).requires_grad_(False)
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
        "tokencache-content": lambda: trained(make=make_content_predictor),
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
    pytest.param(model, make, id=f"{model}-{name}")
    for model, own in OWN.items()
    for name, make in {**EVERYWHERE, **own}.items()
]


def twins(name, policy, **options):
    """The same model twice, without and with graphs."""
    pair = [MODELS[name][0](), MODELS[name][0]()]
    for model, graphs in zip(pair, (False, True), strict=True):
        apply_token_cache(model, policy, cuda_graphs=graphs, **options)
    return pair


@torch.no_grad()
def call(model, named, **options):
    return model(**named, **options, return_dict=False)[0]


@pytest.mark.parametrize(("name", "make"), CASES)
def test_a_captured_run_is_the_uncaptured_one_bit_for_bit(name, make):
    """Over runs with other inputs in each, and in two cache contexts that share a memory."""
    plain, captured = twins(name, make())
    inputs = MODELS[name][1]

    for step in range(3 * STEPS):
        for offset, context in enumerate(("cond", "uncond")):
            named = inputs(step + offset * STEPS)
            outs = []
            for model in (plain, captured):
                with token_cache_context(model, context):
                    outs.append(call(model, named))
            assert torch.equal(*outs), f"call {step} of {context}"

    counts = count_graph_steps(captured)
    assert counts.uncaptured == counts.captured <= 2 * STEPS
    assert counts.replayed == 6 * STEPS - 2 * counts.captured >= 2 * STEPS


@pytest.mark.parametrize("name", MODELS)
def test_no_python_of_a_block_runs_in_a_replayed_step(name):
    model, inputs = MODELS[name][0](), MODELS[name][1]
    apply_token_cache(model, fora(3, STEPS), cuda_graphs=True)
    seen = []
    model.transformer_blocks[0].register_forward_pre_hook(lambda *_: seen.append(len(counted)))
    counted = []

    for step in range(2 * STEPS):
        before = count_graph_steps(model)
        call(model, inputs(step))
        counted.append(count_graph_steps(model).replayed > before.replayed)

    # the second of each kind is captured; behind the last step nothing is kept
    kinds = "full", "reuse", "reuse", "full", "reuse", "reuse", "last"
    first = [kinds.index(kind) for kind in kinds]
    python = sorted({*first, kinds.index("reuse", 2), kinds.index("full", 1), STEPS + 6})
    assert seen == python
    assert counted == [step not in python for step in range(2 * STEPS)]
    assert count_graph_steps(model) == GraphCounts(3, 3, 2 * STEPS - 6)


def test_a_ratio_that_changes_from_step_to_step_needs_a_graph_for_each():
    model = tiny_dit(2, sample_size=16)
    policy = ToCaConfig(
        IntervalSchedule(3), FactorRouter(0.3, time_slope=0.5), ScoreSelector("none"), STEPS
    )
    apply_token_cache(model, policy, cuda_graphs=True)

    for step in range(3 * STEPS):
        call(model, dit_inputs(step))

    # the full ones are all alike but for the last, behind which nothing is kept
    kinds = STEPS - 1
    assert count_graph_steps(model) == GraphCounts(kinds, kinds, 3 * STEPS - 2 * kinds)


@pytest.mark.parametrize("name", MODELS)
def test_a_run_that_was_broken_off_can_be_reset(name):
    plain, captured = twins(name, constant())
    inputs = MODELS[name][1]
    for model in (plain, captured):
        for step in range(STEPS + 4):
            call(model, inputs(step))
        reset_token_cache(model)

    for step in range(2 * STEPS):
        assert torch.equal(call(plain, inputs(step)), call(captured, inputs(step)))


@pytest.mark.parametrize("name", MODELS)
def test_another_batch_and_another_dtype_are_captured_anew(name):
    plain, captured = twins(name, constant())
    inputs = MODELS[name][1]

    def compare(change):
        for step in range(2 * STEPS):
            named = {
                key: change(value) if isinstance(value, torch.Tensor) else value
                for key, value in inputs(step).items()
            }
            assert torch.equal(call(plain, named), call(captured, named))

    compare(lambda value: value)
    compare(lambda value: value if value.shape[0] != 2 else value[:1])
    for model in (plain, captured):
        model.double()
    compare(lambda value: value.double() if value.is_floating_point() else value)
    compare(lambda value: value.double() if value.is_floating_point() else value)

    counts = count_graph_steps(captured)
    assert counts.uncaptured == counts.captured
    assert counts.replayed >= 4 * STEPS


def test_weights_that_change_between_runs_are_captured_anew():
    plain, captured = twins("dit", constant())

    def change(model):
        """A layer like LoRA's: another module, with the old one inside."""
        feed_forward = model.transformer_blocks[1].ff.net
        feed_forward[2] = torch.nn.Sequential(feed_forward[2], torch.nn.Tanh()).eval()

    def move(model):
        weight = model.transformer_blocks[0].ff.net[2].weight
        weight.data = 1.5 * weight.data

    for prepare in (lambda model: None, change, move):
        prepare(plain)
        prepare(captured)
        for step in range(2 * STEPS):
            named = dit_inputs(step)
            assert torch.equal(call(plain, named), call(captured, named))

    assert count_graph_steps(captured).captured == 9


def test_a_weight_that_is_written_in_place_is_seen():
    plain, captured = twins("dit", constant())
    for step in range(2 * STEPS):
        for model in (plain, captured):
            model.transformer_blocks[0].ff.net[2].weight.mul_(1.01)
        named = dit_inputs(step)
        assert torch.equal(call(plain, named), call(captured, named))


def test_another_text_in_the_middle_of_a_run_is_seen():
    plain, captured = twins("pixart", constant("attention_entropy"))

    for step in range(4 * STEPS):
        named = pixart_inputs(step)
        named["encoder_hidden_states"], named["encoder_attention_mask"] = TEXTS[step // 2 % 3]
        assert torch.equal(call(plain, named), call(captured, named))

    assert count_graph_steps(captured).replayed > STEPS


def test_removing_the_cache_gives_the_model_back():
    model = tiny_dit(2, sample_size=16)
    wanted = call(model, dit_inputs(0))
    apply_token_cache(model, constant(), cuda_graphs=True)
    for step in range(STEPS):
        call(model, dit_inputs(step))

    remove_token_cache(model)

    assert torch.equal(call(model, dit_inputs(0)), wanted)
    with pytest.raises(ValueError, match="must have a token cache with cuda_graphs=True"):
        count_graph_steps(model)
    apply_token_cache(model, constant(), cuda_graphs=True)
    assert torch.equal(call(model, dit_inputs(0)), wanted)


def test_the_output_is_not_overwritten_by_the_next_step():
    plain, captured = twins("dit", fora(3, STEPS))

    outs = [
        [call(model, dit_inputs(step)) for step in range(2 * STEPS)] for model in (plain, captured)
    ]

    for one, other in zip(*outs, strict=True):
        assert torch.equal(one, other)


def test_outputs_have_the_type_that_is_asked_for():
    model = tiny_dit(2, sample_size=16)
    wanted = type(model(**dit_inputs(0)))
    apply_token_cache(model, fora(3, 4), cuda_graphs=True)

    with torch.no_grad():
        outs = [model(**dit_inputs(step)) for step in range(8)]

    assert {type(out) for out in outs} == {wanted}
    assert count_graph_steps(model).replayed > 0


def changed(**changes):
    return {**dit_inputs(1), **changes}


@pytest.mark.parametrize(
    ("second", "sentence"),
    [
        pytest.param(
            changed(hidden_states=randn(1, 2, 16, 16)),
            r"cuda_graphs: hidden_states must be a tensor of shape \(2, 2, 16, 16\) and "
            r"torch.float32 in all steps of a run, got a tensor of shape \(1, 2, 16, 16\)",
            id="batch",
        ),
        pytest.param(changed(class_labels=None), "must be a tensor .* got None", id="none"),
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
            "timestep must be on cpu like the model, got a tensor on meta",
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
    model = tiny_dit(2, sample_size=16)
    apply_token_cache(model, constant(), cuda_graphs=True)
    call(model, dit_inputs(0))

    with pytest.raises(UnsupportedInputError, match=sentence):
        call(model, second)


def test_a_module_that_is_replaced_within_a_run_is_refused():
    model = tiny_dit(2, sample_size=16)
    apply_token_cache(model, constant(), cuda_graphs=True)
    call(model, dit_inputs(0))
    model.transformer_blocks[0].ff.net[2] = torch.nn.Linear(96, 24)

    with pytest.raises(UnsupportedInputError, match="keep its modules and parameters during a run"):
        call(model, dit_inputs(1))


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
    model.forward(**dit_inputs(0))


@pytest.mark.parametrize("is_late", [False, True], ids=["on apply", "in the first call"])
@pytest.mark.parametrize(
    ("prepare", "sentence"),
    [
        (offload, "no hook that moves them, got Identity on transformer_blocks.1.ff"),
        (hook_otherwise, "no hook that is not ours, got group_offloading on transformer_blocks.1"),
        (torch.nn.Module.train, "transformer must be in evaluation mode, got training mode"),
        (
            lambda model: model.compile(),
            "transformer must not be compiled, got torch.compile on the transf",
        ),
    ],
    ids=["offloaded", "hooked", "training", "compiled"],
)
def test_models_that_cannot_be_captured_are_refused(prepare, sentence, is_late):
    model = tiny_dit(2, sample_size=16)
    if not is_late:
        prepare(model)

    with pytest.raises(UnsupportedInputError, match=sentence):
        apply_and_call(model, prepare)


def test_gradients_and_autocast_are_refused():
    model = tiny_dit(2, sample_size=16)
    apply_token_cache(model, constant(), cuda_graphs=True)

    with pytest.raises(UnsupportedInputError, match=r"a call must be under torch.no_grad\(\)"):
        model(**dit_inputs(0))
    with (
        pytest.raises(UnsupportedInputError, match="a call must be without autocast"),
        torch.autocast("cpu"),
    ):
        call(model, dit_inputs(0))


def test_a_step_that_waits_for_the_device_is_named_with_its_cause():
    model = tiny_dit(2, sample_size=16)
    block = model.transformer_blocks[1]
    forward = block.ff.net[2].forward
    block.ff.net[2].forward = lambda rows: forward(rows) * rows.abs().max().item()
    apply_token_cache(model, constant(), cuda_graphs=True)
    for step in range(2):
        call(model, dit_inputs(step))

    sentence = "a step must be such that it can be captured, got RuntimeError: operation not perm"
    with pytest.raises(UnsupportedInputError, match=sentence) as caught:
        call(model, dit_inputs(2))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_without_a_cuda_device_graphs_are_refused(monkeypatch):
    monkeypatch.undo()
    if torch.cuda.is_available():
        model = tiny_dit(2, sample_size=16)
        apply_token_cache(model, constant(), cuda_graphs=True)
        with pytest.raises(UnsupportedInputError, match="must be on a CUDA device, got cpu"):
            call(model, dit_inputs(0))
    else:
        with pytest.raises(UnsupportedInputError, match="the machine must have a CUDA device"):
            apply_token_cache(tiny_dit(), constant(), cuda_graphs=True)
