"""The projection to query, key and value, against the same done for all tokens and then picked."""

import pytest
import torch
import torch.nn.functional as F

from tokencache_kernels import ops
from tokencache_kernels.testing import assert_within_budget, randn, random_indices

OPS = ("project_qkv_",)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
B, N, S, K = 2, 9, 5, 24


def make_inputs(H, E, dtype=torch.float32, device="cpu", num_empty=1):
    """Caches, rows of all tokens, indices, weights apart, biases apart."""

    def some(*shape, seed=0):
        return randn(*shape, dtype=dtype, device=device, seed=seed)

    return (
        some(B, N, H, E), some(B, N, H, E, seed=1), some(B, N, K, seed=2),
        random_indices(B, N, S, num_empty=num_empty, device=device),
        [some(H * E, K, seed=seed) / K**0.5 for seed in (3, 4, 5)],
        [some(H * E, seed=seed) for seed in (6, 7, 8)],
    )  # fmt: skip


def make_norm(kind, E, dtype=torch.float32, device="cpu"):
    if kind is None:
        return None
    gains = [1 + randn(E, dtype=dtype, device=device, seed=seed) / 4 for seed in range(2)]
    shifts = [randn(E, dtype=dtype, device=device, seed=seed) for seed in (2, 3)]
    return ops.QkNorm(*gains, *(shifts if kind == "layer" else ()), kind=kind)


def make_rotary(*lead, E, device="cpu"):
    angle = randn(*lead, E // 2, device=device).repeat_interleave(2, -1)
    return angle.cos(), angle.sin()


def widen(value):
    """The same in float64."""
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, ops.QkNorm):
        return ops.QkNorm(*map(widen, value))
    return type(value)(map(widen, value)) if isinstance(value, list | tuple) else value


def plainly(keys, values, x, indices, weights, biases, norm, rotary):
    """Every token's query, key and value, by PyTorch's own layers and complex numbers."""
    H, E = keys.shape[2:]
    query, key, value = (
        F.linear(x, w, b).unflatten(-1, (H, E)) for w, b in zip(weights, biases, strict=True)
    )

    def normalise(y, weight, bias):
        if norm.kind == "layer":
            return F.layer_norm(y, (E,), weight, bias, norm.eps)
        return F.rms_norm(y, (E,), weight, norm.eps)

    def rotate(y):
        turns = torch.complex(*rotary)[:, ::2].to(torch.complex128)
        pairs = torch.view_as_complex(y.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns[None, :, None]).flatten(-2).to(y.dtype)

    if norm is not None:
        query = normalise(query, norm.query_weight, norm.query_bias)
        key = normalise(key, norm.key_weight, norm.key_bias)
    if rotary is not None:
        query, key = rotate(query), rotate(key)
    keys, values = keys.clone(), values.clone()
    queries = query.new_zeros(*indices.shape, H, E)
    for b, row in enumerate(indices.tolist()):
        for slot, token in enumerate(row):
            if token >= 0:
                keys[b, token], values[b, token] = key[b, token], value[b, token]
                queries[b, slot] = query[b, token]
    return queries, keys, values


def live_only(query, indices):
    return torch.where((indices >= 0)[..., None, None], query, 0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("H", "E", "kind", "is_rotated"),
    [
        pytest.param(2, 72, None, False, id="dit-xl"),
        pytest.param(1, 128, "rms", True, id="flux"),
        pytest.param(3, 64, "layer", True, id="cogvideox"),
        pytest.param(2, 72, "layer", False, id="odd-heads-normed"),
        pytest.param(3, 6, "rms", True, id="many-heads-a-tile"),
    ],
)
def test_rows_are_projected_as_exactly_as_eager(backend, device, H, E, kind, is_rotated, dtype):
    keys, values, x, indices, weights, biases = make_inputs(H, E, dtype, device)
    norm = make_norm(kind, E, dtype, device)
    rotary = make_rotary(N, E=E, device=device) if is_rotated else None
    inputs = (keys, values, x, indices, weights, biases, norm, rotary)

    packed = ops.gather_rows(x, indices, backend="reference")
    query, *caches = ops.project_qkv(
        keys, values, packed, indices, weights, biases, norm=norm, rotary=rotary, backend=backend
    )

    exact, rounded = plainly(*map(widen, inputs)), plainly(*inputs)
    outputs = (live_only(query, indices), *caches)
    for out, exactly, roughly in zip(outputs, exact, rounded, strict=True):
        assert_within_budget(out, exact=exactly, rounded=roughly)
    assert query.isfinite().all()
    assert not torch.equal(caches[0], keys)


@pytest.mark.parametrize("is_rotated", [False, True], ids=["plain", "rotated"])
def test_keys_of_all_tokens_and_queries_of_some(backend, device, is_rotated):
    keys, values, x, indices, weights, biases = make_inputs(2, 72, device=device)
    options = {"rotary": make_rotary(N, E=72, device=device) if is_rotated else None}
    whole = ops.project_qkv(keys, values, x, None, weights, biases, **options, backend="reference")

    query, new_keys, new_values = ops.project_qkv(
        keys, values, x, indices, weights, biases, **options, all_keys=True, backend=backend
    )

    torch.testing.assert_close((new_keys, new_values), whole[1:])
    picked = ops.gather_rows(whole[0].flatten(2), indices, backend="reference")
    torch.testing.assert_close(live_only(query, indices).flatten(2), picked)
    nothing = indices[:, :0]
    _, *caches = ops.project_qkv(
        keys, values, x, nothing, weights, biases, **options, all_keys=True, backend=backend
    )
    torch.testing.assert_close(tuple(caches), whole[1:])


def test_no_indices_are_those_of_every_token(backend, device):
    keys, values, x, _, weights, biases = make_inputs(2, 8, device=device)
    options = {"norm": make_norm("rms", 8, device=device), "backend": backend}
    options["rotary"] = make_rotary(N, E=8, device=device)
    every = torch.arange(N, dtype=torch.int32, device=device).expand(B, N)

    out = ops.project_qkv(keys, values, x, None, weights, biases, **options)

    wanted = ops.project_qkv(keys, values, x, every, weights, biases, **options)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)


def test_a_fused_weight_and_its_slices_are_the_same(backend, device):
    keys, values, x, indices, weights, biases = make_inputs(2, 8, device=device)
    packed = ops.gather_rows(x, indices)
    wide = torch.cat([randn(7, K, device=device), *weights], 0)
    wide = torch.cat([randn(len(wide), 3, device=device), wide], 1)

    apart = ops.project_qkv(keys, values, packed, indices, weights, biases, backend=backend)
    fused = ops.project_qkv(
        keys, values, packed, indices, wide[7:, 3:], torch.cat(biases), backend=backend
    )

    torch.testing.assert_close(fused, apart, rtol=0, atol=0)


@pytest.mark.parametrize("all_keys", [False, True], ids=["fresh-keys", "all-keys"])
def test_empty_slots_change_nothing(backend, device, all_keys):
    keys, values, x, indices, weights, _ = make_inputs(2, 8, device=device, num_empty=0)
    rotary = make_rotary(N, E=8, device=device)
    padded = F.pad(indices, (0, 2), value=-1)
    padded[:, -1] = 2**31 - 1
    options = {"rotary": rotary, "all_keys": all_keys, "backend": backend}

    def rows(chosen):
        return x if all_keys else ops.gather_rows(x, chosen)

    query, *caches = ops.project_qkv(keys, values, rows(padded), padded, weights, **options)

    fewer, *wanted = ops.project_qkv(keys, values, rows(indices), indices, weights, **options)
    torch.testing.assert_close(caches, wanted)
    torch.testing.assert_close(query[:, :S], fewer)
    assert query.isfinite().all()
    if not all_keys:
        stale = ops.invert_indices(indices, N, backend="reference") < 0
        torch.testing.assert_close(caches[0][stale], keys[stale], rtol=0, atol=0)
        torch.testing.assert_close(caches[1][stale], values[stale], rtol=0, atol=0)


def test_no_slot_touches_no_row(backend, device):
    keys, values, x, indices, weights, _ = make_inputs(2, 8, device=device)
    nothing = indices[:, :0]

    query, *caches = ops.project_qkv(keys, values, x[:, :0], nothing, weights, backend=backend)

    assert query.shape == (B, 0, 2, 8)
    torch.testing.assert_close(caches, [keys, values], rtol=0, atol=0)


def test_a_stream_of_a_joint_cache_is_written_in_place(backend, device):
    """Text before image, one table of positions for both, as in FLUX."""
    _, _, x, indices, weights, biases = make_inputs(2, 8, device=device)
    joint = randn(2, B, 4 + N, 2, 8, device=device)
    before = joint.clone()
    rotary = make_rotary(4 + N, E=8, device=device)
    image = tuple(table[4:] for table in rotary)
    packed = ops.gather_rows(x, indices)

    query = ops.project_qkv_(
        joint[0, :, 4:], joint[1, :, 4:], packed, indices, weights, biases, rotary=image,
        backend=backend,
    )  # fmt: skip

    assert query.is_contiguous()
    wanted = ops.project_qkv(
        *before[:, :, 4:], packed, indices, weights, biases, rotary=image, backend="reference"
    )
    torch.testing.assert_close((query, *joint[:, :, 4:]), wanted)
    torch.testing.assert_close(joint[:, :, :4], before[:, :, :4], rtol=0, atol=0)


def test_samples_may_have_tables_of_their_own(backend, device):
    keys, values, x, indices, weights, _ = make_inputs(2, 8, device=device)
    rotary = make_rotary(B, N + 3, E=8, device=device)
    packed = ops.gather_rows(x, indices)

    out = ops.project_qkv(keys, values, packed, indices, weights, rotary=rotary, backend=backend)

    for b in range(B):
        one = slice(b, b + 1)
        alone = ops.project_qkv(
            keys[one], values[one], packed[one], indices[one], weights,
            rotary=tuple(table[b] for table in rotary), backend="reference",
        )  # fmt: skip
        torch.testing.assert_close(tuple(part[one] for part in out), alone)


@pytest.mark.parametrize(
    ("tile", "split_k", "E"),
    [((64, 64, 32, 4, 3), 3, 24), ((128, 256, 64, 8, 3), 1, 24), ((64, 256, 64, 8, 2), 1, 192)],
    ids=["split", "wide", "wide-heads"],
)
@pytest.mark.parametrize("all_keys", [False, True], ids=["fresh-keys", "all-keys"])
def test_every_kind_of_tile_gives_the_same(device, all_keys, tile, split_k, E):
    launch = pytest.importorskip("tokencache_kernels.backends.triton._launch")
    gemm = pytest.importorskip("tokencache_kernels.backends.triton._gemm")
    keys, values, x, indices, weights, biases = make_inputs(5, E, device=device)
    rows = x if all_keys else ops.gather_rows(x, indices)
    inputs = (keys, values, rows, indices, weights, biases)
    # a wide tile holds heads that nothing looks at
    options = {"norm": make_norm("rms", E, device=device)} if E > 100 or split_k > 1 else {}
    options["all_keys"] = all_keys

    with launch.on_trial("project_qkv_", gemm.GemmSetting(*tile, split_k=split_k)):
        query, *caches = ops.project_qkv(*inputs, **options, backend="triton")

    wanted, *wanted_caches = ops.project_qkv(*inputs, **options, backend="reference")
    torch.testing.assert_close(caches, wanted_caches)
    torch.testing.assert_close(live_only(query, indices), live_only(wanted, indices))


def test_it_compiles_to_one_graph(device):
    torch._dynamo.reset()
    keys, values, x, indices, weights, biases = make_inputs(2, 8, device=device)
    norm, rotary = make_norm("layer", 8, device=device), make_rotary(N, E=8, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def project(keys, values, x, indices, fused, biases, norm, rotary):
        query = ops.project_qkv_(
            keys, values, x, indices, fused, biases, norm=norm, rotary=rotary, all_keys=True
        )
        return query * 2

    new = keys.clone(), values.clone()
    query = project(*new, x, indices, torch.cat(weights), biases, norm, rotary)

    wanted = ops.project_qkv(
        keys, values, x, indices, weights, biases, norm=norm, rotary=rotary, all_keys=True
    )
    torch.testing.assert_close((query / 2, *new), wanted)


H, E = 2, 8
# ruff: noqa: E501
ERRORS = [
    ({"value_cache": randn(B, N, H, 4)}, "value_cache must have shape (B, N, H, E) = (2, 9, 2, 8), got (2, 9, 2, 4)"),
    ({"key_cache": randn(B, N, 3, E)[:, :, ::2]}, "key_cache must be contiguous in its heads, got strides (216, 24, 16, 1)"),
    ({"x": randn(B, N, K)}, "x must have shape (B, S, K) = (2, 5, any), got (2, 9, 24)"),
    ({"all_keys": True}, "x must have shape (B, N, K) = (2, 9, any), got (2, 5, 24)"),
    ({"indices": None}, "x must have shape (B, N, K) = (2, 9, any), got (2, 5, 24)"),
    ({"weight": randn(3 * H * E, 7)}, "weight must have shape (3HE, K) = (48, 24), got (48, 7)"),
    ({"weight": [randn(H * E, K)] * 2}, "weight must be one tensor or query's, key's and value's, got 2 tensors"),
    ({"weight": [randn(H * E, K), randn(8, K), randn(H * E, K)]}, "key weight must have shape (HE, K) = (16, 24), got (8, 24)"),
    ({"weight": [randn(H * E, K), randn(H * E, K), randn(H * E, 30)[:, :K]]}, "weight must have the same row stride in all three, got [24, 24, 30]"),
    ({"bias": randn(H * E)}, "bias must have shape (3HE,) = (48), got (16,)"),
    ({"norm": ops.QkNorm(randn(E), randn(3))}, "norm's key_weight must have shape (E,) = (8), got (3,)"),
    ({"norm": ops.QkNorm(randn(E), randn(E), randn(E))}, "norm must have a bias for both query and key or for neither, got one bias"),
    ({"norm": ops.QkNorm(randn(E), randn(E), kind="l2")}, "norm must be of a kind among rms, layer, got 'l2'"),
    ({"rotary": (randn(N, E), randn(7, E))}, "rotary sine must cover the N = 9 positions, got 7 rows"),
    ({"rotary": (randn(8, E), randn(8, E))}, "rotary cosine must cover the N = 9 positions, got 8 rows"),
    ({"rotary": (randn(N, 4), randn(N, 4))}, "rotary cosine must have shape (T, E) = (any, 8), got (9, 4)"),
    ({"rotary": (randn(3, N, E), randn(3, N, E))}, "rotary cosine must have shape (B, T, E) = (2, any, 8), got (3, 9, 8)"),
    ({"rotary": (randn(N, E).half(), randn(N, E))}, "rotary cosine must be float32, got float16"),
    ({"rotary": (randn(N, E), randn(10, E))}, "rotary sine must have the shape, strides and dtype of the cosine, got (10, 8), (8, 1), torch.float32"),
]  # fmt: skip


@pytest.mark.parametrize(("changed", "sentence"), ERRORS, ids=[s[:60] for _, s in ERRORS])
def test_bad_input_gets_one_sentence_and_writes_nothing(changed, sentence):
    keys, values, x, indices, weights, biases = make_inputs(H, E)
    given = {
        "key_cache": keys, "value_cache": values, "x": x[:, :S], "indices": indices,
        "weight": weights, "bias": biases, **changed,
    }  # fmt: skip
    before = given["key_cache"].clone(), given["value_cache"].clone()

    with pytest.raises((ValueError, TypeError)) as caught:
        ops.project_qkv_(**given)

    assert str(caught.value) == f"project_qkv_: {sentence}"
    torch.testing.assert_close((given["key_cache"], given["value_cache"]), before, rtol=0, atol=0)
