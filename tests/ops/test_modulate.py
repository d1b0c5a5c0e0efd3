import pytest
import torch

from tokencache_kernels.backends import reference
from tokencache_kernels.ops import (
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
    return total, reference.gather_modulate(total, indices, shift, scale, EPS)


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
    assert_within_budget(out.cpu(), exact, reference.gather_modulate(*inputs, EPS))


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
        packed, reference.gather_modulate(wanted, indices, shift, scale, 1e-6)
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
