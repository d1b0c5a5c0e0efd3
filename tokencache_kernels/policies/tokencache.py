"""TokenCache (arXiv:2409.18523): a trained predictor says which tokens of which blocks matter.

The papers leave much open; ``docs/adr/0023-tokencache.md`` lists the choices.
"""

import math
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from ..errors import fail
from .carriers import REUSE, Carrier
from .decisions import (
    ATTENTION_VARIANTS,
    Action,
    AttentionVariant,
    Decision,
    Site,
    Step,
    count_fresh,
)
from .predictors import Predictor
from .schedules import Schedule
from .selectors import ScoreSelector


@dataclass(frozen=True)
class TwoPhaseSchedule:
    """Two-Phase Round-Robin: a full step, then K cached ones; K is larger in the early phase.

    A step is full if ``(index - start) % (K + 1) == 0``, with ``start = 0`` and ``K =
    early_cached`` before the ``boundary``, and from it on ``start = boundary`` and ``K =
    late_cached``: each phase begins with a full step. ``boundary`` is a share of the steps,
    rounded down to a step.
    """

    early_cached: int = 3
    late_cached: int = 1
    boundary: float = 0.5

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.late_cached < 0:
            fail(name, "late_cached", "be at least 0", self.late_cached)
        if self.early_cached < self.late_cached:
            wanted = f"be at least late_cached = {self.late_cached}"
            fail(name, "early_cached", wanted, self.early_cached)
        if not 0 <= self.boundary <= 1:
            fail(name, "boundary", "be in [0, 1]", self.boundary)

    def is_full(self, site: Site, step: Step) -> bool:
        """Tell whether ``site`` computes every token in ``step``."""
        boundary = count_fresh(self.boundary, step.total)
        if step.index < boundary:
            return step.index % (self.early_cached + 1) == 0
        return (step.index - boundary) % (self.late_cached + 1) == 0 or step.index == 0


@dataclass(frozen=True)
class PercentileSchedule:
    """Full where the cumulative importance of the steps crosses ``num_full`` uniform percentiles.

    With ``c(s)`` the sum of ``importance`` before step ``s``, a step is full if a multiple of
    ``c(total) / num_full`` lies in ``[c(s), c(s + 1))``; so the first always is. A step that holds
    several percentiles is full once: there may be fewer full steps than ``num_full``.
    """

    importance: tuple[float, ...] = field(repr=False)
    num_full: int

    def __post_init__(self) -> None:
        name = type(self).__name__
        for value in self.importance:
            # written so that NaN fails too
            if not 0 < value < math.inf:
                fail(name, "importance", "be finite and above 0 in each step", value)
        if not 1 <= self.num_full <= len(self.importance):
            fail(name, "num_full", f"be in [1, {len(self.importance)}]", self.num_full)

    def is_full(self, site: Site, step: Step) -> bool:
        """Tell whether ``site`` computes every token in ``step``."""
        if step.total != len(self.importance):
            fail(
                type(self).__name__, "importance", f"hold {step.total} steps", len(self.importance)
            )
        return step.index in _percentile_steps(self)


@lru_cache(maxsize=64)
def _percentile_steps(schedule: PercentileSchedule) -> frozenset[int]:
    # exact sums: a rounded one would move a percentile that falls on the edge of a step
    values = [Fraction(value) for value in schedule.importance]
    spacing = sum(values, Fraction(0)) / schedule.num_full
    full, passed, before = set(), -1, Fraction(0)
    for index, value in enumerate(values):
        before += value
        # the last percentile below the sum up to and with this step
        reached = -(-before // spacing) - 1
        if reached > passed:
            full.add(index)
        passed = reached
    return frozenset(full)


def count_fresh_tokens(importance: Tensor, cache_ratio: float, tile: int) -> tuple[int, ...]:
    """Count the tokens that each block of one step computes, from one ratio for all of them.

    Of all L * N values the largest ``(1 - cache_ratio) * L * N`` are marked (ties: the lower block
    first). A block computes as many tokens as it has marks, rounded up to a multiple of
    ``tile`` and at most N, or none without a mark.

    Args:
        importance: (L, N).
        cache_ratio: the share of all tokens that is not marked, in [0, 1].
        tile: the rows of a GEMM tile.
    """
    L, N = importance.shape
    num_marks = count_fresh(1 - cache_ratio, L * N)
    marked = importance.flatten().argsort(descending=True, stable=True)[:num_marks] // N
    marks = torch.bincount(marked, minlength=L).tolist()
    return tuple(min(-(-count // tile) * tile, N) for count in marks)


def choose_blocks(importance: Tensor, share: float) -> tuple[int, ...]:
    """The ``share`` of the blocks whose mean importance is smallest, ascending.

    Args:
        importance: (L, N).
        share: in [0, 1]; ties go to the lower block.
    """
    L = importance.shape[0]
    order = importance.double().mean(dim=1).argsort(stable=True)
    return tuple(sorted(order[: count_fresh(share, L)].tolist()))


@dataclass(frozen=True)
class TokenCacheConfig:
    """Full steps in between, and in every other step the tokens that a predictor finds important.

    In a step that is not full, the ``pruned_share`` of the blocks that matter least are pruned:
    together they compute the top ``1 - cache_ratio`` of their tokens, each as many as calibration
    says (``count_fresh_tokens``) and in each sample the ones with the highest scores, for
    attention and MLP alike. The other blocks compute every token.

    Attributes:
        predictor: trained and calibrated for the model, its token count and its number of steps.
        num_inference_steps: the sampler's steps.
        schedule: which steps are full.
        cache_ratio: the share of the pruned blocks' tokens that is reused, in [0, 1].
        pruned_share: the share of the blocks that is pruned, in [0, 1].
        tile: 16, 32 or 64; a block's number of tokens is rounded up to a multiple of it.
        attention: the keys of fresh queries: all current tokens (``"kv_all"``), cached keys and
            values refreshed at the fresh tokens (``"kv_cache"``), or each other (``"sel_only"``).
        name: how the policy is called in reports.
        carrier: gives features that are not computed their value; they are reused as published.

    Source:
        TokenCache (arXiv:2409.18523), with its second version's predictor and global ratio.
    """

    predictor: Predictor
    num_inference_steps: int
    schedule: Schedule = TwoPhaseSchedule()
    cache_ratio: float = 0.7
    pruned_share: float = 1.0
    tile: int = 16
    attention: AttentionVariant = "kv_all"
    name: str = "tokencache"
    carrier: Carrier = REUSE

    def __post_init__(self) -> None:
        name, predictor = type(self).__name__, self.predictor
        if predictor.num_steps != self.num_inference_steps:
            wanted = f"be trained for {self.num_inference_steps} steps"
            fail(name, "predictor", wanted, f"one for {predictor.num_steps}")
        if not predictor.importance.isfinite().all():
            fail(name, "predictor", "be calibrated", "importance that is not finite")
        for attribute in ("cache_ratio", "pruned_share"):
            if not 0 <= getattr(self, attribute) <= 1:
                fail(name, attribute, "be in [0, 1]", getattr(self, attribute))
        if self.tile not in (16, 32, 64):
            fail(name, "tile", "be 16, 32 or 64", self.tile)
        if self.attention not in ATTENTION_VARIANTS:
            fail(
                name,
                "attention",
                f"be one of {', '.join(ATTENTION_VARIANTS)}",
                repr(self.attention),
            )

    @property
    def num_layers(self) -> int:
        """The blocks of the model that the predictor was trained for."""
        return self.predictor.num_layers

    @property
    def selector(self) -> ScoreSelector:
        """The tokens with the highest scores of the predictor, and nothing else."""
        return ScoreSelector("predicted", normalize=False)

    @cached_property
    def fresh_counts(self) -> tuple[tuple[int, ...], ...]:
        """The number of tokens that each block computes in each step that is not full: (T, L)."""
        return tuple(self._count(importance) for importance in self.predictor.importance.cpu())

    def _count(self, importance: Tensor) -> tuple[int, ...]:
        pruned = choose_blocks(importance, self.pruned_share)
        counts = [self.predictor.num_tokens] * self.predictor.num_layers
        fresh = count_fresh_tokens(importance[list(pruned)], self.cache_ratio, self.tile)
        for layer, count in zip(pruned, fresh, strict=True):
            counts[layer] = count
        return tuple(counts)

    def decide(self, site: Site, step: Step, num_tokens: int) -> Decision:
        """Decide the work at ``site`` in ``step``; ``num_tokens`` is the length of its sequence."""
        name, predictor = type(self).__name__, self.predictor
        if step.total != self.num_inference_steps:
            wanted = f"be trained for {step.total} steps"
            fail(name, "predictor", wanted, f"one for {predictor.num_steps}")
        if num_tokens != predictor.num_tokens:
            wanted = f"be trained for {num_tokens} tokens"
            fail(name, "predictor", wanted, f"one for {predictor.num_tokens}")
        if site.layer >= predictor.num_layers:
            wanted = f"be trained for a model with a block {site.layer}"
            fail(name, "predictor", wanted, f"one for {predictor.num_layers} blocks")
        count = self.fresh_counts[step.index][site.layer]
        if count == num_tokens or self.schedule.is_full(site, step):
            return Decision(Action.FULL, num_tokens)
        return Decision(Action.PARTIAL if count else Action.REUSE, count, self.attention)
