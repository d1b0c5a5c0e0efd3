"""The papers' claims, judged at equal cost by the figures of a comparison."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# the half-width of a normal distribution's 95 % interval
NUM_SIGMAS = 1.96
COSTS = {"flops_ratio": "at equal arithmetic", "speedup": "in equal measured time"}


@dataclass(frozen=True)
class Point:
    """One method: its savings, and the PSNR of each of its digits to the dense one.

    Attributes:
        family: the kind of method.
        flops_ratio: how many times fewer FLOPs than the dense model.
        speedup: how many times less time, as measured.
        psnr: in dB, (samples,), in the order of the seeds.
    """

    family: str
    flops_ratio: float
    speedup: float
    psnr: Tensor


@dataclass(frozen=True)
class Claim:
    """One family is said to beat another."""

    sentence: str
    better: str
    worse: str


CLAIMS = (
    Claim("Caching tokens beats caching layers (ToCa, FORA)", "toca", "fora"),
    Claim("Caching tokens beats caching layers (TokenCache, L2C)", "tokencache", "l2c"),
    Claim("A learned schedule beats a uniform one (L2C)", "l2c", "uniform"),
    Claim("Importance beats chance (ToCa, random tokens)", "toca", "random"),
    Claim("Forecasting beats reusing (TaylorSeer 1, FORA)", "taylor1", "fora"),
    Claim("Forecasting beats reusing (ToCa with order 1, ToCa)", "toca1", "toca"),
    Claim("Where both forecast, caching tokens beats caching layers", "toca1", "taylor1"),
    Claim("ToCa beats fewer steps", "toca", "fewer"),
    Claim("TokenCache beats fewer steps", "tokencache", "fewer"),
    Claim("Learning-to-Cache beats fewer steps", "l2c", "fewer"),
    Claim("DuCa beats fewer steps", "duca", "fewer"),
    Claim("TaylorSeer 1 beats fewer steps", "taylor1", "fewer"),
    Claim("FORA beats fewer steps", "fora", "fewer"),
)


def judge(points: Sequence[Point]) -> list[str]:
    """One sentence for every claim that the points can say something about."""
    sentences = []
    families = {point.family for point in points}
    for claim in CLAIMS:
        if {claim.better, claim.worse} <= families:
            parts = [
                f"{where} {_describe(compare_families(points, claim.better, claim.worse, cost))}"
                for cost, where in COSTS.items()
            ]
            sentences.append(f"{claim.sentence}: {'; '.join(parts)}.")
    return sentences


def compare_families(
    points: Sequence[Point], better: str, worse: str, cost: str
) -> tuple[float, float] | None:
    """By how many dB one family is nearer to dense than another of the same cost, and +- 95 %.

    The nearness of a family between its points is interpolated over the logarithm of the cost,
    seed by seed, so that the seeds' own differences cancel. None: no point of one lies within the
    other's costs.
    """
    curves = [
        sorted((p for p in points if p.family == family), key=lambda p: getattr(p, cost))
        for family in (better, worse)
    ]
    gains = []
    for own, other, sign in ((curves[0], curves[1], 1), (curves[1], curves[0], -1)):
        for point in own:
            met = _interpolate(other, getattr(point, cost), cost)
            if met is not None:
                gains.append(sign * (point.psnr - met))
    if not gains:
        return None
    return describe_mean(torch.stack(gains).mean(dim=0))


def describe_mean(values: Tensor) -> tuple[float, float]:
    """The mean over the seeds, and the half-width of its 95 % interval."""
    values = values.double()
    return values.mean().item(), NUM_SIGMAS * values.std().item() / math.sqrt(len(values))


def describe_share(hits: Tensor) -> tuple[float, float]:
    """The share of true values, and how far Wilson's 95 % interval reaches from it at most.

    Unlike a mean's, it is not nothing where all values are alike.
    """
    share = hits.double().mean().item()
    room = NUM_SIGMAS**2 / len(hits)
    centre = (share + room / 2) / (1 + room)
    half = math.sqrt(share * (1 - share) * room + room**2 / 4) / (1 + room)
    return share, abs(centre - share) + half


def _interpolate(curve: Sequence[Point], wanted: float, cost: str) -> Tensor | None:
    for point in curve:
        if getattr(point, cost) == wanted:
            return point.psnr
    for low, high in pairwise(curve):
        left, right = (math.log(getattr(point, cost)) for point in (low, high))
        if left < math.log(wanted) < right:
            share = (math.log(wanted) - left) / (right - left)
            return low.psnr + share * (high.psnr - low.psnr)
    return None


def _describe(gain: tuple[float, float] | None) -> str:
    if gain is None:
        return "nothing can be said, no two points cost the same"
    mean, interval = gain
    size = f"{abs(mean):.1f} ± {interval:.1f} dB"
    if abs(mean) <= interval:
        return f"no difference is seen ({mean:+.1f} ± {interval:.1f} dB)"
    return f"yes, by {size}" if mean > 0 else f"no, it is {size} worse"
