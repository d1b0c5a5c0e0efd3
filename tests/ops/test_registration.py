"""Every op as other frameworks meet it: opcheck, fullgraph compile, dynamic sizes, export."""

import pytest
import torch
import torch._dynamo.testing

from tokencache_kernels import ops
from tokencache_kernels.testing import randn, random_indices

NAMESPACE = torch.ops.tokencache_kernels
B, N, S, D, M, H, E = 2, 12, 5, 16, 32, 2, 8


def inputs(op):
    """Arguments of the registered op, without the backend."""
    x, cache, rows = randn(B, N, D), randn(B, N, D, seed=1), randn(B, S, D, seed=2)
    indices = random_indices(B, N, S)
    shift, scale = randn(B, D, seed=3), randn(B, D, seed=4)
    weight, bias = randn(D, D, seed=5), randn(D, seed=6)
    fc1, fc2 = randn(M, D, seed=7), randn(D, M, seed=8)
    wide_weight = randn(D, 2 * D, seed=9)
    query, key = randn(B, S, H, E), randn(B, N, H, E)
    positions = ops.invert_indices(indices, N, backend="reference")
    staleness = torch.zeros(3, B, N, dtype=torch.int32)
    num_fresh = torch.tensor([[1, 2, 0], [5, 0, 3]], dtype=torch.int32)
    branches, gates = [cache, randn(B, N, D, seed=9)], [shift, None]
    sums = (x, branches, gates, [None, None], [0.0, 0.0], [-1.0, -1.0])
    # a gate and a scale by number, and a norm of one branch
    numbers = torch.arange(N, dtype=torch.int32).expand(B, N).contiguous() % 3
    numbered = randn(B, 3, D, seed=11)
    rich_sums = (x, branches, [numbered, None], [None, fc1[0]], [0.0, 1.0], [-1.0, 1e-6])
    norm, rich_norm = ("layer", None, None, 0.0, 1e-6), ("rms", fc1[0], fc1[1], 1.0, 1e-6)
    vectors, rich_vectors = (shift, scale, *norm, None), (None, numbered, *rich_norm, numbers)
    return {
        "gather_rows": (x, indices),
        "scatter_rows_": (cache, indices, rows),
        "scatter_rows": (cache, indices, rows),
        "select_tokens_": (randn(3, B, N), staleness, num_fresh, S, 0.1, True, [3, 4], 2, 0.6),
        "invert_indices": (indices, N),
        "add_branches_": (*sums, None),
        "add_branches": (*rich_sums, numbers),
        "blend": (x, cache, randn(B, N, seed=10).requires_grad_()),
        "blend_backward": (rows[:, :1].expand(B, N, D), x, cache, randn(B, N), True),
        "gather_modulate": (x, indices, *rich_vectors),
        "row_pass_": (*rich_sums, indices, positions, *rich_vectors),
        "row_pass": (*sums, indices, positions, *vectors),
        "linear": (rows, weight, bias, "gelu", None, weight.clone(), None),
        "linear_scatter_": (cache, indices, rows, weight, bias, None, False, None),
        "linear_scatter": (cache, indices, rows, wide_weight, bias, shift, True, x),
        "mlp_": (
            cache, x, indices, shift, scale, fc1, None, fc2, bias, "silu", *norm, None, None, None,
        ),
        "mlp": (
            cache, x, indices, None, numbered, fc1, None, fc2, bias, "silu", *rich_norm, numbers,
            fc1.clone(), fc1[:, 0].contiguous(),
        ),
        "attention": (query, key, key.clone(), None, 0.3),
        "attention_with_entropy": (query, key, key.clone(), None, 0.3, True),
        "project_qkv_": (
            randn(B, N, H, E), randn(B, N, H, E, seed=1), rows, indices,
            [randn(D, D), randn(D, D, seed=1), randn(D, D, seed=2)], [],
            [randn(E), randn(E, seed=1)], "rms", 1e-6, [randn(N, E), randn(N, E)], False,
        ),
        "attention_received": (query, key, None, 0.3),
        "attention_entropy": (query, key, None, 0.3),
        "head_norms": (key,),
        "token_change": (x, cache, "cosine"),
    }[op]  # fmt: skip


OPS = [
    "gather_rows", "scatter_rows_", "scatter_rows", "select_tokens_", "invert_indices",
    "add_branches_", "add_branches", "blend", "blend_backward", "gather_modulate", "row_pass_",
    "row_pass", "linear", "linear_scatter_", "linear_scatter", "mlp_", "mlp", "attention",
    "attention_with_entropy", "project_qkv_", "attention_received", "attention_entropy",
    "head_norms", "token_change",
]  # fmt: skip


def test_every_registered_op_is_checked_here():
    registered = {
        name.split("::")[1].split(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("tokencache_kernels::")
    }
    assert registered == set(OPS)


@pytest.mark.parametrize("chosen", ["reference", "auto"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck_finds_nothing(op, chosen, device):
    arguments = torch.utils._pytree.tree_map(
        lambda value: value.to(device) if isinstance(value, torch.Tensor) else value, inputs(op)
    )

    torch.library.opcheck(getattr(NAMESPACE, op).default, (*arguments, chosen))


def partial_layer(x, attention, mlp, gates, indices, shift, scale, fc1, fc2):
    """One partial layer, as a user would write it."""
    packed = ops.row_pass_(x, [attention], [gates], indices, shift, scale)
    hidden = ops.linear(packed, fc1, activation="gelu_tanh")
    ops.linear_scatter_(mlp, indices, hidden, fc2)
    return ops.add_branches(x, [mlp], [gates])


def layer_inputs(num_fresh, device):
    return [
        tensor.to(device)
        for tensor in (
            randn(B, N, D), randn(B, N, D, seed=1), randn(B, N, D, seed=2), randn(B, D),
            random_indices(B, N, num_fresh), randn(B, D, seed=3), randn(B, D, seed=4),
            randn(M, D), randn(D, M),
        )
    ]  # fmt: skip


@pytest.mark.parametrize("compiler", ["eager", "aot_eager", "inductor"])
def test_a_partial_layer_compiles_to_one_graph(compiler, device):
    torch._dynamo.reset()
    arguments = layer_inputs(S, device)
    eager_arguments = [tensor.clone() for tensor in arguments]
    compiled = torch.compile(partial_layer, fullgraph=True, backend=compiler)

    out = compiled(*arguments)

    torch.testing.assert_close(out, partial_layer(*eager_arguments))
    torch.testing.assert_close(arguments[2], eager_arguments[2])


def test_a_changed_number_of_fresh_tokens_does_not_recompile_each_time(device):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(partial_layer, fullgraph=True, backend=counter)

    for num_fresh in (3, 4, 5, 6, 7, 8, 9):
        arguments = layer_inputs(num_fresh, device)
        torch._dynamo.maybe_mark_dynamic(arguments[4], 1)
        compiled(*arguments)

    assert counter.frame_count == 1


class PartialLayer(torch.nn.Module):
    """A layer that keeps its cache as a buffer, as an engine would."""

    def __init__(self, cache, fc):
        super().__init__()
        self.register_buffer("cache", cache)
        self.fc = torch.nn.Parameter(fc, requires_grad=False)

    def forward(self, x, indices):
        rows = ops.gather_rows(x, indices)
        ops.linear_scatter_(self.cache, indices, rows, self.fc)
        return ops.add_branches(x, [self.cache], [None])


# torch.export itself uses parts of torch that torch deprecates
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.slow
def test_export_and_ahead_of_time_compilation_update_the_cache_in_place(tmp_path, device):
    layer = PartialLayer(randn(B, N, D, seed=1, device=device), randn(D, D, device=device))
    x = randn(B, N, D, device=device)
    dynamic = {"x": None, "indices": {1: torch.export.Dim("S", min=2, max=N)}}
    cache = layer.cache.clone()

    with torch.no_grad():
        exported = torch.export.export(
            layer, (x, random_indices(B, N, S, device=device)), dynamic_shapes=dynamic
        )
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=str(tmp_path / "layer.pt2")
        )
    loaded = torch._inductor.aoti_load_package(path)

    for num_fresh in (3, 7, 12):
        indices = random_indices(B, N, num_fresh, device=device)
        out = loaded(x, indices)
        ops.linear_scatter_(cache, indices, ops.gather_rows(x, indices), layer.fc)
        torch.testing.assert_close(out, x + cache)


def test_a_snapshot_taken_before_a_scatter_keeps_its_value_when_compiled(device):
    """The pattern that torch 2.13 has miscompiled; the functional twin must be right in any."""
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def moved(cache, indices, rows):
        return (ops.scatter_rows(cache, indices, rows) - cache).abs().sum()

    cache = randn(B, N, D, device=device)
    indices = random_indices(B, N, S, device=device)
    rows = randn(B, S, D, seed=2, device=device)

    wanted = (rows - ops.gather_rows(cache, indices)).abs().sum()
    torch.testing.assert_close(moved(cache, indices, rows), wanted)
