"""The residual stream adds pending branches late, and leaves the caller's tensor alone."""

import torch

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
    packed = stream.take_rows(indices, positions, Modulation(shift, scale, 1e-6))
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
