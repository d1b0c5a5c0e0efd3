import pytest
import torch

from tokencache_kernels.backends import reference
from tokencache_kernels.ops import gather_rows, linear, linear_scatter, linear_scatter_
from tokencache_kernels.testing import assert_within_budget, in_float64, randn, random_indices

OPS = ("linear", "linear_scatter_")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    pytest.param(2, 37, 11, 72, 40, id="odd-sizes"),
    pytest.param(1, 80, 70, 128, 192, id="round-sizes"),
    pytest.param(3, 5, 5, 7, 3, id="all-tokens"),
    pytest.param(2, 16, 0, 8, 8, id="no-slot"),
    pytest.param(1, 3, 1, 1, 1, id="one-channel"),
    pytest.param(0, 4, 2, 8, 8, id="no-sample"),
]


def make_layer(K, O, dtype, device):  # noqa: E741
    return (
        randn(O, K, dtype=dtype, device=device, seed=1) / K**0.5,
        randn(O, dtype=dtype, device=device, seed=2),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "S", "K", "O"), SHAPES)
def test_linear_is_as_exact_as_eager(backend, device, B, N, S, K, O, dtype):  # noqa: E741
    inputs = (randn(B, S, K, dtype=dtype, device=device), *make_layer(K, O, dtype, device))

    out = linear(*inputs, activation="gelu", backend=backend)

    assert_within_budget(
        out,
        exact=reference.linear(*in_float64(*inputs), "gelu", None),
        rounded=reference.linear(*inputs, "gelu", None),
    )


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_tanh", "silu"])
def test_activations_hold_from_one_end_to_the_other(backend, device, activation):
    x = torch.linspace(-30, 30, 241, device=device).reshape(1, 241, 1)
    weight = torch.ones(1, 1, device=device)

    out = linear(x, weight, activation=activation, backend=backend)

    assert_within_budget(
        out,
        exact=reference.linear(x.double(), weight.double(), None, activation, None),
        rounded=reference.linear(x, weight, None, activation, None),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathered_rows_are_the_packed_rows(backend, device, dtype):
    x = randn(2, 37, 72, dtype=dtype, device=device)
    weight, bias = make_layer(72, 40, dtype, device)
    indices = random_indices(2, 37, 11, num_empty=2, device=device)

    out = linear(x, weight, bias, activation="silu", indices=indices, backend=backend)

    packed = gather_rows(x, indices, backend="reference")
    wanted = linear(packed, weight, bias, activation="silu", backend=backend)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)


def test_an_empty_slot_is_a_row_of_zeros(backend, device):
    x = torch.full((1, 6, 16), 1e30, device=device)
    x[0, 3] = 1.0
    weight, bias = make_layer(16, 24, torch.float32, device)
    indices = torch.tensor([[-1, 3, 6, 2**31 - 1]], dtype=torch.int32, device=device)

    out = linear(x, weight, bias, indices=indices, backend=backend)

    for slot in (0, 2, 3):
        torch.testing.assert_close(out[0, slot], bias, rtol=0, atol=0)
    torch.testing.assert_close(out[0, 1], weight.sum(1) + bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "S", "K", "O"), SHAPES)
def test_scatter_writes_the_selected_rows_and_no_other(backend, device, B, N, S, K, O, dtype):  # noqa: E741
    weight, bias = make_layer(K, O, dtype, device)
    x = randn(B, S, K, dtype=dtype, device=device)
    indices = random_indices(B, N, S, num_empty=min(S, 1), device=device)
    inputs = (randn(B, N, O, dtype=dtype, device=device, seed=3), indices, x, weight, bias)

    out = inputs[0].clone()
    returned = linear_scatter_(out, *inputs[1:], backend=backend)

    assert returned is out
    assert_within_budget(
        out,
        exact=linear_scatter(*in_float64(*inputs), backend="reference"),
        rounded=linear_scatter(*inputs, backend="reference"),
    )
    kept = torch.ones(B, N + 1, dtype=torch.bool, device=device)
    kept.scatter_(1, torch.where(indices < 0, N, indices).long(), False)
    torch.testing.assert_close(out[kept[:, :N]], inputs[0][kept[:, :N]], rtol=0, atol=0)


@pytest.mark.parametrize("residual", [False, True], ids=["replace", "residual"])
@pytest.mark.parametrize("has_gate", [False, True], ids=["no-gate", "gate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gate_and_old_value_join_before_the_rounding(backend, device, has_gate, residual, dtype):
    weight, _ = make_layer(24, 40, dtype, device)
    x = randn(3, 7, 24, dtype=dtype, device=device)
    gate = randn(3, 40, dtype=dtype, device=device, seed=4) if has_gate else None
    inputs = (randn(3, 20, 40, dtype=dtype, device=device), random_indices(3, 20, 7), x, weight)
    inputs = tuple(tensor.to(device) for tensor in inputs)

    out = linear_scatter(*inputs, gate=gate, residual=residual, backend=backend)

    (exact_gate,) = in_float64(gate)
    assert_within_budget(
        out,
        exact=linear_scatter(
            *in_float64(*inputs), gate=exact_gate, residual=residual, backend="reference"
        ),
        rounded=linear_scatter(*inputs, gate=gate, residual=residual, backend="reference"),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("B", "N", "S", "F", "K", "O"),
    [
        pytest.param(2, 37, 11, 72, 40, 24, id="odd-sizes"),
        pytest.param(1, 80, 70, 64, 128, 192, id="round-sizes"),
        pytest.param(2, 5, 5, 3, 7, 1, id="all-tokens"),
        pytest.param(2, 16, 0, 8, 8, 8, id="no-slot"),
        pytest.param(2, 16, 3, 0, 8, 8, id="no-feature"),
    ],
)
def test_features_are_multiplied_as_if_they_stood_before_the_rows(
    backend,
    device,
    B,
    N,
    S,
    F,
    K,
    O,  # noqa: E741
    dtype,
):
    weight, bias = make_layer(F + K, O, dtype, device)
    x = randn(B, S, K, dtype=dtype, device=device)
    features = randn(B, N, F, dtype=dtype, device=device, seed=4)
    indices = random_indices(B, N, S, num_empty=min(S, 1), device=device)
    inputs = (randn(B, N, O, dtype=dtype, device=device, seed=3), indices, x, weight, bias)

    out = linear_scatter(*inputs, features=features, backend=backend)

    rows = torch.cat([gather_rows(features, indices, backend="reference"), x], dim=-1)
    inputs = (*inputs[:2], rows, *inputs[3:])
    assert_within_budget(
        out,
        exact=linear_scatter(*in_float64(*inputs), backend="reference"),
        rounded=linear_scatter(*inputs, backend="reference"),
    )


def test_slices_are_read_and_written_in_place(backend, device):
    wide = randn(2, 40, 3, 24, device=device)
    before = wide.clone()
    rows = randn(2, 11, 2, 32, device=device)[:, :, 1, 3:19]
    weight = randn(24, 2, 16, device=device)[:, 1]
    gate = randn(2, 48, device=device)[:, 24:]
    features = randn(2, 39, 16, device=device)[:, 1:38, 8:]
    indices = random_indices(2, 37, 11, device=device)
    inputs = {"gate": gate, "features": features}
    rows = rows[..., 8:]

    linear_scatter_(wide[:, 1:38, 1], indices, rows, weight, **inputs, backend=backend)

    wanted = before.clone()
    linear_scatter_(wanted[:, 1:38, 1], indices, rows, weight, **inputs, backend="reference")
    torch.testing.assert_close(wide, wanted)
    torch.testing.assert_close(wide[:, :, [0, 2]], before[:, :, [0, 2]], rtol=0, atol=0)
    out = linear(wide[:, :, 1], weight[:, :1].expand(24, 24).contiguous(), backend=backend)
    torch.testing.assert_close(
        out, linear(wide[:, :, 1].contiguous(), weight[:, :1].expand(24, 24).contiguous())
    )


def test_an_index_outside_the_tokens_touches_no_memory(backend, device):
    cache = randn(1, 5, 8, device=device)
    before = cache.clone()
    wild = torch.tensor([[-7, 5, 2**31 - 1, -(2**31)]], dtype=torch.int32, device=device)
    x = randn(1, 4, 16, device=device)
    weight, bias = make_layer(16, 8, torch.float32, device)

    linear_scatter_(cache, wild, x, weight, bias, residual=True, backend=backend)
    features = randn(1, 5, 12, device=device)
    linear_scatter_(cache, wild, x[..., 12:], weight, bias, features=features, backend=backend)

    torch.testing.assert_close(cache, before, rtol=0, atol=0)


def test_a_batch_equals_its_elements_run_alone(backend, device):
    cache = randn(3, 20, 40, device=device)
    indices = random_indices(3, 20, 7, num_empty=1, device=device)
    x = randn(3, 7, 24, device=device)
    weight, bias = make_layer(24, 40, torch.float32, device)
    gate = randn(3, 40, device=device)

    whole = linear_scatter(cache, indices, x, weight, bias, gate=gate, backend=backend)

    for b in range(3):
        one = slice(b, b + 1)
        alone = linear_scatter(
            cache[one], indices[one], x[one], weight, bias, gate=gate[one], backend=backend
        )
        torch.testing.assert_close(whole[one], alone)


GLUS = ["two weights", "gate_first", "gate_last"]


def make_gated(way, K, O, dtype, device):  # noqa: E741
    """Weight and bias, and the arguments of the gate; and both as two layers."""
    weight, bias = make_layer(K, O, dtype, device)
    gate_weight, gate_bias = (2 * part + 0.5 for part in make_layer(K, O, dtype, device))
    layers = (weight, bias, gate_weight, gate_bias)
    if way == "two weights":
        return (weight, bias), {"gate_weight": gate_weight, "gate_bias": gate_bias}, layers
    order = (0, 1) if way == "gate_last" else (1, 0)
    fused = [
        torch.cat([(value, gate)[i] for i in order])
        for value, gate in ((weight, gate_weight), (bias, gate_bias))
    ]
    return fused, {"glu": way}, layers


def eager_glu(rows, weight, bias, gate_weight, gate_bias, activation):
    """The formula once more."""
    gate = reference.linear(rows, gate_weight, gate_bias, activation, None)
    return gate * (rows @ weight.T + (0 if bias is None else bias))


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize("way", GLUS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gated_layer_is_as_exact_as_eager(backend, device, dtype, way, activation):
    fused, options, layers = make_gated(way, 72, 40, dtype, device)
    x = randn(2, 37, 72, dtype=dtype, device=device)
    indices = random_indices(2, 37, 11, num_empty=2, device=device)
    options["activation"] = activation

    out = linear(x[:, :11], *fused, **options, backend=backend)
    gathered = linear(x, *fused, **options, indices=indices, backend=backend)

    rows = gather_rows(x, indices, backend="reference")
    for result, given in ((out, x[:, :11]), (gathered, rows)):
        assert_within_budget(
            result,
            exact=eager_glu(*in_float64(given, *layers), activation),
            rounded=eager_glu(given, *layers, activation),
        )


@pytest.mark.parametrize(("B", "N", "S", "K", "O"), SHAPES)
def test_a_gated_layer_of_any_size(backend, device, B, N, S, K, O):  # noqa: E741
    fused, options, layers = make_gated("gate_first", K, O, torch.float32, device)
    x = randn(B, S, K, device=device)

    out = linear(x, fused[0], activation="silu", **options, backend=backend)

    weight, _, gate_weight, _ = layers
    assert_within_budget(
        out,
        exact=eager_glu(*in_float64(x, weight), None, gate_weight.double(), None, "silu"),
        rounded=eager_glu(x, weight, None, gate_weight, None, "silu"),
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"glu": "last"}, "glu must be None or one of gate_first, gate_last, got 'last'"),
        ({"glu": "gate_first", "weight": randn(7, 16)}, "weight must have two halves of rows"),
        ({"glu": "gate_last", "gate_weight": randn(8, 16)}, "glu must be None where the gate has"),
        ({"gate_weight": randn(7, 16)}, r"gate_weight must have shape \(O, K\) = \(8, 16\)"),
        ({"gate_bias": randn(8)}, "gate_bias must come with a gate_weight, got none"),
    ],
)
def test_a_gate_that_does_not_fit_is_named(change, sentence):
    arguments = {"x": randn(2, 5, 16), "weight": randn(8, 16), "activation": "silu"}

    with pytest.raises(ValueError, match=f"^linear: {sentence}"):
        linear(**(arguments | change))
