import pytest
import torch

from tokencache_kernels.ops import gather_rows, scatter_rows, scatter_rows_
from tokencache_kernels.testing import randn, random_indices

OPS = ("gather_rows", "scatter_rows_")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [
    pytest.param(2, 37, 11, 72, id="odd-sizes"),
    pytest.param(1, 256, 64, 128, id="round-sizes"),
    pytest.param(3, 5, 5, 7, id="all-tokens"),
    pytest.param(2, 16, 0, 8, id="no-slot"),
    pytest.param(1, 3, 1, 1, id="one-channel"),
    pytest.param(0, 4, 2, 8, id="no-sample"),
]


def take(hidden_states, indices):
    """The meaning, written as loops."""
    out = torch.zeros(*indices.shape, hidden_states.shape[2], dtype=hidden_states.dtype)
    for b, row in enumerate(indices.tolist()):
        for s, token in enumerate(row):
            if 0 <= token < hidden_states.shape[1]:
                out[b, s] = hidden_states[b, token]
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "S", "D"), SHAPES)
def test_gather_takes_the_rows_bit_for_bit(backend, device, B, N, S, D, dtype):
    hidden_states = randn(B, N, D, dtype=dtype)
    indices = random_indices(B, N, S, num_empty=min(S, 1))

    out = gather_rows(hidden_states.to(device), indices.to(device), backend=backend)

    torch.testing.assert_close(out.cpu(), take(hidden_states, indices), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("B", "N", "S", "D"), SHAPES)
def test_scatter_writes_the_selected_rows_and_no_other(backend, device, B, N, S, D, dtype):
    cache = randn(B, N, D, dtype=dtype)
    rows = randn(B, S, D, dtype=dtype, seed=1)
    indices = random_indices(B, N, S, num_empty=min(S, 1))
    wanted = cache.clone()
    for b, row in enumerate(indices.tolist()):
        for s, token in enumerate(row):
            if token >= 0:
                wanted[b, token] = rows[b, s]

    out = cache.to(device)
    returned = scatter_rows_(out, indices.to(device), rows.to(device), backend=backend)

    assert returned is out
    torch.testing.assert_close(out.cpu(), wanted, rtol=0, atol=0)


def test_scatter_of_a_gather_changes_nothing(backend, device):
    hidden_states = randn(2, 37, 24, device=device)
    indices = random_indices(2, 37, 11, device=device)

    rows = gather_rows(hidden_states, indices, backend=backend)
    out = scatter_rows(hidden_states, indices, rows, backend=backend)

    torch.testing.assert_close(out, hidden_states, rtol=0, atol=0)


def test_functional_scatter_leaves_its_input(backend, device):
    cache = randn(1, 9, 8, device=device)
    before = cache.clone()
    rows = randn(1, 4, 8, device=device, seed=1)

    out = scatter_rows(cache, random_indices(1, 9, 4, device=device), rows, backend=backend)

    assert not torch.equal(out, before)
    torch.testing.assert_close(cache, before, rtol=0, atol=0)


def test_a_sliced_tensor_is_read_and_written_in_place(backend, device):
    wide = randn(2, 40, 3, 24, device=device)
    hidden_states = wide[:, 1:38, 1]
    indices = random_indices(2, 60, 22, device=device)[:, ::2].contiguous()
    indices = torch.where(indices < 37, indices, -1)
    before = wide.clone()

    rows = gather_rows(hidden_states, indices, backend=backend)
    scatter_rows_(hidden_states, indices, rows + 1, backend=backend)

    torch.testing.assert_close(
        rows.cpu(), take(before[:, 1:38, 1].cpu(), indices.cpu()), rtol=0, atol=0
    )
    torch.testing.assert_close(
        gather_rows(hidden_states, indices, backend=backend)[indices >= 0],
        (rows + 1)[indices >= 0],
        rtol=0,
        atol=0,
    )
    torch.testing.assert_close(wide[:, :, [0, 2]], before[:, :, [0, 2]], rtol=0, atol=0)


def test_an_index_outside_the_tokens_is_an_empty_slot(backend, device):
    cache = randn(1, 5, 8, device=device)
    before = cache.clone()
    wild = torch.tensor([[-7, 5, 2**31 - 1, -(2**31)]], dtype=torch.int32, device=device)

    rows = gather_rows(cache, wild, backend=backend)
    scatter_rows_(cache, wild, randn(1, 4, 8, device=device), backend=backend)

    assert rows.abs().max() == 0
    torch.testing.assert_close(cache, before, rtol=0, atol=0)
