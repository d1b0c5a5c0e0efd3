import pytest
import torch

from tokencache_kernels.demo.verdicts import (
    Point,
    compare_families,
    describe_mean,
    describe_share,
    judge,
)

NOISE = torch.linspace(-1, 1, 50)
# differs from seed to seed, but alike for all methods
SEEDS = 10 * torch.cos(torch.arange(50.0))


def point(family, flops_ratio, psnr, speedup=1.5, spread=0.0):
    return Point(family, flops_ratio, speedup, psnr + SEEDS + spread * NOISE)


def test_a_point_is_judged_against_the_line_between_two():
    points = [point("toca", 2.0, 33.0), point("fora", 1.0, 40.0), point("fora", 4.0, 20.0)]

    gain, interval = compare_families(points, "toca", "fora", "flops_ratio")

    # 2 is half way from 1 to 4 in the logarithm
    assert gain == pytest.approx(3.0, abs=1e-4)
    assert interval == pytest.approx(0.0, abs=1e-4)
    other, _ = compare_families(points, "fora", "toca", "flops_ratio")
    assert other == pytest.approx(-gain, abs=1e-4)


def test_points_without_a_match_say_nothing():
    points = [point("toca", 5.0, 33.0), point("fora", 1.0, 40.0), point("fora", 4.0, 20.0)]

    assert compare_families(points, "toca", "fora", "flops_ratio") is None
    # the same measured time
    assert compare_families(points, "toca", "fora", "speedup") is not None


def test_the_interval_is_that_of_the_difference():
    points = [point("toca", 2.0, 30.0, spread=4.0), point("random", 2.0, 30.0, spread=1.0)]

    gain, interval = compare_families(points, "toca", "random", "flops_ratio")

    assert gain == pytest.approx(0.0, abs=1e-4)
    assert interval == pytest.approx(describe_mean(3 * NOISE)[1], rel=1e-4)


@pytest.mark.parametrize(("right", "bound"), [(10, 0.7225), (0, 0.2775), (5, 0.2366), (8, 0.4902)])
def test_the_interval_of_a_share_reaches_the_farther_bound_of_wilsons(right, bound):
    share, interval = describe_share(torch.arange(10) < right)

    assert share == right / 10
    assert interval == pytest.approx(abs(share - bound), abs=1e-4)


@pytest.mark.parametrize(
    ("psnr", "spread", "words"),
    [
        (33.0, 1.0, "at equal arithmetic yes, by 3.0 ± 0.2 dB"),
        (28.0, 1.0, "at equal arithmetic no, it is 2.0 ± 0.2 dB worse"),
        (30.1, 4.0, "at equal arithmetic no difference is seen (+0.1 ± 0.7 dB)"),
    ],
)
def test_a_claim_is_answered_in_words(psnr, spread, words):
    points = [point("toca", 2.0, psnr, spread=spread), point("random", 2.0, 30.0, speedup=1.2)]

    (sentence,) = judge(points)

    assert sentence.startswith("Importance beats chance (ToCa, random tokens): " + words)
    assert sentence.endswith(
        "in equal measured time nothing can be said, no two points cost the same."
    )


def test_families_that_were_not_drawn_are_not_judged():
    assert judge([point("toca", 2.0, 30.0), point("l2c", 2.0, 30.0)]) == []
