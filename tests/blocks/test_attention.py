"""The variants of partial self-attention, against all tokens' computed by PyTorch's own layers."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tokencache_kernels import backends, ops
from tokencache_kernels.blocks import SelfAttention
from tokencache_kernels.testing import assert_within_budget, randn, random_indices

OPS = ("project_qkv_", "attention", "linear", "linear_scatter_", "gather_rows", "scatter_rows_")
B, N, S, D = 2, 9, 4, 20
DTYPES = [torch.float32, torch.bfloat16]
MODELS = [
    pytest.param(2, 72, None, False, id="dit-xl"),
    pytest.param(1, 128, "rms", True, id="flux"),
    pytest.param(2, 64, "layer", True, id="cogvideox"),
]


def make_linear(width_in, width_out, dtype, device, seed):
    layer = nn.Linear(width_in, width_out, dtype=dtype, device=device).requires_grad_(False)
    layer.weight.copy_(randn(width_out, width_in, seed=seed) / width_in**0.5)
    layer.bias.copy_(randn(width_out, seed=seed) / 4)
    return layer


def make_attention(
    H=2, E=8, kind="rms", is_rotated=True, dtype=torch.float32, device="cpu", **fields
):
    gains = [1 + randn(E, dtype=dtype, device=device, seed=seed) / 4 for seed in range(2)]
    shifts = [randn(E, dtype=dtype, device=device, seed=seed) / 4 for seed in (2, 3)]
    angle = randn(N, E // 2, device=device).repeat_interleave(2, -1)
    given = {
        "qkv": tuple(make_linear(D, H * E, dtype, device, seed) for seed in (1, 2, 3)),
        "out": make_linear(H * E, D, dtype, device, 4),
        "is_fused": True,
        "num_heads": H,
        "head_dim": E,
        "norm": ops.QkNorm(*gains, *(shifts if kind == "layer" else ()), kind=kind)
        if kind
        else None,
        "rotary": (angle.cos(), angle.sin()) if is_rotated else None,
    }
    return SelfAttention(**{**given, **fields})


def make_inputs(H=2, E=8, dtype=torch.float32, device="cpu", num_empty=0):
    """Features, cached keys and values of an earlier step, and the rows and indices of this one."""
    shapes = ((B, N, D), (B, N, H, E), (B, N, H, E), (B, N, D))
    cache, keys, values, rows = (
        randn(*shape, dtype=dtype, device=device, seed=seed) for seed, shape in enumerate(shapes)
    )
    return cache, keys, values, rows, random_indices(B, N, S, device=device, num_empty=num_empty)


def in_dtype(value, dtype):
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, ops.QkNorm):
        return ops.QkNorm(*(in_dtype(part, dtype) for part in value))
    return value


def project_plainly(attention, rows, dtype):
    """Query, key and value (B, N, H, E) of every token."""
    norm = in_dtype(attention.norm, dtype)
    heads = [
        F.linear(rows, layer.weight.to(dtype), layer.bias.to(dtype)).unflatten(
            -1, (attention.num_heads, attention.head_dim)
        )
        for layer in attention.qkv
    ]
    for which, (weight, bias) in enumerate(zip(norm[:2], norm[2:4], strict=True) if norm else ()):
        one = (heads[which], weight.shape, weight)
        if norm.kind == "layer":
            heads[which] = F.layer_norm(*one, bias, norm.eps)
        else:
            heads[which] = F.rms_norm(*one, norm.eps)
    if attention.rotary is not None:
        turns = torch.complex(*attention.rotary)[:, None, ::2].to(torch.complex128)
        for which in range(2):
            pairs = torch.view_as_complex(heads[which].double().unflatten(-1, (-1, 2)))
            heads[which] = torch.view_as_real(pairs * turns).flatten(-2).to(dtype)
    return heads


def attend_plainly(attention, cache, keys, values, rows, indices, variant, dtype=torch.float64):
    """Compute the expected cache, keys and values of the variant."""
    cache, keys, values, rows = (in_dtype(x, dtype).clone() for x in (cache, keys, values, rows))
    query, key, value = project_plainly(attention, rows, dtype)
    out = attention.out
    for b, tokens in enumerate(indices.tolist()):
        fresh = [token for token in tokens if token >= 0]
        if not fresh:
            continue
        if variant == "kv_all_":
            seen = key[b], value[b]
        elif variant == "kv_cache_":
            keys[b, fresh], values[b, fresh] = key[b, fresh], value[b, fresh]
            seen = keys[b], values[b]
        else:
            seen = key[b, fresh], value[b, fresh]
        heads_first = (x.transpose(0, 1)[None] for x in (query[b, fresh], *seen))
        attended = F.scaled_dot_product_attention(*heads_first)[0].transpose(0, 1).flatten(1)
        cache[b, fresh] = F.linear(attended, out.weight.to(dtype), out.bias.to(dtype))
    return cache, keys, values


def run(variant, attention, cache, keys, values, rows, indices):
    """Run a variant on copies; return its cache and the cached keys and values."""
    cache, keys, values = cache.clone(), keys.clone(), values.clone()
    packed = ops.gather_rows(rows, indices, backend="reference")
    if variant == "kv_all_":
        attention.kv_all_(cache, indices, rows)
    elif variant == "kv_cache_":
        attention.kv_cache_(cache, keys, values, indices, packed)
    else:
        attention.sel_only_(cache, indices, packed)
    return cache, keys, values


@pytest.fixture(params=["kv_all_", "kv_cache_", "sel_only_"])
def variant(request):
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("H", "E", "kind", "is_rotated"), MODELS)
def test_a_variant_is_as_exact_as_eager(backend, device, variant, H, E, kind, is_rotated, dtype):
    attention = make_attention(H, E, kind, is_rotated, dtype, device, backend=backend)
    inputs = make_inputs(H, E, dtype, device, num_empty=1)

    outputs = run(variant, attention, *inputs)

    exact = attend_plainly(attention, *inputs, variant)
    rounded = attend_plainly(attention, *inputs, variant, dtype)
    for out, exactly, roughly in zip(outputs, exact, rounded, strict=True):
        assert_within_budget(out, exact=exactly, rounded=roughly)
    stale = ops.invert_indices(inputs[-1], N, backend="reference") < 0
    torch.testing.assert_close(outputs[0][stale], inputs[0][stale], rtol=0, atol=0)


def test_all_tokens_fresh_is_full_attention(backend, device, variant):
    attention = make_attention(device=device, backend=backend)
    cache, keys, values, rows, _ = make_inputs(device=device)
    every = torch.arange(N, dtype=torch.int32, device=device).repeat(B, 1)
    full_keys, full_values = torch.full_like(keys, torch.nan), torch.full_like(values, torch.nan)

    full = attention.full_(full_keys, full_values, rows)
    out, new_keys, new_values = run(variant, attention, cache, keys, values, rows, every)

    torch.testing.assert_close(out, full)
    _, key, value = project_plainly(attention, rows, torch.float32)
    torch.testing.assert_close((full_keys, full_values), (key, value))
    if variant == "kv_cache_":
        torch.testing.assert_close((new_keys, new_values), (full_keys, full_values))


@pytest.mark.parametrize("num_slots", [0, 3], ids=["no-slot", "empty-slots"])
def test_no_token_leaves_everything_as_it_was(backend, device, variant, num_slots):
    attention = make_attention(device=device, backend=backend)
    *tensors, indices = make_inputs(device=device)
    nothing = torch.full_like(indices[:, :num_slots], -1)

    outputs = run(variant, attention, *tensors, nothing)

    torch.testing.assert_close(outputs, tuple(tensors[:3]), rtol=0, atol=0)


def test_empty_slots_change_nothing(backend, device, variant):
    attention = make_attention(device=device, backend=backend)
    *tensors, indices = make_inputs(device=device)
    # samples with different numbers of fresh tokens
    indices[1, -1] = -1

    padded = run(variant, attention, *tensors, F.pad(indices, (0, 3), value=-1))

    torch.testing.assert_close(padded, run(variant, attention, *tensors, indices))
    alone = [tensor[1:] for tensor in tensors]
    shorter = run(variant, attention, *alone, indices[1:, :-1])
    torch.testing.assert_close([part[1:] for part in padded], list(shorter))


def test_a_partial_step_after_a_full_one_sees_the_stale_keys(backend, device):
    """KV-CACHE differs from KV-ALL in the keys and values of stale tokens, and in nothing else."""
    attention = make_attention(device=device, backend=backend)
    cache, keys, values, rows, indices = make_inputs(device=device)
    attention.full_(keys, values, rows)
    moved = rows.clone()
    fresh = ops.invert_indices(indices, N, backend="reference") >= 0
    moved[fresh] += 1

    cached = run("kv_cache_", attention, cache, keys, values, moved, indices)[0]
    anew = run("kv_all_", attention, cache, keys, values, moved, indices)[0]

    # the stale tokens' rows did not move, so their remembered keys and values are still right
    torch.testing.assert_close(cached, anew)
    moved += 1
    later = run("kv_cache_", attention, cache, keys, values, moved, indices)[0]
    assert not torch.allclose(
        later, run("kv_all_", attention, cache, keys, values, moved, indices)[0]
    )


class Adapted(nn.Linear):
    """A layer that is more than its weight, as LoRA's are."""

    def forward(self, x):
        return super().forward(x) + 0.5 * x.sum(-1, keepdim=True)


@pytest.mark.parametrize("is_one_module", [False, True], ids=["three-modules", "one-module"])
def test_modules_that_are_not_plain_are_called(backend, device, variant, is_one_module):
    plain = make_attention(device=device, backend=backend)
    adapted = []
    for layer in (*plain.qkv, plain.out):
        module = Adapted(*layer.weight.shape[::-1], device=device).requires_grad_(False)
        module.load_state_dict(layer.state_dict())
        adapted.append(module)
        # the same, said in the weight alone
        layer.weight += 0.5
    inputs = make_inputs(device=device, num_empty=1)

    def side_by_side(x):
        return torch.cat([module(x) for module in adapted[:3]], -1)

    qkv = side_by_side if is_one_module else tuple(adapted[:3])
    called = make_attention(device=device, backend=backend, qkv=qkv, out=adapted[3], is_fused=False)

    outputs = run(variant, called, *inputs)

    torch.testing.assert_close(outputs, run(variant, plain, *inputs))
    torch.testing.assert_close(
        called.full_(*inputs[1:4]), plain.full_(inputs[1].clone(), inputs[2].clone(), inputs[3])
    )


def test_one_fused_layer_is_three(backend, device, variant):
    three = make_attention(device=device, backend=backend)
    fused = nn.Linear(D, 3 * 16, device=device).requires_grad_(False)
    fused.weight.copy_(torch.cat([layer.weight for layer in three.qkv]))
    fused.bias.copy_(torch.cat([layer.bias for layer in three.qkv]))
    one = make_attention(device=device, backend=backend, qkv=fused)
    inputs = make_inputs(device=device)

    outputs = run(variant, one, *inputs)

    torch.testing.assert_close(outputs, run(variant, three, *inputs), rtol=0, atol=0)


def test_a_variant_compiles_to_one_graph(device, variant):
    torch._dynamo.reset()
    attention = make_attention(device=device)
    inputs = make_inputs(device=device, num_empty=1)

    outputs = torch.compile(run, fullgraph=True, backend="aot_eager")(variant, attention, *inputs)

    torch.testing.assert_close(outputs, run(variant, attention, *inputs))


def test_a_variant_is_three_launches(device, variant):
    reason = backends.unavailable("triton", "attention", torch.device(device), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    from tokencache_kernels.testing.counting import count_launches

    attention = make_attention(device=device, is_rotated=False, backend="triton")
    inputs = make_inputs(device=device)

    with count_launches() as launches:
        run(variant, attention, *inputs)

    assert launches == ["_project_qkv_kernel", "_attention_kernel", "_linear_scatter_kernel"]
