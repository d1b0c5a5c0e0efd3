"""A traced program gives the kernels that it would launch, and the arithmetic that plans count."""

import pytest
import torch
import torch.nn.functional as F

import tokencache_kernels as tck
from benchmarks.launches import trace
from tokencache_kernels.integrations.diffusers import apply_token_cache
from tokencache_kernels.policies import MODELS, ToCaConfig, make_plan


def on_meta(*sizes, dtype=torch.bfloat16):
    return torch.empty(sizes, dtype=dtype, device="meta")


def test_a_pass_reads_its_inputs_and_writes_its_result():
    x = on_meta(2, 8, 16)

    with trace() as kernels:
        (x.transpose(0, 1) * on_meta(16))[0].t()

    (kernel,) = kernels
    assert (kernel.name, kernel.bytes) == ("aten::mul", 2 * (2 * 8 * 16 + 2 * 8 * 16 + 16))


def test_products_and_attention_have_their_arithmetic():
    x, weight, heads = on_meta(2, 8, 16), on_meta(32, 16), on_meta(2, 4, 8, 16)

    with trace() as kernels:
        F.linear(x, weight, on_meta(32))
        F.scaled_dot_product_attention(heads, heads[:, :, :5], heads[:, :, :5])
        heads @ heads.transpose(2, 3)

    products = [(kernel.product, kernel.flops) for kernel in kernels if kernel.flops]
    assert products == [
        ((1, 16, 32, 16), 2 * 16 * 32 * 16),
        (None, 4 * 2 * 4 * 8 * 5 * 16),
        ((8, 8, 8, 16), 2 * 8 * 8 * 8 * 16),
    ]


def test_our_ops_are_one_kernel_each():
    cache, rows = on_meta(2, 8, 16), on_meta(2, 3, 16)
    indices = torch.empty(2, 3, dtype=torch.int32, device="meta")
    weight, heads = on_meta(16, 16), on_meta(2, 8, 2, 8)

    with trace() as kernels:
        tck.scatter_rows_(cache, indices, rows)
        tck.gather_rows(cache, indices)
        tck.linear(rows, weight)
        tck.linear_scatter_(cache, indices, rows, weight)
        tck.attention_received(heads, heads)

    assert [kernel.name.split("::")[1] for kernel in kernels] == [
        "scatter_rows_", "gather_rows", "linear", "linear_scatter_", "attention_received",
    ]  # fmt: skip
    assert all(kernel.is_ours for kernel in kernels)
    assert [kernel.bytes for kernel in kernels[:2]] == [2 * 2 * rows.numel()] * 2
    assert [kernel.product for kernel in kernels[2:4]] == [(1, 6, 16, 16)] * 2
    assert kernels[4].flops == 4 * 2 * 8 * 8 * 16


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_model_multiplies_what_its_plan_says():
    diffusers = pytest.importorskip("diffusers")
    layers, steps = 3, 4
    policy = ToCaConfig.preset("dit-xl-ddim50", num_layers=layers, num_inference_steps=steps)
    with torch.device("meta"), torch.no_grad():
        model = diffusers.DiTTransformer2DModel(
            num_layers=layers, sample_size=32, num_embeds_ada_norm=1000, norm_type="ada_norm_zero",
            in_channels=4, out_channels=8, norm_elementwise_affine=False,
            activation_fn="gelu-approximate",
        ).eval()  # fmt: skip
        latents, labels = torch.empty(2, 4, 32, 32), torch.empty(2, dtype=torch.long)
        apply_token_cache(model, policy)
        flops = []
        for _ in range(steps):
            with trace() as kernels:
                model(latents, timestep=labels, class_labels=labels)
            flops.append(sum(kernel.flops for kernel in kernels))

    steps = make_plan(policy, MODELS["dit-xl"].build(num_layers=layers, image_tokens=256)).steps
    assert {step.is_full for step in steps} == {True, False}
    # a plan leaves out embeddings and modulation, a trace norms and activations; a step that takes
    # scores multiplies queries and keys once more
    assert flops == pytest.approx([step.flops for step in steps], rel=0.1)
