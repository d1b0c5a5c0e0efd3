"""LoRA by PEFT on a model under a cache: put on, scaled, swapped, fused, taken off, at any time."""

import pytest
import torch
from peft import LoraConfig

from tokencache_kernels.integrations.diffusers import apply_token_cache
from tokencache_kernels.policies import FactorRouter, IntervalSchedule, ScoreSelector, ToCaConfig
from tokencache_kernels.testing.families import FAMILIES

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 5
NAMES = (
    "FluxTransformer2DModel", "SD3Transformer2DModel",
    "QwenImageTransformer2DModel", "WanTransformer3DModel",
)  # fmt: skip


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


def policy():
    router = FactorRouter(0.4, module_weight={"attn": 0.0, "cross": 1.0})
    return ToCaConfig(IntervalSchedule(3), router, ScoreSelector(staleness_weight=0.1), STEPS)


def make(name):
    model = FAMILIES[name].build()
    apply_token_cache(model, policy())
    return model


@torch.no_grad()
def run(model, name):
    return torch.stack([
        model(**FAMILIES[name].inputs(step, 0, 2), return_dict=False)[0] for step in range(STEPS)
    ])  # fmt: skip


def put_on(model, adapter="first", seed=0):
    """Add an adapter with random weights to every linear layer of the blocks."""
    layers = [
        path.removesuffix(".base_layer")
        for path, module in model.named_modules()
        if type(module) is torch.nn.Linear
        and "blocks" in path
        and not any(part in path for part in ("norm", "lora_"))
    ]
    model.add_adapter(LoraConfig(r=4, target_modules=layers), adapter_name=adapter)
    generator = torch.Generator().manual_seed(seed)
    for path, parameter in model.named_parameters():
        if f".{adapter}." in path:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=generator)
    model.eval().requires_grad_(False)


def fuse(model):
    put_on(model)
    model.fuse_lora()


def fuse_and_unfuse(model):
    fuse(model)
    model.unfuse_lora()


def swap(model):
    put_on(model)
    put_on(model, "second", seed=1)
    model.set_adapter("second")


def blend(model):
    swap(model)
    model.set_adapters(["first", "second"], weights=[0.5, 0.25])


def take_off(model):
    put_on(model)
    model.delete_adapters(["first"])


def switch_off(model):
    put_on(model)
    model.disable_adapters()


CHANGES = [put_on, fuse, fuse_and_unfuse, swap, blend, take_off, switch_off]


@pytest.mark.works_with("LoRA: put on, fused, swapped, taken off")
@pytest.mark.parametrize("change", CHANGES)
def test_lora_between_runs_is_lora_from_the_beginning(name, change):
    model, fresh = make(name), FAMILIES[name].build()
    run(model, name)
    change(model)
    change(fresh)
    apply_token_cache(fresh, policy(), tier="as_is")

    out = run(model, name)

    torch.testing.assert_close(out, run(fresh, name), rtol=1e-4, atol=1e-4)
    if change in (take_off, switch_off):
        torch.testing.assert_close(out, run(make(name), name), rtol=1e-4, atol=1e-4)
    else:
        assert not torch.allclose(out, run(make(name), name), rtol=1e-3, atol=1e-3)


@pytest.mark.works_with("LoRA: put on, fused, swapped, taken off")
def test_lora_put_on_in_the_middle_of_a_run_holds_from_the_next_step(name):
    model, other = make(name), make(name)
    inputs = [FAMILIES[name].inputs(step, 0, 2) for step in range(STEPS)]
    outs = []
    with torch.no_grad():
        for one in (model, other):
            for step in range(4):
                if step == 2:
                    put_on(one)
                    if one is other:
                        # as its weights say from now on
                        one.fuse_lora()
                outs.append(one(**inputs[step], return_dict=False)[0])

    torch.testing.assert_close(outs[:4], outs[4:], rtol=1e-4, atol=1e-4)
