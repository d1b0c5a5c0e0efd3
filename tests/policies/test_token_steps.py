"""Shares of tokens by step."""

import pytest

from tokencache_kernels.policies import TokenSteps, hsa, jit


def test_the_stages_of_jit_cost_about_what_is_published():
    # 706 and 423 of the 2991 TFLOPs of 50 steps; attention makes the shares cost less
    assert 18 / 50 / jit(18).flops_ratio == pytest.approx(706 / 2991, rel=0.02)
    assert 11 / 50 / jit(11).flops_ratio == pytest.approx(423 / 2991, rel=0.04)
    assert sorted(jit(18).shares) == list(jit(18).shares)


def test_budgets_are_nested_and_every_part_keeps_its_period():
    policy = hsa(10)

    third = pytest.approx(1 / 3)
    assert policy.shares == (1.0, 1.0, third, pytest.approx(2 / 3), third, 1.0, third,
                             pytest.approx(2 / 3), third, 1.0)  # fmt: skip
    assert [policy.count(index, 16) for index in (2, 3, 5)] == [5, 11, 16]
    assert TokenSteps((1.0, 1.0, 0.001)).count(2, 16) == 1


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: TokenSteps(()), r"shares must be in \(0, 1\], at least one"),
        (lambda: TokenSteps((1.0, 1.0, 0.0)), r"shares must be in \(0, 1\]"),
        (lambda: TokenSteps((1.0, 0.5)), "shares must begin with 1, 1 for a ranking by change"),
        (lambda: TokenSteps((0.5, 1.0), "variance"), "begin with 1 where values of an earlier"),
        (lambda: TokenSteps((1.0,), "random"), "ranking must be 'change' or 'variance'"),
        (lambda: TokenSteps((1.0,), fill="zero"), "fill must be 'reuse' or 'interpolate'"),
        (lambda: jit(2), "num_inference_steps must be at least 3, the number of stages, got 2"),
        (lambda: hsa(9, (1, 3, 4)), "periods must ascend from 1, each a multiple"),
        (lambda: hsa(9, warmup=1), "warmup must be at least 2, got 1"),
    ],
)
def test_what_cannot_be_is_refused(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()
