"""Schedules: the steps that compute and store everything, and those that use the cache."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

from ..errors import fail
from .decisions import Site, Step, round_float32

# inside the dense window of the published DiT schedule, every second step is full
DENSE_INTERVAL = 2


class Schedule(Protocol):
    """Says at which steps a site is computed in full; the first step always is."""

    def is_full(self, site: Site, step: Step) -> bool:
        """Tell whether ``site`` computes every token in ``step``."""


class CyclicSchedule(Schedule, Protocol):
    """A schedule that also says where in a cycle a step lies."""

    def place(self, step: Step) -> int:
        """The remainder by the cycle's length of the step, as the published code counts it.

        0 where the first block is full, or would be but for a longer cycle of its own.
        """


@dataclass(frozen=True)
class IntervalSchedule:
    """Full in the first ``warmup`` steps, then in every ``refresh_interval``-th.

    A step is full if ``index < warmup`` or ``(index - phase) % interval == 0``, where ``interval =
    refresh_interval * module_multiple[module]``. FORA is the default; ToCa on FLUX has warmup 3 and
    phase 2, ToCa on OpenSora warmup 3 and twice the interval for cross-attention.
    """

    refresh_interval: int
    warmup: int = 1
    phase: int = 0
    module_multiple: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.refresh_interval < 1:
            fail(name, "refresh_interval", "be at least 1", self.refresh_interval)
        if self.warmup < 1:
            fail(name, "warmup", "be at least 1", self.warmup)
        if min(self.module_multiple.values(), default=1) < 1:
            fail(name, "module_multiple", "be at least 1", dict(self.module_multiple))

    def is_full(self, site: Site, step: Step) -> bool:
        """Tell whether ``site`` computes every token in ``step``."""
        interval = self.refresh_interval * self.module_multiple.get(site.module, 1)
        return step.index < self.warmup or (step.index - self.phase) % interval == 0

    def place(self, step: Step) -> int:
        """``(index - phase) % refresh_interval``."""
        return (step.index - self.phase) % self.refresh_interval


@dataclass(frozen=True)
class AdaptiveSchedule:
    """Full in every ``tau``-th step, where ``tau`` shrinks as the image takes shape.

    With ``s`` the step as the published code counts it, a step is full if it is the first or ``s %
    tau == 0``. ``tau`` starts at ``refresh_interval`` and becomes ``round(refresh_interval / (1 +
    slope * (1 - 2 * s / total)))`` at every full step, or 2 while ``s`` is inside
    ``dense_window``, given as shares of ``total``.

    Published ToCa asks again in every block, after block 0 may have changed ``tau``: a step can
    then be full in block 0 only. ``mixed_steps`` reproduces that; by default block 0 speaks for
    all.
    """

    refresh_interval: int
    slope: float
    counts_down: bool
    dense_window: tuple[float, float] | None = None
    mixed_steps: bool = False

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.refresh_interval < 1:
            fail(name, "refresh_interval", "be at least 1", self.refresh_interval)
        if not -1 < self.slope < 1:
            fail(name, "slope", "be in (-1, 1)", self.slope)
        window = self.dense_window
        if window is not None and not 0 <= window[0] <= window[1] <= 1:
            fail(name, "dense_window", "be two rising shares in [0, 1]", window)

    def is_full(self, site: Site, step: Step) -> bool:
        """Tell whether ``site`` computes every token in ``step``."""
        in_first_block, in_other_blocks, _ = _full_steps(self, step.total)[step.index]
        return in_other_blocks if self.mixed_steps and site.layer > 0 else in_first_block

    def place(self, step: Step) -> int:
        """``s % tau``, and 0 in the first step."""
        return _full_steps(self, step.total)[step.index][2]


@dataclass(frozen=True)
class StepSchedule:
    """The full steps by name, for one number of steps: nothing is rescaled or rounded.

    Attributes:
        steps: ascending, without repetition, from 0.
        total: the sampler's number of steps.
    """

    steps: tuple[int, ...]
    total: int

    def __post_init__(self) -> None:
        check_full_steps(type(self).__name__, self.steps, self.total)

    @classmethod
    def even(cls, num_full: int, total: int) -> "StepSchedule":
        """Spread ``num_full`` full steps evenly from the first step to the last, both full.

        Args:
            num_full: in [2, total], or 1, which is the first step alone.
            total: the sampler's number of steps.
        """
        if not 1 <= num_full <= total:
            fail(cls.__name__, "num_full", f"be in [1, {total}]", num_full)
        gaps = max(num_full - 1, 1)
        return cls(tuple(round(place * (total - 1) / gaps) for place in range(num_full)), total)

    def is_full(self, site: Site, step: Step) -> bool:
        """Tell whether ``site`` computes every token in ``step``."""
        return self._index(step) in self.steps

    def place(self, step: Step) -> int:
        """Count the steps since the last full one."""
        index = self._index(step)
        return index - max(full for full in self.steps if full <= index)

    def _index(self, step: Step) -> int:
        if step.total != self.total:
            fail(type(self).__name__, "total", f"be {step.total}, the sampler's", self.total)
        return step.index


def check_full_steps(owner: str, steps: Sequence[int], total: int) -> None:
    """Refuse a set of full steps that is no set, leaves the first step out, or does not fit."""
    if not steps or steps[0] != 0 or list(steps) != sorted(set(steps)):
        fail(owner, "steps", "ascend from 0 without repetition", tuple(steps))
    if steps[-1] >= total:
        fail(owner, "steps", f"be below total = {total}", tuple(steps))


@dataclass(frozen=True)
class LastStepFull:
    """Another schedule, whose last step is full, too.

    Published schedules leave the last step stale wherever their cycle happens to end.
    """

    schedule: Schedule

    def is_full(self, site: Site, step: Step) -> bool:
        """Tell whether ``site`` computes every token in ``step``."""
        return step.index == step.total - 1 or self.schedule.is_full(site, step)

    def place(self, step: Step) -> int:
        """The place in the cycle; the last step is the first of one."""
        cyclic: Any = self.schedule
        place: int = 0 if step.index == step.total - 1 else cyclic.place(step)
        return place


@lru_cache(maxsize=64)
def _full_steps(schedule: AdaptiveSchedule, total: int) -> tuple[tuple[bool, bool, int], ...]:
    """For every step: is block 0 full, are the others if they ask again, and the step's place."""
    tau = schedule.refresh_interval
    steps = []
    for step in (Step(index, total) for index in range(total)):
        s = step.counter(schedule.counts_down)
        place = 0 if step.index == 0 else s % tau
        in_first_block = place == 0
        if in_first_block:
            tau = _next_interval(schedule, s, total)
        in_other_blocks = in_first_block and (step.index == 0 or s % tau == 0)
        steps.append((in_first_block, in_other_blocks, place))
    return tuple(steps)


def _next_interval(schedule: AdaptiveSchedule, s: int, total: int) -> int:
    if schedule.dense_window is not None:
        start, stop = (int(share * total) for share in schedule.dense_window)
        if start <= s < stop:
            return DENSE_INTERVAL
    factor = 1 + schedule.slope * (1 - 2 * s / total)
    # in float32, so that a tie is a tie; Python and PyTorch both round it to even
    return round(round_float32(schedule.refresh_interval / factor))
