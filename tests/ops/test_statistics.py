"""Statistics against explicit attention maps, and the promise that they hold no such map."""

import re
from pathlib import Path

import pytest
import torch

from tokencache_kernels import UnsupportedInputError, ops
from tokencache_kernels.testing import assert_within_budget, in_float64, randn

OPS = ("attention_received", "attention_entropy", "head_norms", "token_change")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# B, S, N, H, E; keys in one block and in several
MAPS = [
    pytest.param(1, 33, 65, 2, 64, id="dim-64"),
    pytest.param(2, 37, 53, 2, 72, id="dim-72"),
    pytest.param(1, 40, 150, 2, 96, id="dim-96"),
    pytest.param(1, 130, 140, 1, 128, id="dim-128"),
    pytest.param(2, 5, 11, 2, 7, id="odd-dim"),
    pytest.param(1, 9, 40, 1, 200, id="wide-dim"),
    pytest.param(1, 1, 1, 1, 1, id="one-of-each"),
]


def explicit_map(query, key, lse=None, scale=None, key_lengths=None):
    """(B, H, S, N), held whole, in the dtype of the inputs."""
    logits = torch.einsum("bshe,bnhe->bhsn", query, key) * (scale or query.shape[-1] ** -0.5)
    if key_lengths is not None:
        beyond = torch.arange(key.shape[1]) >= key_lengths[:, None]
        logits = logits.masked_fill(beyond[:, None, None], -torch.inf)
    return logits.softmax(-1) if lse is None else (logits - lse[..., None]).exp()


def explicit_received(*arguments, **options):
    return explicit_map(*arguments, **options).mean(2)


def explicit_entropy(*arguments, **options):
    return torch.special.entr(explicit_map(*arguments, **options).mean(1)).sum(-1)


def assert_as_exact_as(explicit, out, *inputs, **options):
    """Against ``explicit`` in float64; the error of float32 is the budget."""
    rounded = explicit(*(x.float() for x in inputs), **options)
    assert_within_budget(out.cpu(), explicit(*in_float64(*inputs), **options), rounded)


# attention received and attention entropy


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "S", "N", "H", "E"), MAPS)
def test_map_statistics_are_those_of_the_explicit_map(backend, device, B, S, N, H, E, dtype):
    query, key = randn(B, S, H, E, dtype=dtype), randn(B, N, H, E, dtype=dtype, seed=1)
    there = query.to(device), key.to(device)

    received = ops.attention_received(*there, backend=backend)
    entropy = ops.attention_entropy(*there, backend=backend)

    assert_as_exact_as(explicit_received, received, query, key)
    assert_as_exact_as(explicit_entropy, entropy, query, key)


def test_an_image_of_flux_is_within_the_budget(backend, device):
    """4,608 keys; few queries, since the interpreter is slow."""
    query, key = (randn(1, length, 1, 72, dtype=torch.bfloat16) for length in (40, 4608))
    there = query.to(device), key.to(device)

    received = ops.attention_received(*there, backend=backend)
    entropy = ops.attention_entropy(*there, backend=backend)

    assert_as_exact_as(explicit_received, received, query, key)
    assert_as_exact_as(explicit_entropy, entropy, query, key)


def test_the_reference_of_a_whole_image_of_flux_is_within_the_budget():
    query, key = randn(1, 4608, 1, 16, seed=1), randn(1, 4608, 1, 16)

    received = ops.attention_received(query, key, backend="reference")

    assert_as_exact_as(explicit_received, received, query, key)


def test_float64_stays_float64():
    query, key = in_float64(randn(2, 9, 3, 8), randn(2, 13, 3, 8))

    received = ops.attention_received(query, key, backend="reference")
    entropy = ops.attention_entropy(query, key, backend="reference")

    torch.testing.assert_close(received, explicit_received(query, key), rtol=1e-13, atol=0)
    torch.testing.assert_close(entropy, explicit_entropy(query, key), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_forwards_log_sum_exp_is_taken(backend, device, dtype):
    query, key = randn(2, 37, 3, 24, dtype=dtype), randn(2, 53, 3, 24, dtype=dtype)
    _, lse = ops.attention(query, key, key, softmax_scale=0.4, backend="reference")
    arguments = [x.to(device) for x in (query, key)]

    out = ops.attention_received(*arguments, lse=lse.to(device), softmax_scale=0.4, backend=backend)
    # a wrong one shows
    doubled = ops.attention_received(
        *arguments, lse=(lse - 2**0.5).to(device), softmax_scale=0.4, backend=backend
    )

    assert_as_exact_as(explicit_received, out, query, key, lse, scale=0.4)
    torch.testing.assert_close(doubled, out * torch.exp(torch.tensor(2**0.5)))


@pytest.mark.parametrize("N", [20, 300])
def test_each_sample_has_its_own_number_of_keys(backend, device, N):
    query, key = randn(4, 17, 2, 16), randn(4, N, 2, 16)
    key_lengths = torch.tensor([N - 3, 0, 1, N + 5], dtype=torch.int32)

    out = ops.attention_entropy(
        query.to(device), key.to(device), key_lengths=key_lengths.to(device), backend=backend
    )

    assert out[1].abs().max() == 0
    some = [0, 2, 3]
    given = query[some], key[some]
    assert_as_exact_as(explicit_entropy, out[some], *given, key_lengths=key_lengths[some])
    alone = ops.attention_entropy(
        query[:1].to(device), key[:1, : N - 3].contiguous().to(device), backend=backend
    )
    torch.testing.assert_close(out[:1], alone, rtol=2e-6, atol=0)


def test_negative_lengths_are_none(backend, device):
    query, key = randn(1, 3, 2, 8, device=device), randn(1, 5, 2, 8, device=device)
    lengths = torch.tensor([-1], dtype=torch.int32, device=device)

    out = ops.attention_entropy(query, key, key_lengths=lengths, backend=backend)

    assert out.abs().max() == 0


def test_each_query_gives_one_in_all(backend, device):
    query, key = (randn(1, n, 1, 16, dtype=torch.float16, device=device) for n in (20, 20001))

    out = ops.attention_received(query, key, backend=backend)

    torch.testing.assert_close(out.sum(-1), torch.ones(1, 1, device=device), rtol=1e-5, atol=0)


def test_entropy_lies_between_one_key_and_all(backend, device):
    key = randn(1, 9, 2, 8, device=device)
    same, sure = key[:, :1].expand(1, 9, 2, 8).contiguous(), 100 * key

    all_keys = ops.attention_entropy(key, same, backend=backend)
    one_key = ops.attention_entropy(key[:, :, :1], sure[:, :, :1], backend=backend)

    torch.testing.assert_close(all_keys, torch.full_like(all_keys, 9.0).log())
    assert 0 <= one_key.min() < 1e-4


def test_queries_and_keys_may_lie_in_fused_projections(backend, device):
    fused = randn(2, 21, 3, 4, 24, device=device)[:, 1:20]
    query, key = fused[:, :, 0, 1:], fused[:, ::2, 1, 1:]

    received = ops.attention_received(query, key, backend=backend)
    entropy = ops.attention_entropy(query, key, backend=backend)

    packed = query.contiguous(), key.contiguous()
    same = {"rtol": 0, "atol": 0}
    torch.testing.assert_close(received, ops.attention_received(*packed, backend=backend), **same)
    torch.testing.assert_close(entropy, ops.attention_entropy(*packed, backend=backend), **same)


@pytest.mark.parametrize(("B", "S", "N"), [(2, 0, 5), (2, 5, 0), (0, 5, 5), (2, 0, 0)])
def test_nothing_gives_zeros(backend, device, B, S, N):
    query, key = randn(B, S, 2, 8, device=device), randn(B, N, 2, 8, device=device)

    received = ops.attention_received(query, key, backend=backend)
    entropy = ops.attention_entropy(query, key, backend=backend)

    assert received.shape == (B, 2, N)
    assert entropy.shape == (B, S)
    if S == 0 or N == 0:
        assert not received.any()
        assert not entropy.any()


def test_a_run_repeats_the_last_one_to_the_bit(backend, device):
    query, key = (randn(2, n, 2, 24, dtype=torch.bfloat16, device=device) for n in (70, 150))

    for op in (ops.attention_received, ops.attention_entropy):
        first, second = (op(query, key, backend=backend) for _ in range(2))
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_the_reference_has_a_gradient():
    query, key = in_float64(randn(2, 40, 2, 3), randn(2, 5, 2, 3))
    inputs = query.requires_grad_(), key.requires_grad_()
    lengths = torch.tensor([4, 0], dtype=torch.int32)

    def received(query, key):
        return ops.attention_received(query, key, backend="reference")

    def entropy(query, key):
        return ops.attention_entropy(query, key, key_lengths=lengths, backend="reference")

    assert torch.autograd.gradcheck(received, inputs)
    assert torch.autograd.gradcheck(entropy, inputs)


def test_a_head_too_wide_for_the_kernels_is_named(backend, device):
    x = randn(1, 3, 1, 264, device=device)
    if backend != "triton":
        pytest.skip("only the kernels have a limit")

    for op in ("attention_received", "attention_entropy"):
        with pytest.raises(UnsupportedInputError, match=f"^{op}: .* 256 channels .*, got 264"):
            getattr(ops, op)(x, x, backend=backend)


def test_statistics_compile_to_one_graph(device):
    torch._dynamo.reset()

    def scores(query, key):
        _, lse = ops.attention(query, key, key)
        received = ops.attention_received(query, key, lse=lse, query_stride=2).mean(1)
        return received + ops.attention_entropy(query, key) + ops.head_norms(key)

    query, key = randn(2, 9, 2, 8, device=device), randn(2, 9, 2, 8, device=device, seed=1)

    out = torch.compile(scores, fullgraph=True, backend="aot_eager")(query, key)

    torch.testing.assert_close(out, scores(query, key))


# bad input


@pytest.mark.parametrize(
    ("changed", "error", "sentence"),
    [
        ({"lse": randn(2, 3, 9)}, ValueError, r"lse must have shape \(B, H, S\) = \(2, 3, 7\)"),
        ({"lse": randn(2, 3, 7).half()}, TypeError, "lse must be float32, got float16"),
        ({"key": randn(2, 9, 3, 16)}, ValueError, r"key must have shape .*, 8\), got .*, 16\)"),
        ({"query_stride": 0}, ValueError, "query_stride must be at least 1, got 0"),
        ({"query": randn(2, 7, 3, 0)}, ValueError, "query must have at least one head of at le"),
    ],
)
def test_bad_input_gets_one_sentence(changed, error, sentence):
    given = {"query": randn(2, 7, 3, 8), "key": randn(2, 9, 3, 8), "lse": randn(2, 3, 7)}

    with pytest.raises(error, match=f"^attention_received: {sentence}"):
        ops.attention_received(**given | changed)


def test_a_half_precision_forward_gives_what_is_wanted():
    query, key = randn(1, 5, 2, 8).half(), randn(1, 6, 2, 8).half()

    _, lse = ops.attention(query, key, key, backend="reference")

    assert ops.attention_received(query, key, lse=lse, backend="reference").dtype == torch.float32


# fewer queries


@pytest.mark.parametrize("is_given", [True, False])
def test_a_stride_takes_query_0_and_every_so_many_after_it(backend, device, is_given):
    query, key = randn(2, 23, 2, 16), randn(2, 31, 2, 16)
    _, lse = ops.attention(query, key, key, backend="reference")

    out = ops.attention_received(
        query.to(device),
        key.to(device),
        lse=lse.to(device) if is_given else None,
        query_stride=4,
        backend=backend,
    )

    # a log-sum-exp that is given is rounded already
    given = (lse[..., ::4],) if is_given else ()
    assert_as_exact_as(explicit_received, out, query[:, ::4], key, *given)


def relative_error(query, key, query_stride):
    """Root mean square over the keys of each head; and as ``attention_received`` predicts it."""
    full, part = (
        ops.attention_received(query, key, query_stride=stride, backend="reference")
        for stride in (1, query_stride)
    )
    weights = explicit_map(query, key)
    spread = (weights.var(2, unbiased=False) / full.square()).mean()
    predicted = (spread * (query_stride - 1) / query.shape[1]).sqrt()
    return (part / full - 1).square().mean().sqrt().item(), predicted.item()


@pytest.mark.parametrize(
    ("query_stride", "measured"), [(2, 0.039), (3, 0.053), (4, 0.069), (5, 0.080), (8, 0.105)]
)
def test_the_error_of_a_stride_is_the_documented_one(query_stride, measured):
    """Queries in no order: the table of docs/adr/0018."""
    query, key = randn(1, 1024, 4, 64), randn(1, 1024, 4, 64, seed=1)

    error, predicted = relative_error(query, key, query_stride)

    assert error == pytest.approx(measured, rel=0.02)
    assert error == pytest.approx(predicted, rel=0.06)


@pytest.fixture(scope="module")
def pictures_heads():
    """Queries and keys of the demo model's first block: (1, 256, 4, 32) each, on a 16 x 16 grid."""
    pytest.importorskip("diffusers")
    from tokencache_kernels.demo.model import load_model

    model = load_model()
    config = model.config
    attention, taken = model.transformer_blocks[0].attn1, []
    for projection in (attention.to_q, attention.to_k):
        projection.register_forward_hook(lambda module, inputs, out: taken.append(out))
    noise = randn(1, config.in_channels, config.sample_size, config.sample_size)
    with torch.no_grad():
        model(noise, timestep=torch.tensor([500]), class_labels=torch.tensor([3]))
    return [x.unflatten(-1, (config.num_attention_heads, -1)) for x in taken]


@pytest.mark.parametrize(
    ("query_stride", "measured"), [(2, 0.043), (3, 0.047), (4, 0.206), (5, 0.125), (8, 0.520)]
)
def test_on_a_grid_a_stride_wants_no_factor_of_its_width(pictures_heads, query_stride, measured):
    """Queries of an image: the second table of docs/adr/0018."""
    error, predicted = relative_error(*pictures_heads, query_stride)

    assert error == pytest.approx(measured, rel=0.02)
    # 2 meets half of the columns, which the other half resembles
    assert (error < 0.6 * predicted) == (query_stride in (2, 3, 5))


# memory

PEAK_RESET = Path("/proc/self/clear_refs")


def peak_mib(function):
    """Measure the peak of this process's memory in a call, beyond the memory before."""

    def read(name):
        status = Path("/proc/self/status").read_text()
        return int(re.search(rf"{name}:\s+(\d+) kB", status).group(1)) / 1024

    PEAK_RESET.write_text("5")
    before = read("VmRSS")
    function()
    return read("VmHWM") - before


@pytest.mark.skipif(not PEAK_RESET.exists(), reason="no way to reset the peak of a process")
def test_no_map_is_held():
    N, H = 8192, 2
    x = randn(1, N, H, 32, dtype=torch.bfloat16)
    one_map = N * N * 4 / 2**20

    received = peak_mib(lambda: ops.attention_received(x, x, backend="reference"))
    entropy = peak_mib(lambda: ops.attention_entropy(x, x, backend="reference"))
    attended = peak_mib(
        lambda: ops.attention_with_entropy(x, x, x, head_mean=True, backend="reference")
    )
    explicit = peak_mib(lambda: explicit_map(x[:, :, :1], x[:, :, :1].clone()))

    assert received < one_map / 8
    assert entropy < one_map / 8
    assert attended < one_map / 2
    # the expected peak, measured in the same way: one head in bfloat16
    assert explicit > one_map / 2


# norms and change


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "H", "E"), [(2, 37, 3, 72), (1, 5, 1, 7), (2, 0, 2, 8)])
def test_norms_are_the_heads_mean(backend, device, B, N, H, E, dtype):
    x = randn(B, N, H, E, dtype=dtype)

    out = ops.head_norms(x.to(device), backend=backend)

    assert_as_exact_as(lambda x: x.square().sum(-1).sqrt().mean(-1), out, x)


CHANGES = {
    "cosine": lambda new, old: 1 - (new * old).sum(-1) / (new.norm(dim=-1) * old.norm(dim=-1)),
    "relative_l1": lambda new, old: (new - old).abs().sum(-1) / old.abs().sum(-1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("metric", CHANGES)
@pytest.mark.parametrize(("B", "N", "D"), [(2, 37, 72), (1, 5, 1152), (3, 1, 7), (0, 4, 8)])
def test_change_is_what_it_says(backend, device, metric, B, N, D, dtype):
    new, old = randn(B, N, D, dtype=dtype), randn(B, N, D, dtype=dtype, seed=1)

    out = ops.token_change(new.to(device), old.to(device), metric=metric, backend=backend)

    assert_as_exact_as(CHANGES[metric], out, new, old)


def test_what_did_not_move_has_not_changed(backend, device):
    x = randn(2, 9, 24, device=device)

    assert ops.token_change(x, x, backend=backend).abs().max() < 1e-6
    assert ops.token_change(x, x, metric="relative_l1", backend=backend).abs().max() == 0


def test_a_zero_token_divides_by_nothing(backend, device):
    new, zero = randn(1, 4, 8, device=device), torch.zeros(1, 4, 8, device=device)

    cosine = ops.token_change(new, zero, backend=backend)
    relative = ops.token_change(zero, zero, metric="relative_l1", backend=backend)

    torch.testing.assert_close(cosine, torch.ones(1, 4, device=device))
    assert relative.abs().max() == 0
    assert ops.head_norms(zero[..., None], backend=backend).abs().max() == 0


def test_slices_are_read_where_they_lie(backend, device):
    wide = randn(2, 19, 3, 48, device=device)[:, 1::2]
    new, old = wide[:, :, 0, :24], wide[:, :, 2, 8:32]

    change = ops.token_change(new, old, backend=backend)
    norms = ops.head_norms(wide[..., 16:40], backend=backend)

    same = {"rtol": 0, "atol": 0}
    packed = new.contiguous(), old.contiguous()
    torch.testing.assert_close(change, ops.token_change(*packed, backend=backend), **same)
    packed = wide[..., 16:40].contiguous()
    torch.testing.assert_close(norms, ops.head_norms(packed, backend=backend), **same)


@pytest.mark.parametrize("sizes", [(1.0, 1.0), (1e20, 1.0), (3e37, 3e37), (1e-25, 1e-12)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_cosine_does_not_depend_on_how_long_the_rows_are(backend, device, sizes, dtype):
    new, old = (
        (size * randn(2, 9, 77, device=device, seed=seed)).to(dtype)
        for seed, size in enumerate(sizes)
    )
    new[0, 3] = 0

    change = ops.token_change(new, old, backend=backend)

    exact = 1 - torch.nn.functional.cosine_similarity(
        *(x.double() / x.double().norm(dim=-1, keepdim=True).clamp_min(1e-300) for x in (new, old)),
        dim=-1,
    )
    torch.testing.assert_close(change.double(), exact, rtol=1e-5, atol=1e-5)
    assert change[0, 3] == 1


@pytest.mark.parametrize("size", [1.0, 1e20, 1e37])
def test_norms_of_heads_do_not_overflow_before_they_must(backend, device, size):
    x = size * randn(2, 9, 3, 26, device=device)

    norms = ops.head_norms(x, backend=backend)

    exact = x.double().norm(dim=-1).mean(-1)
    torch.testing.assert_close(norms.double(), exact, rtol=1e-5, atol=0)


def test_what_lies_beyond_the_keys_of_a_sample_does_not_matter(backend, device):
    query, key = randn(3, 7, 2, 16, device=device), randn(3, 37, 2, 16, device=device, seed=1)
    lengths = torch.tensor([5, 0, 37], dtype=torch.int32, device=device)
    wanted = ops.attention_entropy(query, key, key_lengths=lengths, backend=backend)
    for b, length in enumerate(lengths.tolist()):
        key[b, length:] = torch.nan

    out = ops.attention_entropy(query, key, key_lengths=lengths, backend=backend)

    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
