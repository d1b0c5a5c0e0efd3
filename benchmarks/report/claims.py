"""What a device should show, and how the records say whether it does."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .records import (
    Figure,
    Problem,
    Record,
    divide,
    fastest,
    group_cases,
    list_baselines,
    list_ours,
)

Measure = Callable[[Sequence[Record]], Figure | None]


@dataclass(frozen=True)
class Claim:
    """A figure that was aimed at or predicted, to be measured.

    Attributes:
        key: its name, by which explanations are found.
        what: the same for people.
        low: the least that fits, if any.
        high: the most that fits, if any.
        unit: ``x`` for a ratio, ``us``, or ``%`` for a share.
        measure: the figure out of the records of one device.
    """

    key: str
    what: str
    measure: Measure
    low: float | None = None
    high: float | None = None
    unit: str = "x"

    def is_met_by(self, value: float, factor: float = 1.0) -> bool:
        """Whether the value lies within the bounds, or off them by no more than ``factor``."""
        return (self.low is None or value >= self.low / factor) and (
            self.high is None or value <= self.high * factor
        )


def over(problem: Problem, baseline: str = "*") -> Measure:
    """How many times faster ours is than the fastest baseline of that name, at worst."""

    def measure(records: Sequence[Record]) -> Figure | None:
        return _worst(
            divide(fastest(list_baselines(found, baseline)), fastest(list_ours(found)))
            for found in problem.find(records)
        )

    return measure


def between(problem: Problem, slow: str, fast: str) -> Measure:
    """How many times faster the second of two kinds of baselines is, at worst."""

    def measure(records: Sequence[Record]) -> Figure | None:
        return _worst(
            divide(*(fastest(list_baselines(found, name)) for name in (slow, fast)))
            for found in problem.find(records)
        )

    return measure


def share_of_ceiling(problem: Problem) -> Measure:
    """How near ours is to the ceiling, at worst."""

    def measure(records: Sequence[Record]) -> Figure | None:
        ours = (fastest(list_ours(found)) for found in problem.find(records))
        return _worst(r and Figure.of(r["share_of_ceiling"], [r]) for r in ours)

    return measure


def microseconds(problem: Problem, baseline: str | None = None) -> Measure:
    """How long ours takes, or the fastest baseline of that name; the longest such time."""

    def measure(records: Sequence[Record]) -> Figure | None:
        found = problem.find(records)
        best = (
            fastest(list_ours(one) if baseline is None else list_baselines(one, baseline))
            for one in found
        )
        times = [Figure.of(1e3 * r["median_ms"], [r]) for r in best if r is not None]
        return max(times, key=lambda figure: figure.value, default=None)

    return measure


def times_as_long(problem: Problem, baseline: str) -> Measure:
    """How many times as long ours takes as the fastest baseline of that name, at worst."""

    def measure(records: Sequence[Record]) -> Figure | None:
        figures = (
            divide(fastest(list_ours(found)), fastest(list_baselines(found, baseline)))
            for found in problem.find(records)
        )
        return max(filter(None, figures), key=lambda figure: figure.value, default=None)

    return measure


def run_over_dense(shape: str, mode: str = "*") -> Measure:
    """How many times faster ToCa's run is than the fastest dense one in such a mode, at worst."""

    def measure(records: Sequence[Record]) -> Figure | None:
        models = [r for r in records if (r["case"], r["shape"]) == ("model", shape)]
        runs = [r for r in models if r.get("what") == "run"]
        return _worst(
            divide(
                fastest(r for r in list_baselines(case, f"torch/{mode}") if r["policy"] == "dense"),
                fastest(r for r in list_ours(case) if r["policy"] == "toca"),
            )
            for case in group_cases(runs).values()
        )

    return measure


def _worst(figures: Iterable[Figure | None]) -> Figure | None:
    return min(filter(None, figures), key=lambda figure: figure.value, default=None)
