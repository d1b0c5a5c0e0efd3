"""Models whose linear layers are quantised, by each library that people use, before or after."""

import pytest
import torch
import torchao  # noqa: F401  (diffusers looks for it when it is imported)
from torch import nn

from tokencache_kernels.integrations.diffusers import apply_token_cache, remove_token_cache
from tokencache_kernels.policies import FactorRouter, IntervalSchedule, ScoreSelector, ToCaConfig
from tokencache_kernels.testing.families import FAMILIES
from tokencache_kernels.testing.models import tiny_dit, tiny_flux, tiny_pixart

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 5
# 32 channels: GGUF's blocks are that long
MODELS = {
    "DiTTransformer2DModel": lambda: tiny_dit(num_attention_heads=4),
    "PixArtTransformer2DModel": lambda: tiny_pixart(num_attention_heads=4, cross_attention_dim=32),
    "FluxTransformer2DModel": lambda: tiny_flux(attention_head_dim=16, axes_dims_rope=(4, 6, 6)),
}


def policy(interval=3):
    router = FactorRouter(0.4, module_weight={"attn": 0.0, "cross": 1.0})
    return ToCaConfig(
        IntervalSchedule(interval), router, ScoreSelector(staleness_weight=0.1), STEPS
    )


@torch.no_grad()
def run(model, name):
    return torch.stack([
        model(**FAMILIES[name].inputs(step, 0, 2), return_dict=False)[0] for step in range(STEPS)
    ])  # fmt: skip


# --- each kind turns a linear layer into a quantised one, and says which weight that has ----------


def by_torchao(layer):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    holder = nn.Sequential(layer)
    quantize_(holder, Int8WeightOnlyConfig())
    return holder[0], holder[0].weight.dequantize()


def by_bitsandbytes_4bit(layer):
    import bitsandbytes

    made = bitsandbytes.nn.Linear4bit(
        layer.in_features, layer.out_features, quant_type="nf4", compute_dtype=torch.float32
    )
    made.weight = bitsandbytes.nn.Params4bit(
        layer.weight.data, requires_grad=False, quant_type="nf4"
    )
    made.bias = layer.bias
    made = made.to("cpu")
    weight = bitsandbytes.functional.dequantize_4bit(made.weight.data, made.weight.quant_state)
    return made, weight


def by_bitsandbytes_8bit(layer):
    import bitsandbytes

    made = bitsandbytes.nn.Linear8bitLt(
        layer.in_features, layer.out_features, has_fp16_weights=False
    )
    made.weight = bitsandbytes.nn.Int8Params(
        layer.weight.data, requires_grad=False, has_fp16_weights=False
    )
    made.bias = layer.bias
    # activations are quantised too: there is no plain layer that does the same
    return made.to("cpu"), None


def by_gguf(layer):
    import gguf
    from diffusers.quantizers.gguf.utils import (
        GGUFLinear,
        GGUFParameter,
        dequantize_gguf_tensor,
    )

    kind = gguf.GGMLQuantizationType.Q8_0
    packed = gguf.quants.quantize(layer.weight.numpy(), kind)
    made = GGUFLinear(layer.in_features, layer.out_features, True, compute_dtype=torch.float32)
    made.weight = GGUFParameter(torch.from_numpy(packed), quant_type=kind)
    made.bias = layer.bias
    # in float16, as a call of the layer does
    return made, dequantize_gguf_tensor(made.weight)


KINDS = [
    pytest.param(kind, marks=pytest.mark.works_with(f"weights of {library}"))
    for kind, library in [
        (by_torchao, "torchao"),
        (by_bitsandbytes_4bit, "bitsandbytes"),
        (by_bitsandbytes_8bit, "bitsandbytes"),
        (by_gguf, "GGUF"),
    ]
]


def quantise(model, kind):
    """Quantise all linear layers of the blocks; return a plain model with the same weights."""
    weights = {}
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or "blocks" not in name or module.in_features % 32:
            continue
        parent, _, last = name.rpartition(".")
        made, weights[f"{name}.weight"] = kind(module)
        setattr(model.get_submodule(parent), last, made)
    assert weights
    return weights


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_cached_as_one_with_its_weights(name, kind, order):
    model, other = MODELS[name](), MODELS[name]()
    if order == "after":
        apply_token_cache(model, policy())
        run(model, name)
    weights = quantise(model, kind)
    if order == "before":
        apply_token_cache(model, policy())
    if None in weights.values():
        quantise(other, kind)
    else:
        for path, weight in weights.items():
            other.get_parameter(path).data.copy_(weight)
    apply_token_cache(other, policy(), tier="as_is")

    torch.testing.assert_close(run(model, name), run(other, name), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_model_is_itself_where_all_is_full_or_the_cache_is_gone(name, kind):
    model = MODELS[name]()
    quantise(model, kind)
    plain = run(model, name)

    apply_token_cache(model, policy(interval=1))
    full = run(model, name)
    remove_token_cache(model)

    assert torch.equal(full, plain)
    assert torch.equal(run(model, name), plain)
