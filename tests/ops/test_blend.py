"""Blending, forwards and backwards, on every backend."""

import pytest
import torch

from tokencache_kernels import ops
from tokencache_kernels.backends import reference, resolve
from tokencache_kernels.testing import assert_within_budget, in_float64, randn

OPS = ("blend", "blend_backward")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    pytest.param(2, 37, 72, id="odd-sizes"),
    pytest.param(1, 16, 128, id="round-sizes"),
    pytest.param(3, 5, 1, id="one-channel"),
    pytest.param(2, 3, 0, id="no-channel"),
    pytest.param(0, 4, 8, id="no-sample"),
]


def make_inputs(B, N, D, dtype=torch.float32, device="cpu"):
    """cached, fresh, and weights (B, N) in float32."""
    cached, fresh = (randn(B, N, D, dtype=dtype, device=device, seed=seed) for seed in (0, 1))
    return cached, fresh, randn(B, N, device=device, seed=2).sigmoid()


def gradients(backend, grad, cached, fresh, weight, needs_cached):
    launch = resolve("blend_backward", fresh.device, fresh.dtype, backend)
    return launch(grad, cached, fresh, weight, needs_cached)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "D"), SHAPES)
def test_blend_is_as_exact_as_eager(backend, device, B, N, D, dtype):
    inputs = make_inputs(B, N, D, dtype, device)

    out = ops.blend(*inputs, backend=backend)

    assert out.is_contiguous()
    assert_within_budget(
        out, exact=reference.blend(*in_float64(*inputs)), rounded=reference.blend(*inputs)
    )


@pytest.mark.parametrize("needs_cached", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "D"), SHAPES)
def test_the_gradients_are_as_exact_as_eager(backend, device, B, N, D, dtype, needs_cached):
    grad = randn(B, N, D, dtype=dtype, device=device, seed=3)
    inputs = (grad, *make_inputs(B, N, D, dtype, device))

    outs = gradients(backend, *inputs, needs_cached)

    exact = reference.blend_backward(*in_float64(*inputs), needs_cached)
    rounded = reference.blend_backward(*inputs, needs_cached)
    assert (outs[0] is None) == (not needs_cached)
    for got, right, eager in list(zip(outs, exact, rounded, strict=True))[not needs_cached :]:
        assert_within_budget(got, right, eager)


@pytest.mark.parametrize("shape", [(), (5,), (2, 5)], ids=str)
def test_the_reference_has_the_gradient_that_small_changes_show(shape):
    inputs = [randn(2, 5, 3, seed=seed).double().requires_grad_() for seed in (0, 1)]
    weight = torch.rand(shape, dtype=torch.float64).requires_grad_()

    for backend in ("reference", "auto"):
        assert torch.autograd.gradcheck(
            lambda *given, backend=backend: ops.blend(*given, backend=backend), (*inputs, weight)
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (7,), (2, 7)], ids=str)
def test_every_input_gets_its_gradient_on_every_backend(backend, device, shape, dtype):
    cached, fresh, weight = make_inputs(2, 7, 24, dtype, device)
    weight = weight[(0,) * (2 - len(shape))].contiguous()
    grad = randn(2, 7, 24, dtype=dtype, device=device, seed=3)

    def differentiate(given, backend):
        given = [value.detach().requires_grad_() for value in given]
        out = ops.blend(*given, backend=backend)
        return torch.autograd.grad(out, given, grad.to(out.dtype))

    outs = differentiate((cached, fresh, weight), backend)

    exact = differentiate(in_float64(cached, fresh, weight), "reference")
    rounded = differentiate((cached, fresh, weight), "reference")
    for got, right, eager in list(zip(outs, exact, rounded, strict=True))[:2]:
        assert_within_budget(got, right, eager)
    # a sum of many tokens in float32, in whatever order: a few roundings of its largest partial sum
    terms = ((fresh.double() - cached.double()) * grad.double()).abs().sum().item()
    assert outs[2].shape == shape
    assert (outs[2] - exact[2]).abs().max().item() <= 8 * torch.finfo(torch.float32).eps * terms


def test_a_second_derivative_is_right_or_refused(backend, device):
    cached, fresh, weight = make_inputs(2, 3, 4, device=device)
    weight.requires_grad_()
    out = ops.blend(cached, fresh, weight, backend=backend)
    (first,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)

    if backend == "reference":
        (second,) = torch.autograd.grad(first.sum(), weight)
        torch.testing.assert_close(second, 2 * (fresh - cached).square().sum(-1))
    else:
        with pytest.raises(RuntimeError, match="blend: backend must be 'reference' for a second"):
            first.sum().backward()


def test_only_the_gradients_asked_for_are_made(backend, device):
    cached, fresh, weight = make_inputs(2, 7, 24, device=device)
    weight.requires_grad_()

    out = ops.blend(cached, fresh, weight, backend=backend)
    out.sum().backward()

    torch.testing.assert_close(weight.grad, (fresh - cached).sum(-1))
    assert not out.isnan().any()


def test_weight_one_is_fresh_and_weight_zero_is_cached_bit_for_bit(backend, device):
    cached, fresh, _ = make_inputs(2, 7, 24, torch.bfloat16, device)

    for value, wanted in ((1.0, fresh), (0.0, cached)):
        out = ops.blend(cached, fresh, torch.tensor(value, device=device), backend=backend)
        torch.testing.assert_close(out, wanted, rtol=0, atol=0)


def test_shared_weights_are_every_tokens_weight(backend, device):
    cached, fresh, weight = make_inputs(2, 7, 24, device=device)

    by_position = ops.blend(cached, fresh, weight[0], backend=backend)
    by_token = ops.blend(cached, fresh, weight[0].expand(2, 7), backend=backend)
    one = ops.blend(cached, fresh, weight[0, 0], backend=backend)
    repeated = ops.blend(cached, fresh, weight[0, 0].repeat(2, 7), backend=backend)

    torch.testing.assert_close(by_position, by_token, rtol=0, atol=0)
    torch.testing.assert_close(one, repeated, rtol=0, atol=0)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda weight: weight.t().contiguous().t(), id="transposed"),
        pytest.param(lambda weight: weight[:, :1].expand(2, 7), id="one-a-sample"),
        pytest.param(lambda weight: weight.repeat_interleave(2, dim=1)[0, ::2], id="every-second"),
    ],
)
def test_weights_may_lie_in_any_order(backend, device, view):
    cached, fresh, weight = make_inputs(2, 7, 24, device=device)
    weight = view(weight).requires_grad_()
    packed = weight.detach().contiguous().requires_grad_()

    outs = [ops.blend(cached, fresh, given, backend=backend) for given in (weight, packed)]
    grads = [torch.autograd.grad(out.sum(), given)[0]
             for out, given in zip(outs, (weight, packed), strict=True)]  # fmt: skip

    torch.testing.assert_close(outs[0], outs[1], rtol=0, atol=0)
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


def test_low_precision_weights_get_one_rounding(backend, device):
    cached, fresh, _ = make_inputs(2, 64, 8, torch.bfloat16, device)
    weight = torch.tensor(0.5, dtype=torch.bfloat16, device=device, requires_grad=True)

    ops.blend(cached, fresh, weight, backend=backend).sum().backward()

    wanted = (fresh.double() - cached.double()).sum()
    assert weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(weight.grad.double(), wanted, rtol=2**-8, atol=0)


def test_sliced_tensors_are_read_in_place(backend, device):
    wide = randn(2, 40, 3, 24, device=device)
    cached, fresh = wide[:, 1:38, 1], wide[:, 3:40, 2]
    weights = randn(2, 90, device=device)[:, 4:41]
    grad = wide[:, 2:39, 0]

    out = ops.blend(cached, fresh, weights, backend=backend)
    grads = gradients(backend, grad, cached, fresh, weights, True)

    torch.testing.assert_close(out, reference.blend(cached, fresh, weights))
    for got, wanted in zip(grads, reference.blend_backward(grad, cached, fresh, weights, True),
                           strict=True):  # fmt: skip
        torch.testing.assert_close(got, wanted)


def test_the_same_inputs_give_the_same_bits(backend, device):
    inputs = (randn(2, 37, 72, device=device, seed=3), *make_inputs(2, 37, 72, device=device))

    once, again = (gradients(backend, *inputs, True) for _ in range(2))

    for first, second in zip(once, again, strict=True):
        torch.testing.assert_close(second, first, rtol=0, atol=0)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_a_blended_loss_compiles_to_one_graph_and_differentiates(compiler, device):
    torch._dynamo.reset()
    cached, fresh, _ = make_inputs(2, 7, 24, device=device)
    logit = torch.tensor(0.3, device=device, requires_grad=True)

    def loss(cached, fresh, logit):
        return (ops.blend(cached, fresh, logit.sigmoid()) - fresh).square().mean()

    loss(cached, fresh, logit).backward()
    eager, logit.grad = logit.grad, None
    torch.compile(loss, fullgraph=True, backend=compiler)(cached, fresh, logit).backward()

    torch.testing.assert_close(logit.grad, eager)
