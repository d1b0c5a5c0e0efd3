import pytest
import torch

from tokencache_kernels.backends import reference
from tokencache_kernels.ops import (
    RowNorm,
    add_branches,
    add_branches_,
    gather_modulate,
    invert_indices,
    row_pass,
    row_pass_,
)
from tokencache_kernels.testing import assert_within_budget, in_float64, randn, random_indices

OPS = ("add_branches", "gather_modulate", "row_pass", "invert_indices")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    pytest.param(2, 37, 11, 72, id="odd-sizes"),
    pytest.param(1, 64, 16, 128, id="round-sizes"),
    pytest.param(3, 5, 5, 7, id="all-tokens"),
    pytest.param(2, 16, 0, 8, id="no-slot"),
    pytest.param(1, 3, 1, 1, id="one-channel"),
    pytest.param(0, 4, 2, 8, id="no-sample"),
    pytest.param(1, 3, 2, 2100, id="wide"),
]
EPS = 1e-6


def make_modulation(B, D, dtype=torch.float32, device="cpu"):
    """Six vectors per sample, in one tensor as adaLN makes them: each is a strided view."""
    return randn(B, 6 * D, dtype=dtype, device=device, seed=7).chunk(6, dim=1)


def make_branches(B, N, D, count, dtype=torch.float32, device="cpu"):
    branches = [randn(B, N, D, dtype=dtype, device=device, seed=j + 1) for j in range(count)]
    first, second, *_ = make_modulation(B, D, dtype, device)
    return branches, [(first, None, second)[j % 3] for j in range(count)]


def make_row_pass(B, N, S, D, dtype, device="cpu", count=2):
    """hidden_states, branches, gates, indices with an empty slot, shift and scale."""
    hidden_states = randn(B, N, D, dtype=dtype, device=device)
    branches, gates = make_branches(B, N, D, count, dtype, device)
    indices = random_indices(B, N, S, device=device, num_empty=min(S, 1))
    *_, shift, scale = make_modulation(B, D, dtype, device)
    return hidden_states, branches, gates, indices, shift, scale


def on_cpu(value):
    if isinstance(value, list | tuple):
        return [on_cpu(item) for item in value]
    return value if value is None else value.cpu()


def eager_row_pass(hidden_states, branches, gates, indices, shift, scale, in_double):
    """Plain PyTorch on the CPU, in the inputs' dtype or in float64."""
    widen = in_float64 if in_double else lambda *values: values
    hidden_states, indices, shift, scale = widen(*on_cpu([hidden_states, indices, shift, scale]))
    total = reference.sum_branches(hidden_states, widen(*on_cpu(branches)), widen(*on_cpu(gates)))
    return total, reference.gather_modulate(total, indices, shift, scale, RowNorm(eps=EPS))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "S", "D"), SHAPES)
def test_row_pass_is_as_exact_as_eager(backend, device, B, N, S, D, dtype):
    inputs = make_row_pass(B, N, S, D, dtype, device)

    out, packed = row_pass(*inputs, eps=EPS, backend=backend)

    exact_out, exact_packed = eager_row_pass(*inputs, in_double=True)
    eager_out, eager_packed = eager_row_pass(*inputs, in_double=False)
    assert_within_budget(out.cpu(), exact_out, eager_out)
    assert_within_budget(packed.cpu(), exact_packed, eager_packed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 3, 19])
def test_add_branches_is_as_exact_as_eager(backend, device, count, dtype):
    hidden_states = randn(2, 13, 72, dtype=dtype)
    branches, gates = make_branches(2, 13, 72, count, dtype)
    given = [hidden_states.to(device), [branch.to(device) for branch in branches]]
    given_gates = [None if gate is None else gate.to(device) for gate in gates]

    out = add_branches(*given, given_gates, backend=backend)

    (exact,) = in_float64(hidden_states)
    for branch, gate in zip(in_float64(*branches), in_float64(*gates), strict=True):
        exact += branch if gate is None else branch * gate[:, None]
    eager = reference.sum_branches(hidden_states, branches, gates)
    assert_within_budget(out.cpu(), exact, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_modulate_is_as_exact_as_eager(backend, device, dtype):
    hidden_states, _, _, indices, shift, scale = make_row_pass(2, 37, 11, 72, dtype)
    inputs = (hidden_states, indices, shift, scale)

    out = gather_modulate(*(value.to(device) for value in inputs), eps=EPS, backend=backend)

    # the formula once more, without the reference
    exact = torch.zeros(2, 11, 72, dtype=torch.float64)
    for b, row in enumerate(indices.tolist()):
        for s, token in enumerate(row):
            if token >= 0:
                x = hidden_states[b, token].double()
                normed = (x - x.mean()) / (x.var(correction=0) + EPS).sqrt()
                exact[b, s] = normed * (1 + scale[b].double()) + shift[b].double()
    assert_within_budget(out.cpu(), exact, reference.gather_modulate(*inputs, RowNorm(eps=EPS)))


def test_row_pass_is_the_sum_and_then_the_modulated_rows_of_it(backend, device):
    inputs = make_row_pass(2, 21, 9, 40, torch.bfloat16, device)
    hidden_states, branches, gates, indices, shift, scale = inputs

    out, packed = row_pass(*inputs, backend=backend)

    total = add_branches(hidden_states, branches, gates, backend=backend)
    wanted = gather_modulate(total, indices, shift, scale, backend=backend)
    torch.testing.assert_close(out, total, rtol=0, atol=0)
    torch.testing.assert_close(packed, wanted, rtol=torch.finfo(torch.bfloat16).eps, atol=1e-6)


def test_row_pass_in_place_writes_what_the_functional_one_returns(backend, device):
    inputs = make_row_pass(2, 13, 4, 24, torch.float32, device)
    hidden_states = inputs[0]
    before = hidden_states.clone()

    out, packed = row_pass(*inputs, backend=backend)
    torch.testing.assert_close(hidden_states, before, rtol=0, atol=0)
    packed_again = row_pass_(*inputs, backend=backend)

    torch.testing.assert_close(hidden_states, out, rtol=0, atol=0)
    torch.testing.assert_close(packed_again, packed, rtol=0, atol=0)


def test_add_branches_in_place_returns_its_argument(backend, device):
    hidden_states = randn(2, 13, 24, device=device)
    branches, gates = make_branches(2, 13, 24, 2, device=device)
    out = add_branches(hidden_states, branches, gates, backend=backend)

    returned = add_branches_(hidden_states, branches, gates, backend=backend)

    assert returned is hidden_states
    torch.testing.assert_close(hidden_states, out, rtol=0, atol=0)


def test_row_pass_makes_the_positions_that_it_is_not_given(backend, device):
    inputs = make_row_pass(2, 13, 4, 24, torch.float32, device)
    positions = invert_indices(inputs[3], 13, backend=backend)

    out, packed = row_pass(*inputs, positions=positions, backend=backend)
    out_without, packed_without = row_pass(*inputs, backend=backend)

    torch.testing.assert_close(out, out_without, rtol=0, atol=0)
    torch.testing.assert_close(packed, packed_without, rtol=0, atol=0)


def test_row_pass_reads_and_writes_slices_in_place(backend, device):
    wide = randn(2, 15, 3, 24, device=device)
    hidden_states = wide[:, 1:14, 1]
    branches = [randn(4, 13, 2, 24, device=device)[::2, :, 0], randn(13, 2, 24).to(device)]
    branches[1] = branches[1].transpose(0, 1)
    gates = list(make_modulation(2, 24, device=device)[:2])
    indices = random_indices(2, 13, 8, device=device)[:, :5]
    *_, shift, scale = make_modulation(2, 24, device=device)
    before = wide.clone()

    packed = row_pass_(hidden_states, branches, gates, indices, shift, scale, backend=backend)

    wanted = before[:, 1:14, 1] + sum(
        gate[:, None] * branch for gate, branch in zip(gates, branches, strict=True)
    )
    torch.testing.assert_close(hidden_states, wanted)
    torch.testing.assert_close(
        packed, reference.gather_modulate(wanted, indices, shift, scale, RowNorm())
    )
    torch.testing.assert_close(wide[:, :, [0, 2]], before[:, :, [0, 2]], rtol=0, atol=0)
    torch.testing.assert_close(wide[:, [0, 14], 1], before[:, [0, 14], 1], rtol=0, atol=0)


def test_row_pass_without_a_branch_packs_the_rows_as_they_are(backend, device):
    hidden_states, _, _, indices, shift, scale = make_row_pass(2, 13, 4, 24, torch.float32, device)

    out, packed = row_pass(hidden_states, [], [], indices, shift, scale, backend=backend)

    torch.testing.assert_close(out, hidden_states, rtol=0, atol=0)
    wanted = gather_modulate(hidden_states, indices, shift, scale, backend=backend)
    torch.testing.assert_close(packed, wanted, rtol=0, atol=0)


def test_a_long_run_of_branches_may_precede_the_packed_rows(backend, device):
    inputs = make_row_pass(1, 9, 3, 24, torch.float32, device, count=11)

    out, packed = row_pass(*inputs, eps=EPS, backend=backend)

    exact_out, exact_packed = eager_row_pass(*inputs, in_double=True)
    torch.testing.assert_close(out.cpu().double(), exact_out, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed.cpu().double(), exact_packed, rtol=1e-5, atol=1e-5)


def test_the_order_of_the_indices_only_orders_the_packed_rows(backend, device):
    hidden_states, branches, gates, indices, shift, scale = make_row_pass(
        2, 37, 11, 72, torch.float32, device
    )
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).to(device)
    shuffled = indices[:, order].contiguous()

    out, packed = row_pass(hidden_states, branches, gates, indices, shift, scale, backend=backend)
    out_too, permuted = row_pass(
        hidden_states, branches, gates, shuffled, shift, scale, backend=backend
    )

    torch.testing.assert_close(out_too, out, rtol=0, atol=0)
    torch.testing.assert_close(permuted, packed[:, order], rtol=0, atol=0)


def test_empty_slots_add_nothing_but_zeros(backend, device):
    hidden_states, branches, gates, _, shift, scale = make_row_pass(
        2, 13, 4, 24, torch.float32, device
    )
    indices = random_indices(2, 13, 4, device=device)
    wild = torch.tensor([[-1, 13, 2**31 - 1, -(2**31)]] * 2, dtype=torch.int32, device=device)
    padded = torch.cat((indices[:, :2], wild, indices[:, 2:]), dim=1)
    rest = (shift, scale)

    out, packed = row_pass(hidden_states, branches, gates, indices, *rest, backend=backend)
    out_too, longer = row_pass(hidden_states, branches, gates, padded, *rest, backend=backend)

    torch.testing.assert_close(out_too, out, rtol=0, atol=0)
    torch.testing.assert_close(longer[:, [0, 1, 6, 7]], packed, rtol=0, atol=0)
    assert longer[:, 2:6].abs().max() == 0


def test_a_batch_equals_its_elements_run_alone(backend, device):
    hidden_states, branches, gates, indices, shift, scale = make_row_pass(
        3, 13, 4, 24, torch.float32, device
    )

    out, packed = row_pass(hidden_states, branches, gates, indices, shift, scale, backend=backend)

    for b in range(3):
        one = slice(b, b + 1)
        alone = row_pass(
            hidden_states[one],
            [branch[one] for branch in branches],
            [None if gate is None else gate[one] for gate in gates],
            indices[one], shift[one], scale[one],
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(alone[0], out[one], rtol=0, atol=0)
        torch.testing.assert_close(alone[1], packed[one], rtol=0, atol=0)


def test_a_constant_row_gives_the_shift(backend, device):
    hidden_states = torch.full((1, 5, 24), 3.0, device=device)
    indices = torch.tensor([[0, 4]], dtype=torch.int32, device=device)
    *_, shift, scale = make_modulation(1, 24, device=device)

    out = gather_modulate(hidden_states, indices, shift, scale, backend=backend)

    torch.testing.assert_close(out, shift[:, None].expand(1, 2, 24), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"gates": [None]}, "gates must hold one entry per branch, 2, got 1"),
        ({"branches": [torch.zeros(2, 13, 24), torch.zeros(2, 13, 23)]}, r"branches\[1\] must"),
        ({"shift": torch.zeros(24)}, r"shift must have shape \(B, D\), got \(24,\)"),
        ({"scale": torch.zeros(24, 2).T}, "scale must have stride 1 along D, got 2"),
        ({"positions": torch.zeros(2, 12, dtype=torch.int32)}, "positions must have shape"),
    ],
)
def test_an_argument_that_does_not_fit_is_named(change, sentence):
    names = ("hidden_states", "branches", "gates", "indices", "shift", "scale")
    arguments = dict(zip(names, make_row_pass(2, 13, 4, 24, torch.float32), strict=True))

    with pytest.raises(ValueError, match=f"^row_pass_: {sentence}"):
        row_pass_(**(arguments | change))


NORMS = {
    "layer with weights": lambda vector: RowNorm("layer", vector(1), vector(2)),
    "rms": lambda vector: RowNorm("rms", eps=1e-3),
    "rms with a weight": lambda vector: RowNorm("rms", vector(1)),
    "rms with 1 + w": lambda vector: RowNorm("rms", vector(1), None, 1.0),
    "rms with a bias": lambda vector: RowNorm("rms", vector(1), vector(2)),
    "none": lambda vector: RowNorm("none"),
    "none with a weight": lambda vector: RowNorm("none", vector(1)),
}
GRAINS = ("a sample", "a token", "by number")
RICH_SHAPES = [(2, 37, 11, 72), (1, 5, 5, 7), (2, 16, 0, 8), (1, 3, 2, 2100), (0, 4, 2, 8)]


def make_vectors(grain, B, N, D, dtype, device, seed):
    """Vectors of each sample, each token, or three by number, which are strided."""
    shape = {"a sample": (B, 2 * D), "a token": (B, N, 2 * D), "by number": (B, 3, 2 * D)}[grain]
    return randn(*shape, dtype=dtype, device=device, seed=seed)[..., D:]


def make_numbers(grain, B, N, device):
    """Number the vectors of the tokens; some numbers are to be clipped."""
    if grain != "by number":
        return None
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randint(-1, 4, (B, 2 * N), generator=generator, dtype=torch.int32)
    return numbers.to(device)[:, :N]


def exact_norm(rows, norm):
    """The formula once more, in float64."""
    if norm is None or norm.kind == "none":
        normal = rows
    elif norm.kind == "layer":
        centred = rows - rows.mean(-1, keepdim=True)
        normal = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    else:
        normal = rows / (rows.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    if norm is not None and norm.weight is not None:
        normal = normal * (norm.weight_offset + norm.weight.double())
    return normal if norm is None or norm.bias is None else normal + norm.bias.double()


def exact_vectors(vectors, numbers, N):
    """(B, N, D) in float64; of None: zeros."""
    if vectors is None:
        return 0.0
    vectors = vectors.double()
    if vectors.dim() == 2:
        return vectors[:, None].expand(-1, N, -1)
    if numbers is None:
        return vectors
    return (
        torch.stack(
            [
                one[row.clamp(0, len(one) - 1).long()]
                for one, row in zip(vectors, numbers, strict=True)
            ]
        )
        if len(vectors)
        else vectors.new_zeros(0, N, vectors.shape[2])
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("norm", NORMS)
def test_rows_are_normalised_and_modulated_as_the_formula_says(backend, device, norm, grain, dtype):
    B, N, S, D = 2, 37, 11, 72
    x = randn(B, N, D, dtype=dtype, device=device)
    indices = random_indices(B, N, S, num_empty=1, device=device)
    norm = NORMS[norm](lambda seed: randn(D, dtype=dtype, device=device, seed=seed))
    shift = make_vectors(grain, B, N, D, dtype, device, 3)
    scale = make_vectors("a sample", B, N, D, dtype, device, 4)
    numbers = make_numbers(grain, B, N, device)
    inputs = (x, indices, shift, scale)

    out = gather_modulate(*inputs, norm=norm, vector_index=numbers, backend=backend)

    rows = exact_norm(x.double(), norm) * (1 + exact_vectors(scale, None, N))
    rows = rows + exact_vectors(shift, numbers, N)
    exact = torch.zeros(B, S, D, dtype=torch.float64, device=device)
    live = indices >= 0
    exact[live] = rows[live.nonzero()[:, 0], indices[live].long()]
    rounded = reference.gather_modulate(*inputs, norm, numbers)
    assert_within_budget(out, exact, rounded)
    assert_within_budget(rounded.double(), exact, rounded.double())


@pytest.mark.parametrize("has", ["neither", "shift", "scale"])
def test_shift_and_scale_may_be_left_out(backend, device, has):
    x, indices = randn(2, 13, 24, device=device), random_indices(2, 13, 4, device=device)
    vectors = randn(2, 24, device=device, seed=1)
    zeros = torch.zeros_like(vectors)
    given = {has: vectors} if has != "neither" else {}

    out = gather_modulate(x, indices, **given, backend=backend)
    _, packed = row_pass(x, [x], [None], indices, **given, backend=backend)

    both = {"shift": zeros, "scale": zeros, **given}
    wanted = gather_modulate(x, indices, **both, backend="reference")
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(packed, gather_modulate(2 * x, indices, **both, backend="reference"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize(("B", "N", "S", "D"), RICH_SHAPES)
def test_branches_are_normalised_and_gated_as_the_formula_says(
    backend, device, B, N, S, D, grain, dtype
):
    x, *branches = (randn(B, N, D, dtype=dtype, device=device, seed=seed) for seed in range(7))
    gates = [make_vectors(grain, B, N, D, dtype, device, 8 + j) for j in range(len(branches))]
    gates[1], gates[2] = None, make_vectors("a sample", B, N, D, dtype, device, 20)
    weight = randn(D, dtype=dtype, device=device, seed=30)
    norms = [RowNorm("rms", weight), RowNorm("rms"), None, None, RowNorm("rms", weight, None, 1.0)]
    norms.append(RowNorm("rms", weight, eps=0.5))
    norm = RowNorm("rms", weight, None, 1.0, 1e-5)
    shift, scale = (make_vectors(grain, B, N, D, dtype, device, seed) for seed in (40, 41))
    numbers = make_numbers(grain, B, N, device)
    indices = random_indices(B, N, S, num_empty=min(S, 1), device=device)
    options = {"branch_norms": norms, "norm": norm, "vector_index": numbers}

    out, packed = row_pass(x, branches, gates, indices, shift, scale, **options, backend=backend)

    exact = x.double()
    for branch, gate, one in zip(branches, gates, norms, strict=True):
        factor = 1.0 if gate is None else exact_vectors(gate, numbers, N)
        exact = exact + factor * exact_norm(branch.double(), one)
    rounded, rounded_packed = row_pass(
        x, branches, gates, indices, shift, scale, **options, backend="reference"
    )
    assert_within_budget(out, exact, rounded)
    alone = add_branches(
        x, branches, gates, branch_norms=norms, vector_index=numbers, backend=backend
    )
    assert_within_budget(alone, exact, rounded)
    exact_packed = reference.gather_modulate(
        exact, indices, *in_float64(shift, scale), norm._replace(weight=weight.double()), numbers
    )
    assert_within_budget(packed, exact_packed, rounded_packed)


def test_vectors_of_a_token_are_those_of_the_sample_where_they_are_alike(backend, device):
    hidden_states, branches, gates, indices, shift, scale = make_row_pass(
        2, 13, 4, 24, torch.bfloat16, device
    )
    rest = (indices, shift, scale)
    out, packed = row_pass(hidden_states, branches, gates, *rest, backend=backend)

    gates = [None if gate is None else gate[:, None].expand(2, 13, 24) for gate in gates]
    rest = (indices, *(vector[:, None].expand(2, 13, 24) for vector in (shift, scale)))
    out_too, packed_too = row_pass(hidden_states, branches, gates, *rest, backend=backend)

    torch.testing.assert_close(out_too, out, rtol=0, atol=0)
    torch.testing.assert_close(packed_too, packed, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"norm": RowNorm("batch")}, "norm must be a RowNorm of a kind among layer, rms, none,"),
        ({"norm": "rms"}, "norm must be a RowNorm of a kind among layer, rms, none, got str"),
        ({"norm": RowNorm(eps=-1.0)}, "norm must have an eps of at least 0, got -1"),
        ({"norm": RowNorm("rms", torch.ones(23))}, r"norm's weight must have shape \(D,\) ="),
        ({"branch_norms": [RowNorm("rms")]}, "branch_norms must hold one entry per branch, 2,"),
        ({"branch_norms": [RowNorm(), None]}, r"branch_norms\[0\] must be of kind 'rms' without"),
        ({"shift": torch.zeros(2, 12, 24)}, r"shift must have shape \(B, N, D\) = \(2, 13, 24\)"),
        ({"shift": torch.zeros(2, 0, 24)}, r"shift must have shape \(B, N, D\) = \(2, 13, 24\)"),
        (
            {"shift": torch.zeros(2, 0, 24), "vector_index": torch.zeros(2, 13, dtype=torch.int32)},
            "shift must hold at least one vector of each sample",
        ),
        ({"vector_index": torch.zeros(2, 13)}, "vector_index must be int32, got float32"),
        (
            {
                "shift": torch.zeros(2, 3, 24), "scale": torch.zeros(2, 4, 24),
                "vector_index": torch.zeros(2, 13, dtype=torch.int32),
            },
            r"vector_index must number as many vectors everywhere, got \[3, 4\]",
        ),
    ],
)  # fmt: skip
def test_a_norm_or_a_vector_that_does_not_fit_is_named(change, sentence):
    names = ("hidden_states", "branches", "gates", "indices", "shift", "scale")
    arguments = dict(zip(names, make_row_pass(2, 13, 4, 24, torch.float32), strict=True))
    before = arguments["hidden_states"].clone()

    with pytest.raises((ValueError, TypeError), match=f"^row_pass_: {sentence}"):
        row_pass_(**(arguments | change))

    assert torch.equal(arguments["hidden_states"], before)


def test_the_reference_of_norms_and_vectors_has_gradients():
    hidden_states, branches, gates, indices, shift, scale = (
        [None if one is None else one.double() for one in value]
        if isinstance(value, list)
        else value.double()
        if value.is_floating_point()
        else value
        for value in make_row_pass(2, 7, 3, 6, torch.float32)
    )
    weight = randn(6).double().requires_grad_()
    shift = randn(2, 7, 6).double().requires_grad_()

    def packed(hidden_states, weight, shift):
        options = {"norm": RowNorm("rms", weight), "branch_norms": [RowNorm("rms", weight), None]}
        return row_pass(
            hidden_states, branches, gates, indices, shift, scale, **options, backend="reference"
        )[1]

    assert torch.autograd.gradcheck(packed, (hidden_states.requires_grad_(), weight, shift))
