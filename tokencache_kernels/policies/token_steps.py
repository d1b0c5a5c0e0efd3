"""Policies at the sampler's level: in each step some tokens go through the whole model."""

import itertools
from dataclasses import dataclass
from typing import Literal

from ..errors import fail


@dataclass(frozen=True)
class TokenSteps:
    """The share of the image's tokens that the model is given in each step.

    The others are not seen by any block. Their velocity (the model's output) is carried. In a step
    with share 1 the model runs as it is. All samples of a batch have the same tokens.

    Attributes:
        shares: by step, in (0, 1].
        ranking: which tokens come first. ``change``: those whose velocity changed most between the
            last two steps with share 1. ``variance``: an even spread first; where a stage takes in
            more, those around which the velocity varies most.
        fill: the velocity of the others: ``reuse`` of their last one, or ``interpolate``: the one
            that leads to a clean picture interpolated from the four nearest tokens that were
            computed, weighted by the inverse squared distance.
        keeps_keys: whether the tokens attend also to the others, by their last keys and values, or
            to each other alone.
        name: the policy's name in reports.

    Raises:
        ValueError: a share is out of range; or reuse, kept keys or a ranking by change has no
            step with share 1 to start from.
    """

    shares: tuple[float, ...]
    ranking: Literal["change", "variance"] = "change"
    fill: Literal["reuse", "interpolate"] = "reuse"
    keeps_keys: bool = True
    name: str = "token-steps"

    def __post_init__(self) -> None:
        name = type(self).__name__
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            fail(name, "shares", "be in (0, 1], at least one", self.shares)
        if self.ranking not in ("change", "variance"):
            fail(name, "ranking", "be 'change' or 'variance'", repr(self.ranking))
        if self.fill not in ("reuse", "interpolate"):
            fail(name, "fill", "be 'reuse' or 'interpolate'", repr(self.fill))
        if self.shares[0] < 1 and (self.keeps_keys or self.fill == "reuse"):
            wanted = "begin with 1 where values of an earlier step are used"
            fail(name, "shares", wanted, self.shares[0])
        if self.ranking == "change":
            partial = [index for index, share in enumerate(self.shares) if share < 1]
            if partial and partial[0] < 2:
                fail(name, "shares", "begin with 1, 1 for a ranking by change", self.shares[:2])

    @property
    def num_inference_steps(self) -> int:
        """The number of the sampler's steps."""
        return len(self.shares)

    @property
    def flops_ratio(self) -> float:
        """Steps by the sum of the shares; attention among fewer tokens costs less than that."""
        return len(self.shares) / sum(self.shares)

    def count(self, index: int, num_tokens: int) -> int:
        """Count the tokens of step ``index``, at least one."""
        return max(1, round(self.shares[index] * num_tokens))


def jit(num_inference_steps: int, shares: tuple[float, ...] = (0.35, 0.62, 1.0)) -> TokenSteps:
    """Build JiT's stages: few tokens at first, more by the local variance of the velocity.

    Tokens that wait are led to the interpolated clean picture and keep their own noise, so that
    they have the sampler's noise level when they are taken in. The paper moves their latents at
    that point instead (its micro-flow).

    Args:
        num_inference_steps: the sampler's steps; the published settings take 18 and 11.
        shares: of the stages, which are equally long.

    Source:
        Just-in-Time (arXiv:2603.10744).
    """
    if num_inference_steps < len(shares):
        wanted = f"be at least {len(shares)}, the number of stages"
        fail("jit", "num_inference_steps", wanted, num_inference_steps)
    stages = [
        shares[index * len(shares) // num_inference_steps] for index in range(num_inference_steps)
    ]
    return TokenSteps(tuple(stages), "variance", "interpolate", keeps_keys=False, name="jit")


def hsa(
    num_inference_steps: int, periods: tuple[int, ...] = (1, 2, 4), warmup: int = 2
) -> TokenSteps:
    """Build HSA's budgets: fast tokens take every step, slow ones every second or fourth.

    Tokens are ranked by the change of their velocity and cut in as many equal parts as there are
    ``periods``. The paper's own budgets are not in its abstract; these are a reading of it.

    Args:
        num_inference_steps: the sampler's steps.
        periods: of the parts, ascending, each a multiple of the one before; the first is 1.
        warmup: the steps at the start that take all tokens, at least 2.

    Source:
        Heterogeneous Step Allocation (arXiv:2605.06892).
    """
    pairs = itertools.pairwise(periods)
    if not periods or periods[0] != 1 or any(b <= a or b % a for a, b in pairs):
        fail("hsa", "periods", "ascend from 1, each a multiple of the one before", periods)
    if warmup < 2:
        fail("hsa", "warmup", "be at least 2", warmup)
    shares = [
        1.0
        if index < warmup
        else sum((index - warmup + 1) % period == 0 for period in periods) / len(periods)
        for index in range(num_inference_steps)
    ]
    return TokenSteps(tuple(shares), "change", "reuse", keeps_keys=True, name="hsa")
