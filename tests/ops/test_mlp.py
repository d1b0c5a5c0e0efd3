import pytest
import torch

from tokencache_kernels.ops import RowNorm, gather_modulate, linear, linear_scatter, mlp, mlp_
from tokencache_kernels.testing import assert_within_budget, in_float64, randn, random_indices

OPS = ("mlp_",)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    pytest.param(2, 37, 11, 72, 40, id="odd-sizes"),
    pytest.param(1, 70, 66, 64, 128, id="round-sizes"),
    pytest.param(2, 5, 5, 7, 3, id="all-tokens"),
    pytest.param(2, 16, 0, 8, 8, id="no-slot"),
    pytest.param(0, 4, 2, 8, 8, id="no-sample"),
]


def make_inputs(B, N, S, D, M, dtype, device, num_empty=0):
    indices = random_indices(B, N, S, num_empty=num_empty, device=device)
    shapes = [(B, N, D), (B, N, D), (B, D), (B, D), (M, D), (M,), (D, M), (D,)]
    tensors = [
        randn(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes)
    ]
    tensors[4] /= D**0.5
    tensors[6] /= M**0.5
    return [*tensors[:2], indices, *tensors[2:]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "S", "D", "M"), SHAPES)
def test_mlp_is_as_exact_as_eager(backend, device, B, N, S, D, M, dtype):
    inputs = make_inputs(B, N, S, D, M, dtype, device, num_empty=min(S, 1))

    out = inputs[0].clone()
    returned = mlp_(out, *inputs[1:], backend=backend)

    assert returned is out
    assert_within_budget(
        out,
        exact=mlp(*in_float64(*inputs), backend="reference"),
        rounded=mlp(*inputs, backend="reference"),
    )


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_layers_without_bias_and_every_activation(backend, device, activation):
    inputs = make_inputs(1, 9, 4, 24, 40, torch.float32, device)
    inputs[6] = inputs[8] = None

    out = mlp(*inputs, activation=activation, eps=1e-2, backend=backend)

    assert_within_budget(
        out,
        exact=mlp(*in_float64(*inputs), activation=activation, eps=1e-2, backend="reference"),
        rounded=mlp(*inputs, activation=activation, eps=1e-2, backend="reference"),
    )


def test_an_index_outside_the_tokens_touches_no_memory(backend, device):
    inputs = make_inputs(1, 5, 4, 8, 16, torch.float32, device)
    inputs[2] = torch.tensor([[-7, 5, 2**31 - 1, -(2**31)]], dtype=torch.int32, device=device)

    out = mlp(*inputs, backend=backend)

    torch.testing.assert_close(out, inputs[0], rtol=0, atol=0)


def test_a_sliced_cache_is_written_in_place(backend, device):
    wide = randn(2, 40, 3, 24, device=device)
    before = wide.clone()
    inputs = make_inputs(2, 37, 11, 24, 40, torch.float32, device)

    mlp_(wide[:, 1:38, 1], *inputs[1:], backend=backend)

    wanted = mlp(before[:, 1:38, 1], *inputs[1:], backend="reference")
    torch.testing.assert_close(wide[:, 1:38, 1], wanted)
    torch.testing.assert_close(wide[:, :, [0, 2]], before[:, :, [0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(wide[:, [0, 38, 39]], before[:, [0, 38, 39]], rtol=0, atol=0)


def test_order_of_indices_does_not_matter(backend, device):
    inputs = make_inputs(2, 37, 11, 24, 40, torch.float32, device)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).to(device)
    permuted = [*inputs[:2], inputs[2][:, order].contiguous(), *inputs[3:]]

    out = mlp(*inputs, backend=backend)
    again = mlp(*permuted, backend=backend)

    torch.testing.assert_close(again, out)


def test_all_tokens_make_the_cache_forget(backend, device):
    inputs = make_inputs(2, 9, 9, 24, 40, torch.float32, device)

    out = mlp(*inputs, backend=backend)
    other = mlp(inputs[0] + 1, *inputs[1:], backend=backend)

    torch.testing.assert_close(other, out, rtol=0, atol=0)


@pytest.mark.parametrize("way", ["two weights", "gate_first", "gate_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_mlp_is_its_three_steps(backend, device, dtype, way):
    inputs = make_inputs(2, 37, 11, 24, 40, dtype, device, num_empty=1)
    cache, x, indices, _, scale, fc1_weight, fc1_bias, fc2_weight, fc2_bias = inputs
    gate_weight, gate_bias = 2 * fc1_weight.flip(0), 1 - fc1_bias
    norm = RowNorm("rms", randn(24, dtype=dtype, device=device), None, 1.0)
    scale = scale[:, None] * randn(2, 37, 24, dtype=dtype, device=device, seed=9)
    layer = (fc1_weight, fc1_bias)
    gate = {"gate_weight": gate_weight, "gate_bias": gate_bias}
    options = {"activation": "silu", "norm": norm}
    fused, given = layer, gate
    if way != "two weights":
        parts = [(gate_weight, fc1_weight), (gate_bias, fc1_bias)]
        order = (0, 1) if way == "gate_first" else (1, 0)
        fused, given = [torch.cat([pair[i] for i in order]) for pair in parts], {"glu": way}

    out = mlp(cache, x, indices, None, scale, *fused, fc2_weight, fc2_bias, **options, **given,
              backend=backend)  # fmt: skip

    def steps(cache, x, scale, weight, bias, gate_weight, gate_bias, fc2_weight, fc2_bias, norm):
        norm = options["norm"]._replace(weight=norm)
        rows = gather_modulate(x, indices, None, scale, norm=norm, backend="reference")
        rows = linear(rows, weight, bias, activation="silu", gate_weight=gate_weight,
                      gate_bias=gate_bias, backend="reference")  # fmt: skip
        return linear_scatter(cache, indices, rows, fc2_weight, fc2_bias, backend="reference")

    tensors = (cache, x, scale, *layer, *gate.values(), fc2_weight, fc2_bias, norm.weight)
    assert_within_budget(out, exact=steps(*in_float64(*tensors)), rounded=steps(*tensors))
    assert torch.equal(
        mlp_(cache.clone(), x, indices, None, scale, *fused, fc2_weight, fc2_bias, **options,
             **given, backend=backend),
        out,
    )  # fmt: skip
