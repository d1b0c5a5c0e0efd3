"""The residual stream adds pending branches late, and leaves the caller's tensor alone."""

import torch
import torch.nn.functional as F

from tokencache_kernels import ops
from tokencache_kernels.blocks import Modulation, ResidualStream
from tokencache_kernels.testing import randn, random_indices

B, N, D = 2, 9, 16


def test_pending_branches_are_added_in_one_pass_and_the_input_keeps_its_value(device):
    x, first, second = (randn(B, N, D, seed=seed, device=device) for seed in range(3))
    gate = randn(B, D, device=device)
    before = x.clone()
    stream = ResidualStream(x)

    stream.add(first, gate)
    stream.add(second, None)
    assert stream.hidden_states is x
    out = stream.flush()

    torch.testing.assert_close(out, before + gate[:, None] * first + second)
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_taken_rows_see_what_was_pending_and_the_stream_goes_on(device):
    x, first, second = (randn(B, N, D, seed=seed, device=device) for seed in range(3))
    shift, scale = randn(B, D, device=device), randn(B, D, seed=1, device=device)
    indices = random_indices(B, N, 4, device=device)
    positions = ops.invert_indices(indices, N)
    before = x.clone()
    stream = ResidualStream(x)

    stream.add(first, None)
    packed = stream.take_rows(indices, positions, Modulation(shift, scale))
    kept = stream.hidden_states
    stream.add(second, None)
    out = stream.flush()

    wanted = ops.gather_modulate(before + first, indices, shift, scale)
    torch.testing.assert_close(packed, wanted)
    torch.testing.assert_close(out, before + first + second)
    torch.testing.assert_close(x, before, rtol=0, atol=0)
    assert out is kept


def test_a_flush_of_nothing_returns_the_input():
    x = randn(B, N, D)

    assert ResidualStream(x).flush() is x


def test_a_branch_is_normalised_before_its_gate(device):
    x, branch = randn(B, N, D, device=device), randn(B, N, D, seed=1, device=device)
    gate, weight = randn(B, D, seed=2, device=device), randn(D, seed=3, device=device)
    stream = ResidualStream(x)

    stream.add(branch, gate, ops.RowNorm("rms", weight, eps=1e-5))
    stream.add(branch, None)

    wanted = x + gate[:, None] * F.rms_norm(branch, (D,), weight, 1e-5) + branch
    torch.testing.assert_close(stream.flush(), wanted, rtol=1e-5, atol=1e-5)


def test_what_is_pending_keeps_the_numbers_that_it_was_given(device):
    x, branch = randn(B, N, D, device=device), randn(B, N, D, seed=1, device=device)
    kinds, tokens = randn(B, 2, D, seed=2, device=device), randn(B, N, D, seed=3, device=device)
    numbers = (torch.arange(N, device=device) % 2).int().expand(B, N).contiguous()
    stream = ResidualStream(x)

    stream.number_vectors(numbers)
    stream.add(branch, kinds)
    stream.number_vectors(None)
    stream.add(branch, tokens)

    wanted = x + kinds[:, numbers[0].long()] * branch + tokens * branch
    torch.testing.assert_close(stream.flush(), wanted, rtol=1e-5, atol=1e-5)
