"""Selectors: the settings and the one call that select the tokens to recompute."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from .. import ops
from ..errors import fail
from .decisions import Site, Step

BaseScore = Literal[
    "attention_received", "attention_entropy", "value_norm", "key_norm", "predicted", "none"
]
BASE_SCORES: tuple[BaseScore, ...] = (
    "attention_received", "attention_entropy", "value_norm", "key_norm", "predicted", "none",
)  # fmt: skip
Grid = tuple[int, int]


class Selector(Protocol):
    """Chooses the fresh tokens of L sites at once.

    Shapes: ``scores`` and ``staleness`` (L, B, N), ``num_fresh`` (L,) int32 on the device. Results:
    ascending ``indices`` (L, B, S) and ``positions`` (L, B, N). ``staleness`` is updated in place.
    """

    @property
    def base_score(self) -> BaseScore:
        """The statistic that a full step takes for the selector."""

    @property
    def is_timeless(self) -> bool:
        """Tell whether its launches are the same in every step and do not depend on ``step``."""

    @property
    def draws_on_host(self) -> bool:
        """Tell whether scores are drawn on the host before a step, by ``draw_scores``."""

    @property
    def shares_guidance(self) -> bool:
        """Tell whether both halves of a batch, conditional and not, get one selection."""

    def draw_scores(self, sites: Sequence[Site], step: Step, staleness: Tensor) -> Tensor:
        """Scores of the shape of ``staleness``; called only if ``draws_on_host``."""

    def select_(
        self,
        scores: Tensor | None,
        staleness: Tensor,
        num_fresh: Tensor | None,
        max_fresh: int,
        *,
        sites: Sequence[Site],
        step: Step,
        grid: Grid | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Choose the fresh tokens of one partial step."""


@dataclass(frozen=True)
class ScoreSelector:
    """The tokens that matter most, or that have waited longest (ToCa, arXiv:2410.05317).

    ``score = normalized(base) + staleness_weight * staleness``, and on a grid the best token of
    every ``tile x tile`` square gains the factor ``1 + bonus``. The base is the attention that a
    token receives, ``1 +`` the entropy of its cross-attention, ``1 -`` the norm of its value
    (DuCa) or of its key, the score of the policy's predictor (TokenCache), or nothing.

    ``takes_largest``: the base is the norm of value or key itself, so that the largest come first.

    ``shares_guidance`` gives both halves of the batch (conditional and not) one selection: entropy
    is then that of the two maps' mean, ``log 2 +`` the mean of theirs since they share no key.
    """

    base_score: BaseScore = "attention_received"
    staleness_weight: float = 0.0
    normalize: bool = True
    tile: int = 2
    bonus: float = 0.0
    shares_guidance: bool = False
    takes_largest: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.takes_largest and self.base_score not in ("value_norm", "key_norm"):
            wanted = "be False for a score that is no norm"
            fail(name, "takes_largest", wanted, f"True for {self.base_score!r}")
        if self.base_score not in BASE_SCORES:
            fail(name, "base_score", f"be one of {', '.join(BASE_SCORES)}", repr(self.base_score))
        if self.tile < 1:
            fail(name, "tile", "be at least 1", self.tile)
        for field in ("staleness_weight", "bonus"):
            value = getattr(self, field)
            if not 0 <= value < math.inf:
                fail(name, field, "be finite and not negative", value)

    def select_(
        self,
        scores: Tensor | None,
        staleness: Tensor,
        num_fresh: Tensor | None,
        max_fresh: int,
        *,
        sites: Sequence[Site],
        step: Step,
        grid: Grid | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Choose the fresh tokens of one partial step; see ``Selector``."""
        return ops.select_tokens_(
            self._base(scores, staleness), staleness, max_fresh, num_fresh=num_fresh,
            staleness_weight=self.staleness_weight, normalize=self.normalize,
            grid=self._grid(grid), tile=self.tile, bonus=self.bonus, backend=backend,
        )  # fmt: skip

    @property
    def is_timeless(self) -> bool:
        """Tell whether the launches are the same in every step, as a predictor's are not."""
        return self.base_score != "predicted"

    @property
    def draws_on_host(self) -> bool:
        """False: scores come from the model or from a predictor."""
        return False

    def draw_scores(self, sites: Sequence[Site], step: Step, staleness: Tensor) -> Tensor:
        """Never called; see ``draws_on_host``."""
        raise NotImplementedError

    def _base(self, scores: Tensor | None, staleness: Tensor) -> Tensor:
        if self.base_score == "none":
            return torch.zeros_like(staleness, dtype=torch.float32)
        if scores is None:
            fail(type(self).__name__, "scores", f"hold the {self.base_score}", None)
        if self.takes_largest:
            scores = 1 - scores
        if self.shares_guidance:
            halves = _halve(type(self).__name__, scores)
            means = halves.mean(dim=-3, keepdim=True).expand_as(halves)
            offset = 1 + math.log(2) if self.base_score == "attention_entropy" else 0
            return (means + offset).reshape(scores.shape)
        return scores + 1 if self.base_score == "attention_entropy" else scores

    def _grid(self, grid: Grid | None) -> Grid | None:
        if self.bonus == 0:
            return None
        if grid is None:
            fail(type(self).__name__, "grid", "be given for a spatial bonus", None)
        return grid


# how tokens are chosen by scores that were drawn before
DRAWN = ScoreSelector("predicted", normalize=False)


class _DrawnSelector:
    """A selection by scores that are made before a step, from no statistic."""

    @property
    def base_score(self) -> BaseScore:
        """No statistic is needed."""
        return "none"

    @property
    def is_timeless(self) -> bool:
        """True: the lists are drawn before a step."""
        return True

    @property
    def draws_on_host(self) -> bool:
        """True; see ``draw_scores``."""
        return True

    def select_(
        self,
        scores: Tensor | None,
        staleness: Tensor,
        num_fresh: Tensor | None,
        max_fresh: int,
        *,
        sites: Sequence[Site],
        step: Step,
        grid: Grid | None = None,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        """Draw the fresh tokens of one partial step; see ``Selector``."""
        drawn = self.draw_scores(sites, step, staleness)
        return DRAWN.select_(
            drawn, staleness, num_fresh, max_fresh, sites=sites, step=step, backend=backend
        )

    def draw_scores(self, sites: Sequence[Site], step: Step, staleness: Tensor) -> Tensor:
        """Make the scores of a step, in the shape of ``staleness``."""
        raise NotImplementedError


@dataclass(frozen=True)
class RandomSelector(_DrawnSelector):
    """Tokens drawn at random, anew for every site and step, whatever the features are.

    The lists depend on the seed, the site, the step and the sample's place in the batch alone. They
    are drawn on the host, hence equal on all devices, and nothing waits for the device.
    ``shares_guidance`` gives both halves of the batch (conditional and not) the same lists.
    """

    seed: int = 0
    shares_guidance: bool = True

    def draw_scores(self, sites: Sequence[Site], step: Step, staleness: Tensor) -> Tensor:
        """Uniform scores of the shape of ``staleness``, on its device."""
        drawn = torch.empty(staleness.shape)
        rows = _halve(type(self).__name__, drawn) if self.shares_guidance else drawn[:, None]
        for site, site_rows in zip(sites, rows, strict=True):
            # not Python's hash, which is another one in every process
            key = f"{self.seed}/{step.index}/{site.stream}/{site.layer}/{site.module}"
            generator = torch.Generator().manual_seed(zlib.crc32(key.encode()))
            site_rows[:] = torch.rand(site_rows.shape[1:], generator=generator)
        if staleness.device.type == "cuda":
            drawn = drawn.pin_memory()
        return drawn.to(staleness.device, non_blocking=True)


@dataclass(frozen=True, eq=False)
class GivenSelector(_DrawnSelector):
    """Tokens chosen by the caller, such as the region of an edit or some frames of a video.

    The policy's router still says how many tokens are fresh: those of the mask come first, by their
    places, and then the others, by theirs. A share of ``mask.float().mean()`` takes the mask alone.

    Attributes:
        mask: (M,) or (B, M) bool, the image's tokens that shall be fresh.
        is_text_first: whether a joined sequence of N > M tokens begins with the text's, so that
            the mask belongs to its last M tokens; otherwise it belongs to the first. A shorter
            sequence is a text's, and is taken in order.
    """

    mask: Tensor
    is_text_first: bool = True

    def __post_init__(self) -> None:
        if self.mask.dtype != torch.bool or self.mask.dim() not in (1, 2):
            got = f"{self.mask.dtype} of shape {tuple(self.mask.shape)}"
            fail(type(self).__name__, "mask", "be bool of shape (M,) or (B, M)", got)

    @property
    def shares_guidance(self) -> bool:
        """False: the mask says which samples have which tokens."""
        return False

    def draw_scores(self, sites: Sequence[Site], step: Step, staleness: Tensor) -> Tensor:
        """Score the mask's tokens 1 and the others 0, in the shape of ``staleness``."""
        B, N = staleness.shape[1:]
        M = self.mask.shape[-1]
        if self.mask.dim() == 2 and len(self.mask) != B:
            fail(type(self).__name__, "mask", f"have {B} rows, as the batch", len(self.mask))
        scores = torch.zeros(staleness.shape, device=staleness.device)
        if N >= M:
            rows = scores[..., N - M :] if self.is_text_first else scores[..., :M]
            rows.copy_(self.mask.expand(rows.shape))
        return scores


def _halve(owner: str, scores: Tensor) -> Tensor:
    """View (L, B, N) as (L, 2, B / 2, N)."""
    L, B, N = scores.shape
    if B % 2:
        fail(owner, "shares_guidance", "be False for an odd batch", f"{B} samples")
    return scores.reshape(L, 2, B // 2, N)
