"""PyTorch's rules: autocast, versions, shared memory, strides behind an export, transforms."""

import pytest
import torch
from torch import nn

from tokencache_kernels import ops
from tokencache_kernels.ops._library import share_memory
from tokencache_kernels.testing import randn, random_indices

B, N, S, D, H, E = 2, 12, 5, 16, 2, 8
INDICES = random_indices(B, N, S)
POSITIONS = ops.invert_indices(INDICES, N, backend="reference")


def qkv_arguments(dtype):
    caches = [randn(B, N, H, E, dtype=dtype, seed=seed) for seed in (1, 2)]
    return *caches, randn(B, S, D, dtype=dtype), INDICES, randn(3 * D, D, dtype=dtype)


# by op: its arguments
CALLS = {
    "linear": lambda t: ((randn(B, S, D, dtype=t), randn(D, D, dtype=t)), {"activation": "gelu"}),
    "linear_scatter_": lambda t: (
        (randn(B, N, D, dtype=t), INDICES, randn(B, S, D, dtype=t), randn(D, D, dtype=t)),
        {},
    ),
    "mlp_": lambda t: (
        (
            randn(B, N, D, dtype=t), randn(B, N, D, dtype=t, seed=1), INDICES,
            randn(B, D, dtype=t), randn(B, D, dtype=t, seed=1),
            randn(D, D, dtype=t), None, randn(D, D, dtype=t, seed=1), None,
        ),
        {},
    ),
    "project_qkv_": lambda t: (qkv_arguments(t), {}),
    "row_pass_": lambda t: (
        (
            randn(B, N, D, dtype=t), [randn(B, N, D, dtype=t, seed=1)], [randn(B, D, dtype=t)],
            INDICES, randn(B, D, dtype=t, seed=2), randn(B, D, dtype=t, seed=3),
        ),
        {},
    ),
    "add_branches_": lambda t: (
        (randn(B, N, D, dtype=t), [randn(B, N, D, dtype=t, seed=1)], [randn(B, D, dtype=t)]),
        {},
    ),
    "scatter_rows_": lambda t: (
        (randn(B, N, D, dtype=t), INDICES, randn(B, S, D, dtype=t)), {},
    ),
    "attention": lambda t: (
        (randn(B, S, H, E, dtype=t), *(randn(B, N, H, E, dtype=t, seed=s) for s in (1, 2))), {},
    ),
    "attention_received": lambda t: (
        (randn(B, S, H, E, dtype=t), randn(B, N, H, E, dtype=t)), {},
    ),
    "token_change": lambda t: (
        (randn(B, N, D, dtype=t), randn(B, N, D, dtype=t, seed=1)), {},
    ),
    "blend": lambda t: (
        (randn(B, N, D, dtype=t), randn(B, N, D, dtype=t, seed=1), randn(B, N).sigmoid()), {},
    ),
}  # fmt: skip
WRITERS = [op for op in CALLS if op.endswith("_")]


def call(op, dtype, backend, device):
    """The results of the op, and its written tensors."""
    arguments, options = CALLS[op](dtype)
    arguments = torch.utils._pytree.tree_map(
        lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, arguments
    )
    result = getattr(ops, op)(*arguments, **options, backend=backend)
    written = arguments[: {"project_qkv_": 2}.get(op, 1)] if op in WRITERS else ()
    return [*(result if isinstance(result, tuple) else [result]), *written]


@pytest.mark.parametrize("packs", ["1", "0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_an_op_works_in_the_dtype_of_its_inputs_under_autocast(
    op, dtype, packs, backend, device, monkeypatch
):
    monkeypatch.setenv("TOKENCACHE_PACK_WEIGHTS", packs)
    low = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    wanted = call(op, dtype, backend, device)

    with torch.autocast(device, dtype=low):
        got = call(op, dtype, backend, device)
        assert torch.is_autocast_enabled(device)

    torch.testing.assert_close(got, wanted, rtol=0, atol=0)


def test_mixed_dtypes_under_autocast_are_refused_by_name():
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"^linear: weight must be float32, got bfloat16 \(torch"),
    ):
        ops.linear(randn(B, S, D), randn(D, D).bfloat16())


@pytest.mark.parametrize("op", WRITERS)
def test_what_is_written_moves_its_version(op, backend, device):
    arguments, options = CALLS[op](torch.float32)
    arguments = torch.utils._pytree.tree_map(
        lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, arguments
    )
    written = arguments[: 2 if op == "project_qkv_" else 1]
    weight = torch.ones(written[0].shape[-1], requires_grad=True, device=device)
    product = (weight * written[0]).sum()  # keeps it for the gradient
    with torch.no_grad():
        getattr(ops, op)(*arguments, **options, backend=backend)

    assert all(tensor._version > 0 for tensor in written)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("shared", ["x", "gate", "features"])
def test_inputs_that_share_memory_with_the_cache_are_read_as_they_were(shared, backend, device):
    cache = randn(B, N, D, device=device)
    inputs = {
        "x": cache[:, 3 : 3 + S], "gate": cache[:, 1], "features": cache, "weight": randn(D, 2 * D)
    }  # fmt: skip
    inputs = {
        name: value.to(device) if name in (shared, "weight") else value.clone()
        for name, value in inputs.items()
    }
    wanted = cache.clone()
    copies = {name: value.clone() for name, value in inputs.items()}
    ops.linear_scatter_(wanted, INDICES.to(device), **copies, backend="reference")

    ops.linear_scatter_(cache, INDICES.to(device), **inputs, backend=backend)

    torch.testing.assert_close(cache, wanted, rtol=1e-4, atol=1e-4)


def test_rows_of_the_cache_itself_are_scattered_as_they_were(backend, device):
    cache = randn(B, N, D, device=device)
    indices = torch.tensor([[1, 2, 3, 4, 5]] * B, dtype=torch.int32, device=device)
    wanted = cache.clone()
    wanted[:, 1:6] = cache[:, 0:5]

    ops.scatter_rows_(cache, indices, cache[:, 0:5], backend=backend)

    assert torch.equal(cache, wanted)


def test_branches_that_are_the_stream_moved_by_a_row_are_read_as_they_were(backend, device):
    memory = randn(B, N + 1, D, device=device)
    x, branch = memory[:, 1:], memory[:, :-1]
    wanted = x + branch

    ops.add_branches_(x, [branch], [None], backend=backend)

    torch.testing.assert_close(x, wanted)


@pytest.mark.parametrize("op", WRITERS)
def test_an_expanded_destination_is_refused_before_anything_is_written(op, backend, device):
    arguments, options = CALLS[op](torch.float32)
    written = arguments[0][:1].to(device).expand_as(arguments[0])
    before = written.clone()
    others = torch.utils._pytree.tree_map(
        lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, arguments[1:]
    )

    with pytest.raises(ValueError, match=rf"^{op}: \w+ must have elements that share no memory"):
        getattr(ops, op)(written, *others, **options, backend=backend)

    assert torch.equal(written, before)


def test_caches_that_lie_between_each_other_are_written_apart(backend, device):
    memory = randn(B, N, 2, H, E, device=device)
    wanted = memory.clone()
    _, _, *others = (
        value.to(device) if isinstance(value, torch.Tensor) else value
        for value in qkv_arguments(torch.float32)
    )
    ops.project_qkv_(wanted[:, :, 0], wanted[:, :, 1], *others, backend="reference")

    ops.project_qkv_(memory[:, :, 0], memory[:, :, 1], *others, backend=backend)

    torch.testing.assert_close(memory, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "shared"),
    [
        (lambda x: x[:, :3], lambda x: x[:, 3:], False),
        (lambda x: x[:, :4], lambda x: x[:, 3:], True),
        (lambda x: x[..., :3], lambda x: x[..., 3:], False),
        (lambda x: x[..., :4], lambda x: x[..., 3:], True),
        (lambda x: x[:, ::2], lambda x: x[:, 1::2], False),
        (lambda x: x[0], lambda x: x[1], False),
        (lambda x: x, lambda x: x, True),
        (lambda x: x[:, :1], lambda x: x[:1], True),
        (lambda x: x[:0], lambda x: x, False),
        (lambda x: x, lambda x: x.clone(), False),
    ],
)
def test_shared_memory_is_told_from_memory_that_lies_between(a, b, shared):
    x = randn(3, 7, 6)

    assert share_memory(a(x), b(x)) is shared
    assert share_memory(b(x), a(x)) is shared


def test_caches_that_share_memory_are_refused(device):
    memory = torch.zeros(B, N + 1, H, E, device=device)
    _, _, *others = (
        value.to(device) if isinstance(value, torch.Tensor) else value
        for value in qkv_arguments(torch.float32)
    )

    with pytest.raises(ValueError, match=r"value_cache must share no memory with key_cache"):
        ops.project_qkv_(memory[:, :-1], memory[:, 1:], *others)

    assert not memory.any()


@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "dual tensors"])
def test_transforms_of_torch_func_are_told_of_the_reference(transform):
    x, weight = randn(B, S, D), randn(D, D)

    def loss(x, backend="auto"):
        return ops.linear(x, weight, backend=backend).sum()

    def transformed(backend):
        if transform == "grad":
            return torch.func.grad(lambda x: loss(x, backend))(x)
        if transform == "jvp":
            return torch.func.jvp(lambda x: loss(x, backend), (x,), (x,))[1]
        if transform == "vmap":
            return torch.func.vmap(lambda x: loss(x, backend))(x[None])
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, x)
            return torch.autograd.forward_ad.unpack_dual(loss(dual, backend)).tangent

    wanted = {
        "grad": weight.sum(0).expand(B, S, D),
        "vmap": loss(x)[None],
    }.get(transform, loss(x))
    torch.testing.assert_close(transformed("reference"), wanted)
    with pytest.raises(RuntimeError, match=r"^linear: .*backend.*'reference'"):
        transformed("auto")


class Layer(nn.Module):
    def forward(self, x, cache, indices, weight):
        rows = ops.gather_rows(x, indices)
        return ops.linear_scatter(cache, indices, rows, weight)


def strided(x):
    """The same values, the last dimension not of stride 1."""
    return torch.stack([x, torch.zeros_like(x)], dim=-1).flatten(-2)[..., ::2]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_exported_program_takes_other_strides_rightly(compiled, tmp_path, device):
    names = ("x", "cache", "indices", "weight")
    inputs = dict(
        zip(names, (randn(B, N, D), randn(B, N, D, seed=1), INDICES, randn(D, D)), strict=True)
    )
    inputs = {name: value.to(device) for name, value in inputs.items()}
    program = torch.export.export(Layer(), (), inputs)
    run = program.module()
    if compiled:
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/l.pt2")
        run = torch._inductor.aoti_load_package(path)

    for name in (None, *names):
        given = {key: strided(value) if key == name else value for key, value in inputs.items()}
        torch.testing.assert_close(run(**given), Layer()(**inputs))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_an_exported_program_refuses_a_destination_of_other_strides(device):
    class Scatter(nn.Module):
        def forward(self, cache, indices, rows):
            return ops.scatter_rows_(cache, indices, rows)

    cache, indices, rows = (
        value.to(device) for value in (randn(B, N, D), INDICES, randn(B, S, D, seed=1))
    )
    program = torch.export.export(Scatter(), (cache, indices, rows)).module()
    other = strided(cache)

    with pytest.raises(ValueError, match=r"scatter_rows_: cache must have stride 1 along"):
        program(other, indices, rows)

    assert torch.equal(other, cache)


class HalvedWeight(torch.Tensor):
    """A weight kept as its double, which knows ``F.linear`` alone."""

    @staticmethod
    def __new__(cls, doubled):
        return torch.Tensor._make_wrapper_subclass(cls, doubled.shape, dtype=doubled.dtype)

    def __init__(self, doubled):
        self.doubled = doubled

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.doubled / 2, *bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError(f"no {function}")


@pytest.mark.parametrize("op", ["linear", "linear_scatter_", "mlp_", "project_qkv_"])
def test_a_weight_of_its_own_class_is_multiplied_by_in_its_own_way(op, backend, device):
    arguments, options = CALLS[op](torch.float32)
    if op == "project_qkv_":
        arguments = (*arguments[:-1], list(arguments[-1].split(D)))
    plain = torch.utils._pytree.tree_map(
        lambda value: value.clone().to(device) if isinstance(value, torch.Tensor) else value,
        arguments,
    )
    quantised = torch.utils._pytree.tree_map(
        lambda value: (
            value.clone().to(device)
            if isinstance(value, torch.Tensor) and value.shape != (D, D)
            else HalvedWeight(2 * value.to(device))
            if isinstance(value, torch.Tensor)
            else value
        ),
        arguments,
    )

    wanted = getattr(ops, op)(*plain, **options, backend="reference")
    got = getattr(ops, op)(*quantised, **options, backend=backend)

    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(quantised[0], plain[0], rtol=1e-4, atol=1e-4)


def test_a_fused_weight_of_its_own_class_is_refused():
    *others, weight = qkv_arguments(torch.float32)

    with pytest.raises(ValueError, match=r"^project_qkv_: weight must be a plain tensor"):
        ops.project_qkv_(*others, HalvedWeight(weight))


class Project(nn.Module):
    def forward(self, keys, values, x, indices, weight):
        return ops.project_qkv_(keys, values, x, indices, weight), keys + values


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
def test_lists_that_are_empty_stay_so_when_compiled_ahead_of_time(tmp_path, device):
    inputs = tuple(value.to(device) for value in qkv_arguments(torch.float32))
    copies = tuple(value.clone() for value in inputs)
    with torch.no_grad():
        program = torch.export.export(Project(), tuple(value.clone() for value in inputs))
        path = torch._inductor.aoti_compile_and_package(program, package_path=f"{tmp_path}/p.pt2")

        results = torch._inductor.aoti_load_package(path)(*inputs)

        torch.testing.assert_close(tuple(results), Project()(*copies))
