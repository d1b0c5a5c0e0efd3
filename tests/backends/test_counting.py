"""Counts of kernel launches of each op on Triton: fusion that must not come undone."""

import pytest
import torch

from tokencache_kernels import backends, ops
from tokencache_kernels.testing import distinct_scores, randn, random_indices


@pytest.fixture
def launches_of(device):
    """Run a function on the Triton backend and name the kernels that it launched."""
    reason = backends.unavailable("triton", "row_pass", torch.device(device), torch.float32)
    if reason is not None:
        pytest.skip(reason)
    from tokencache_kernels.testing.counting import count_launches

    def count(function):
        with count_launches() as launches:
            function()
        return launches

    return count


def test_a_row_pass_is_one_launch(device, launches_of):
    x, shift = randn(2, 9, 16, device=device), randn(2, 16, device=device)
    indices = random_indices(2, 9, 3, device=device, num_empty=1)
    positions = ops.invert_indices(indices, 9, backend="reference")

    launches = launches_of(
        lambda: ops.row_pass_(
            x, [x + 1, x - 1, x * 2], [shift, None, shift], indices, shift, shift,
            positions=positions, backend="triton",
        )
    )  # fmt: skip

    assert launches == ["_row_pass_kernel"]


def test_eight_branches_are_one_launch_and_nine_are_two(device, launches_of):
    x = randn(1, 5, 16, device=device)

    def add(count):
        return launches_of(
            lambda: ops.add_branches(x, [x] * count, [None] * count, backend="triton")
        )

    assert add(8) == ["_add_branches_kernel"]
    assert add(9) == ["_add_branches_kernel"] * 2


def test_a_long_run_of_branches_is_added_before_the_row_pass(device, launches_of):
    x, shift = randn(1, 5, 16, device=device), randn(1, 16, device=device)
    indices = random_indices(1, 5, 2, device=device)
    positions = ops.invert_indices(indices, 5, backend="reference")

    launches = launches_of(
        lambda: ops.row_pass(
            x, [x] * 12, [None] * 12, indices, shift, shift, positions=positions, backend="triton"
        )
    )

    assert launches == ["_add_branches_kernel", "_row_pass_kernel"]


def test_a_cycle_of_selections_is_one_launch(device, launches_of):
    scores = distinct_scores(2, 3, 20, device=device)
    staleness = torch.zeros(2, 3, 20, dtype=torch.int32, device=device)
    num_fresh = torch.full((2, 2), 5, dtype=torch.int32, device=device)

    launches = launches_of(
        lambda: ops.select_cycle_(
            scores, staleness, num_fresh, 5, grid=(4, 5), bonus=0.4, backend="triton"
        )
    )

    assert launches == ["_select_tokens_kernel"]


def test_nothing_is_counted_after_the_block(device, launches_of):
    indices = random_indices(1, 9, 3, device=device)

    launches = launches_of(lambda: ops.invert_indices(indices, 9, backend="triton"))
    ops.invert_indices(indices, 9, backend="triton")

    assert launches == ["_invert_indices_kernel"]


def test_a_blend_is_one_launch_each_way(device, launches_of):
    cached = randn(2, 9, 16, device=device, seed=1).requires_grad_()
    fresh = randn(2, 9, 16, device=device).requires_grad_()
    weight = torch.tensor(0.3, device=device).requires_grad_()

    launches = launches_of(
        lambda: ops.blend(cached, fresh, weight, backend="triton").sum().backward()
    )

    assert launches == ["_blend_kernel", "_blend_backward_kernel"]


def test_attention_received_is_one_launch_with_the_log_sum_exp_and_two_without(device, launches_of):
    query, key = randn(2, 5, 2, 8, device=device), randn(2, 9, 2, 8, device=device)
    lse = ops.attention(query, key, key, backend="reference")[1]

    def receive(lse):
        return launches_of(lambda: ops.attention_received(query, key, lse=lse, backend="triton"))

    assert receive(lse) == ["_attention_received_kernel"]
    assert receive(None) == ["_log_sum_exp_kernel", "_attention_received_kernel"]


def test_the_entropy_of_a_prompt_is_one_launch_and_of_an_image_two(device, launches_of):
    def count(num_keys):
        query, key = (
            randn(1, length, 2, 8, dtype=torch.bfloat16, device=device) for length in (5, num_keys)
        )
        return launches_of(lambda: ops.attention_entropy(query, key, backend="triton"))

    assert count(120) == ["_attention_entropy_kernel"]
    assert count(140) == ["_log_sum_exp_kernel", "_attention_entropy_kernel"]


@pytest.mark.parametrize("metric", ["cosine", "relative_l1"])
def test_norms_and_changes_are_one_launch_each(device, launches_of, metric):
    x = randn(2, 9, 2, 8, device=device)

    launches = launches_of(lambda: ops.head_norms(x, backend="triton"))
    launches += launches_of(
        lambda: ops.token_change(x[:, :, 0], x[:, :, 1], metric=metric, backend="triton")
    )

    assert launches == ["_head_norms_kernel", "_token_change_kernel"]
