import pytest
import torch
import torch.nn.functional as F

from tokencache_kernels import backends, ops
from tokencache_kernels.backends import library, native, reference
from tokencache_kernels.errors import BackendUnavailableError, UnsupportedInputError
from tokencache_kernels.testing import assert_within_budget, in_float64, randn

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    pytest.param(2, 33, 37, 2, 72, id="odd-sizes"),
    pytest.param(1, 64, 64, 1, 64, id="round-sizes"),
    pytest.param(1, 5, 70, 3, 96, id="few-queries"),
    pytest.param(1, 35, 19, 1, 128, id="few-keys"),
    pytest.param(3, 1, 1, 1, 1, id="one-of-each"),
]


@pytest.fixture(params=["reference", "triton", "native", "library"])
def backend(request, device):
    reason = backends.unavailable(request.param, "attention", torch.device(device), torch.float32)
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def needs_entropy(backend):
    if backend == "library":
        pytest.skip("no library hands out the entropy")


def make_inputs(B, S, N, H, E, dtype=torch.float32, device="cpu"):
    return (
        randn(B, S, H, E, dtype=dtype, device=device),
        randn(B, N, H, E, dtype=dtype, device=device, seed=1),
        randn(B, N, H, E, dtype=dtype, device=device, seed=2),
    )


def lengths_of(*lengths, device="cpu"):
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def assert_exact(results, inputs, lengths, scale, *options):
    """Output, log-sum-exp and, where it is there, entropy against the reference in float64."""
    function = reference.attention_with_entropy if options else reference.attention
    exact = function(*in_float64(*inputs), lengths, scale, *options)
    rounded = function(*inputs, lengths, scale, *options)
    assert results[1].dtype == torch.float32
    for name, *three in zip(("out", "lse", "entropy"), results, exact, rounded, strict=False):
        assert three[0].is_contiguous(), name
        assert_within_budget(*three)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "S", "N", "H", "E"), SHAPES)
def test_attention_is_as_exact_as_eager(backend, device, B, S, N, H, E, dtype):
    if backend == "library" and device == "cuda" and (E % 8 or dtype == torch.float32):
        pytest.skip("no library takes it")
    inputs = make_inputs(B, S, N, H, E, dtype, device)

    out, lse = ops.attention(*inputs, softmax_scale=0.2, backend=backend)

    if backend == "library" and dtype != torch.float32:
        # libraries take shortcuts in the exponentials of 16-bit inputs: one rounding of a weight
        exact = reference.attention(*in_float64(*inputs), None, 0.2)[1]
        assert (lse - exact).abs().max() <= torch.finfo(dtype).eps
        lse = reference.attention(*inputs, None, 0.2)[1]
    assert_exact((out, lse), inputs, None, 0.2)


@pytest.mark.parametrize("head_mean", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "S", "N", "H", "E"), SHAPES)
def test_entropy_is_as_exact_as_eager(backend, device, B, S, N, H, E, dtype, head_mean):
    needs_entropy(backend)
    inputs = make_inputs(B, S, N, H, E, dtype, device)
    lengths = lengths_of(*range(N, N - B, -1), device=device).clamp(min=1)

    results = ops.attention_with_entropy(
        *inputs, key_lengths=lengths, softmax_scale=0.2, head_mean=head_mean, backend=backend
    )

    assert_exact(results, inputs, lengths, 0.2, head_mean)


def test_attention_is_that_of_pytorch(backend, device):
    query, key, value = make_inputs(2, 9, 13, 3, 8, device=device)

    out, lse = ops.attention(query, key, value, backend=backend)

    heads = [x.transpose(1, 2) for x in (query, key, value)]
    wanted = F.scaled_dot_product_attention(*heads).transpose(1, 2)
    torch.testing.assert_close(out, wanted)
    logits = heads[0] @ heads[1].mT / 8**0.5
    torch.testing.assert_close(lse, logits.exp().sum(-1).log())


@pytest.mark.parametrize("head_mean", [False, True])
def test_entropy_is_that_of_the_explicit_map(backend, device, head_mean):
    needs_entropy(backend)
    query, key, value = make_inputs(2, 9, 13, 3, 8, device=device)

    entropy = ops.attention_with_entropy(query, key, value, head_mean=head_mean, backend=backend)[2]

    weights = (query.transpose(1, 2) @ key.permute(0, 2, 3, 1) / 8**0.5).softmax(-1)
    weights = weights.mean(1) if head_mean else weights
    torch.testing.assert_close(entropy, -(weights * weights.log()).sum(-1))


def test_even_attention_has_the_greatest_entropy_and_sharp_attention_none(backend, device):
    needs_entropy(backend)
    query, key, value = make_inputs(1, 3, 40, 2, 16, device=device)
    even = ops.attention_with_entropy(0 * query, key, value, backend=backend)[2]
    sharp = ops.attention_with_entropy(query, key, value, softmax_scale=1e4, backend=backend)[2]

    torch.testing.assert_close(even, torch.full_like(even, 40.0).log())
    assert sharp.abs().max() <= 1e-5


def test_key_lengths_are_slices(backend, device):
    if backend == "library" and device == "cuda":
        pytest.skip("no library's attention for CUDA takes key lengths")
    query, key, value = make_inputs(4, 5, 41, 2, 24, device=device)
    # keys beyond a length must not be touched
    key[1, 17:], value[1, 17:] = torch.nan, torch.nan
    lengths = [41, 17, 32, 1]

    out, lse = ops.attention(
        query, key, value, key_lengths=lengths_of(*lengths, device=device), backend=backend
    )

    for b, length in enumerate(lengths):
        if backend == "reference" and b == 1:
            # 0 * nan: the plain map does touch it
            continue
        sliced = [x[b : b + 1, :length] for x in (key, value)]
        wanted = ops.attention(query[b : b + 1], *sliced, backend=backend)
        torch.testing.assert_close((out[b : b + 1], lse[b : b + 1]), wanted)


def test_a_sample_without_a_key_attends_to_nothing(backend, device):
    if backend == "library" and device == "cuda":
        pytest.skip("no library's attention for CUDA takes key lengths")
    inputs = make_inputs(2, 3, 6, 2, 8, device=device)

    out, lse = ops.attention(*inputs, key_lengths=lengths_of(0, 4, device=device), backend=backend)

    assert out[0].abs().max() == 0
    assert lse[0].isneginf().all()
    assert lse[1].isfinite().all()
    if backend != "library":  # it has no entropy
        for head_mean in (False, True):
            entropy = ops.attention_with_entropy(
                *inputs, key_lengths=lengths_of(0, 4, device=device), head_mean=head_mean,
                backend=backend,
            )[2]  # fmt: skip
            assert entropy[0].abs().max() == 0
            assert entropy[1].min() > 0


@pytest.mark.parametrize(("B", "S", "N"), [(2, 0, 5), (2, 3, 0), (0, 3, 5)])
def test_nothing_to_attend_with_or_to(backend, device, B, S, N):
    out, lse = ops.attention(*make_inputs(B, S, N, 2, 8, device=device), backend=backend)

    assert out.shape == (B, S, 2, 8)
    assert lse.shape == (B, 2, S)
    assert not out.any()
    assert lse.isneginf().all() or S * B == 0


def test_the_order_of_keys_does_not_matter(backend, device):
    query, key, value = make_inputs(1, 7, 37, 2, 24, device=device)
    order = torch.randperm(37)

    out, lse = ops.attention(query, key, value, backend=backend)
    permuted = ops.attention(query, key[:, order], value[:, order], backend=backend)

    torch.testing.assert_close(permuted, (out, lse))


@pytest.mark.parametrize("head_mean", [False, True])
def test_a_batch_is_its_elements_alone(backend, device, head_mean):
    needs_entropy(backend)
    inputs = make_inputs(3, 5, 11, 2, 16, device=device)

    together = ops.attention_with_entropy(*inputs, head_mean=head_mean, backend=backend)

    alone = [
        ops.attention_with_entropy(
            *(x[b : b + 1] for x in inputs), head_mean=head_mean, backend=backend
        )
        for b in range(3)
    ]
    # torch multiplies a larger batch in another order
    tolerance = {} if backend == "reference" else {"rtol": 0, "atol": 0}
    for whole, parts in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(whole, torch.cat(parts), **tolerance)


def test_fresh_queries_get_what_all_queries_would(backend, device):
    query, key, value = make_inputs(1, 40, 40, 2, 24, device=device)
    fresh = torch.tensor([1, 5, 6, 30])

    out, lse = ops.attention(query[:, fresh], key, value, backend=backend)

    all_out, all_lse = ops.attention(query, key, value, backend=backend)
    torch.testing.assert_close(out, all_out[:, fresh])
    torch.testing.assert_close(lse, all_lse[:, :, fresh])


def test_slices_of_a_fused_projection_are_read_in_place(backend, device):
    B, N, H, E = 2, 21, 3, 24
    qkv = randn(B, N + 2, 3, H, E, device=device)[:, 1:-1]
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in qkv.unbind(2)]

    sliced = ops.attention(*qkv.unbind(2), backend=backend)

    torch.testing.assert_close(sliced, ops.attention(*heads_first, backend=backend))
    packed = [x.contiguous() for x in qkv.unbind(2)]
    torch.testing.assert_close(sliced, ops.attention(*packed, backend=backend))


def test_one_launch(device):
    from tokencache_kernels.testing.counting import count_launches

    inputs = make_inputs(1, 5, 11, 2, 16, device=device)
    with count_launches() as names:
        ops.attention(*inputs, backend="triton")
        ops.attention_with_entropy(*inputs, backend="triton")
        ops.attention_with_entropy(*inputs, head_mean=True, backend="triton")

    assert names == ["_attention_kernel"] * 2 + ["_attention_head_mean_kernel"]


@pytest.mark.parametrize("chosen", ["triton", "library"])
def test_it_compiles_to_one_graph(device, chosen):
    if chosen == "library" and device == "cuda":
        pytest.skip("no library takes float32")
    torch._dynamo.reset()
    inputs = make_inputs(2, 5, 11, 2, 16, device=device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def attend(query, key, value):
        out, lse = ops.attention(query, key, value, backend=chosen)
        return out + 1, lse - 1

    out, lse = attend(*inputs)

    wanted = ops.attention(*inputs, backend=chosen)
    torch.testing.assert_close((out - 1, lse + 1), wanted)


# the backend


@pytest.mark.parametrize("name", library.CANDIDATES)
def test_every_library_that_can_is_as_exact_as_eager(device, name):
    inputs = make_inputs(2, 33, 37, 2, 72, torch.bfloat16, device)
    reason = library.refusal(name, *inputs, None)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")

    out, lse = library.CANDIDATES[name].run(*inputs, None, 0.2)

    exact, exact_lse = reference.attention(*in_float64(*inputs), None, 0.2)
    assert_within_budget(out, exact, reference.attention(*inputs, None, 0.2)[0])
    assert (lse.reshape(2, 2, 33) - exact_lse).abs().max() <= torch.finfo(torch.bfloat16).eps


def test_auto_follows_the_table(monkeypatch):
    inputs = make_inputs(1, 5, 11, 2, 16)
    row = library.Row("cpu", ["float32"], 16, ["cudnn", "cpu_flash", "triton"], "this test")

    monkeypatch.setattr(library, "read_table", lambda: (row,))

    assert tuple(library.preference(*inputs, None)) == ("library", "triton", "reference")
    wider = make_inputs(1, 5, 11, 2, 24)
    assert tuple(library.preference(*wider, None)) == ("reference",)
    assert tuple(library.preference(*in_float64(*inputs), None)) == ("reference",)


def test_auto_takes_the_entropy_from_the_native_library():
    inputs = make_inputs(1, 5, 11, 2, 16)
    reason = native.unavailable(inputs[0].device, inputs[0].dtype)
    if reason is not None:
        pytest.skip(reason)

    chosen = backends.resolve(
        "attention_with_entropy", torch.device("cpu"), torch.float32,
        preference=library.preference(*inputs, None),
    )  # fmt: skip

    assert chosen is native.attention_with_entropy


def test_the_table_can_be_read_and_names_what_there_is():
    known = {*library.CANDIDATES, "triton", "native"}

    for row in library.read_table():
        assert set(row.order) <= known
        assert row.source


def test_float64_runs_on_the_reference_and_on_the_library_that_was_named():
    inputs = in_float64(*make_inputs(1, 5, 11, 2, 16))

    assert tuple(library.preference(*inputs, None)) == ("reference",)
    wanted = ops.attention(*inputs)
    torch.testing.assert_close(ops.attention(*inputs, backend="library"), wanted)
    assert wanted[1].dtype == torch.float64


def test_a_library_that_cannot_says_why(monkeypatch):
    for name in library.CANDIDATES:
        refusing = library.Candidate(lambda *_: "it is tired", None)
        monkeypatch.setitem(library.CANDIDATES, name, refusing)

    with pytest.raises(BackendUnavailableError, match=r"'library' cannot run here: cpu_flash: it"):
        ops.attention(*make_inputs(1, 5, 11, 2, 16), backend="library")
    # auto may pick another
    ops.attention(*make_inputs(1, 5, 11, 2, 16))


def test_no_library_hands_out_the_entropy():
    with pytest.raises(BackendUnavailableError, match="it has no attention_with_entropy"):
        ops.attention_with_entropy(*make_inputs(1, 5, 11, 2, 16), backend="library")


def test_a_head_too_wide_for_the_kernel_is_refused(device):
    inputs = make_inputs(1, 2, 3, 1, 136, device=device)

    with pytest.raises(
        UnsupportedInputError,
        match=r"^attention: query must have at most 128 channels a head for .*, got 136$",
    ):
        ops.attention(*inputs, backend="triton")
    ops.attention(*inputs)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"query": randn(1, 5, 2, 0)}, "query must have at least one channel a head, got 0"),
        (
            {"value": randn(1, 11, 2, 24)},
            r"value must have shape \(B, N, H, E\) = \(1, 11, 2, 16\), got \(1, 11, 2, 24\)",
        ),
        (
            {"key": randn(1, 11, 2, 72)},
            r"key must have shape \(B, N, H, E\) = \(1, any, 2, 16\), got \(1, 11, 2, 72\)",
        ),
        ({"key_lengths": torch.ones(1)}, "key_lengths must be int32, got float32"),
        (
            {"key_lengths": lengths_of(1, 2)},
            r"key_lengths must have shape \(B,\) = \(1\), got \(2,\)",
        ),
    ],
)
@pytest.mark.parametrize("op", ["attention", "attention_with_entropy"])
def test_bad_input_gets_one_sentence(op, changed, sentence):
    given = dict(zip(("query", "key", "value"), make_inputs(1, 5, 11, 2, 16), strict=True))

    with pytest.raises((ValueError, TypeError), match=f"^{op}: {sentence}$"):
        getattr(ops, op)(**{**given, **changed})


def test_the_reference_has_a_gradient():
    inputs = [x.double().requires_grad_() for x in make_inputs(1, 3, 4, 2, 4)]
    lengths = lengths_of(3)

    def attend(*inputs):
        return ops.attention_with_entropy(*inputs, key_lengths=lengths, backend="reference")

    assert torch.autograd.gradcheck(attend, inputs)


@pytest.mark.parametrize("has_entropy", [False, True, "head mean"])
def test_padding_that_was_never_written_does_not_matter(backend, device, has_entropy):
    if has_entropy:
        needs_entropy(backend)
    query, key, value = make_inputs(3, 7, 37, 2, 16, device=device)
    lengths = torch.tensor([5, 0, 37], dtype=torch.int32, device=device)

    def attend():
        options = {"key_lengths": lengths, "backend": backend}
        if not has_entropy:
            return ops.attention(query, key, value, **options)
        options["head_mean"] = has_entropy == "head mean"
        return ops.attention_with_entropy(query, key, value, **options)

    wanted = attend()
    for b, length in enumerate(lengths.tolist()):
        key[b, length:], value[b, length:] = torch.nan, torch.nan

    torch.testing.assert_close(attend(), wanted, rtol=0, atol=0)
