"""Carriers: the value of a token that is not recomputed, out of values stored before.

Every carrier is linear. With ``f_j`` the values stored in the last full steps ``s_0 < ... < s_n``,
it expects ``sum_j w_j f_j``, and the weights depend on the steps alone. They sum to 1: a value that
does not change stays as it is, and so does a token that was computed in between. The cache keeps
differences (``FeatureCache``): ``d_0`` is the newest value and ``d_{i+1} = (d_i - the d_i before) /
gap``, with the gap between the two full steps that made them. ``to_factors`` and ``to_weights``
change between the two forms, so that a carrier may be written in the one that is natural for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, cast

from ..errors import fail


class Carrier(Protocol):
    """A rule that foretells a value from the differences kept of it."""

    @property
    def order(self) -> int:
        """The highest order of differences to keep; 0 keeps the newest value alone."""

    def factors(self, stored: Sequence[int], index: int) -> tuple[float, ...]:
        """Give the factor of every difference that is known, from order 0.

        Args:
            stored: the full steps whose values went into the differences, ascending, at least one.
                The last ``1 + order`` of them count.
            index: the step to foretell, not before the last stored one.

        Returns:
            ``min(len(stored), 1 + order)`` factors, the first of them 1; the value is
            ``sum_i factors[i] * d_i``.
        """


@dataclass(frozen=True)
class Taylor:
    """``d_0 + sum_i d_i * x^i / i!`` with ``x`` the steps since the newest value; 0 is reuse.

    Source:
        TaylorSeer (arXiv:2503.06923).
    """

    order: int

    def __post_init__(self) -> None:
        _check_order(self)

    def factors(self, stored: Sequence[int], index: int) -> tuple[float, ...]:
        """``x^i / i!``; see ``Carrier``."""
        distance = _distance(stored, index)
        known = min(len(stored) - 1, self.order)
        return tuple(distance**i / math.factorial(i) for i in range(known + 1))


@dataclass(frozen=True)
class Newton:
    """The polynomial through the last ``1 + order`` values, exact on uneven full steps, too.

    Taylor's differences of order 2 and above are no derivatives where the gaps differ, and lag half
    a gap where they are equal; this is the interpolation that corrects both.
    """

    order: int

    def __post_init__(self) -> None:
        _check_order(self)

    def factors(self, stored: Sequence[int], index: int) -> tuple[float, ...]:
        """Lagrange's weights as factors of differences; see ``Carrier``."""
        steps = stored[-1 - self.order :]
        _distance(steps, index)
        weights = [
            math.prod((index - other) / (step - other) for other in steps if other != step)
            for step in steps
        ]
        return _keep_constants(to_factors(weights, steps))


@dataclass(frozen=True)
class Hermite:
    """``d_0 + sum_i d_i * h_i(x) / i!`` with the scaled polynomial ``h_i(x) = s^i H_i(s x)``.

    ``H_i`` are the physicists' Hermite polynomials: ``H_1(x) = 2x``, ``H_2(x) = 4x^2 - 2``. A
    ``scale`` below ``1 / sqrt(2)`` foretells less of a change than Taylor at order 1. Differences
    here point forward in time, so ``x`` is positive.

    Source:
        HiCache (arXiv:2508.16984).
    """

    order: int
    scale: float = 0.5

    def __post_init__(self) -> None:
        _check_order(self)
        if not 0 < self.scale <= 1:
            fail(type(self).__name__, "scale", "be in (0, 1]", self.scale)

    def factors(self, stored: Sequence[int], index: int) -> tuple[float, ...]:
        """``s^i H_i(s x) / i!``; see ``Carrier``."""
        point = self.scale * _distance(stored, index)
        values = [1.0, 2 * point]
        for i in range(2, self.order + 1):
            values.append(2 * point * values[i - 1] - 2 * (i - 1) * values[i - 2])
        known = min(len(stored) - 1, self.order)
        return tuple(
            values[i] * self.scale**i / math.factorial(i) if i else 1.0 for i in range(known + 1)
        )


@dataclass(frozen=True)
class Chebyshev:
    """A ridge regression of the last ``1 + order`` values on Chebyshev polynomials of the step.

    With ``T_m`` on ``[0, total - 1]`` mapped to ``[-1, 1]`` and ``P`` their values at the stored
    steps, the weights are ``t(index) (P^T P + ridge I)^{-1} P^T``. More values than ``degree + 1``
    are smoothed. The fit is of the values less the newest one, so that the ridge pulls towards that
    one and not towards zero.

    Source:
        Spectrum (arXiv:2603.01623).
    """

    order: int
    total: int
    degree: int = 2
    ridge: float = 1e-3

    def __post_init__(self) -> None:
        _check_order(self)
        name = type(self).__name__
        if self.total < 2:
            fail(name, "total", "be at least 2", self.total)
        if self.degree < 0:
            fail(name, "degree", "be at least 0", self.degree)
        if not 0 <= self.ridge < math.inf:
            fail(name, "ridge", "be finite and not negative", self.ridge)

    def factors(self, stored: Sequence[int], index: int) -> tuple[float, ...]:
        """The regression's weights as factors of differences; see ``Carrier``."""
        steps = stored[-1 - self.order :]
        _distance(steps, index)
        # more polynomials than values have no unique fit without the ridge
        degree = min(self.degree, len(steps) - 1)
        rows = [self._polynomials(step, degree) for step in steps]
        products = [
            [sum(row[i] * row[j] for row in rows) for j in range(degree + 1)]
            for i in range(degree + 1)
        ]
        for i in range(degree + 1):
            products[i][i] += self.ridge
        solution = _solve(products, self._polynomials(index, degree))
        weights = [sum(a * b for a, b in zip(row, solution, strict=True)) for row in rows]
        return _keep_constants(to_factors(weights, steps))

    def _polynomials(self, step: int, degree: int) -> list[float]:
        point = 2 * step / (self.total - 1) - 1
        values = [1.0, point]
        for _ in range(2, degree + 1):
            values.append(2 * point * values[-1] - values[-2])
        return values[: degree + 1]


def _keep_constants(factors: Sequence[float]) -> tuple[float, ...]:
    """Give the newest value the weight that the differences leave over."""
    return (1.0, *factors[1:])


def to_factors(weights: Sequence[float], stored: Sequence[int]) -> tuple[float, ...]:
    """Turn weights of stored values, oldest first, into factors of the differences kept of them.

    Args:
        weights: one for each stored step.
        stored: as many full steps, ascending; the differences are of all orders below their number.
    """
    # row i of the table has d_i as weights of the values; it is triangular from the newest value on
    table = _difference_table(stored)
    left = list(weights)
    factors = [0.0] * len(stored)
    # d_n alone has a weight at the oldest value, then d_{n-1} alone of those left at the next
    for order in reversed(range(len(stored))):
        oldest = len(stored) - 1 - order
        factors[order] = left[oldest] / table[order][oldest]
        left = [a - factors[order] * b for a, b in zip(left, table[order], strict=True)]
    return tuple(factors)


def to_weights(factors: Sequence[float], stored: Sequence[int]) -> tuple[float, ...]:
    """Turn factors of differences into weights of the stored values, oldest first.

    Args:
        factors: from order 0, at most one for each stored step.
        stored: the full steps, ascending.
    """
    table = _difference_table(stored)
    return tuple(
        sum(factor * row[place] for factor, row in zip(factors, table, strict=False))
        for place in range(len(stored))
    )


def _difference_table(stored: Sequence[int]) -> list[list[float]]:
    """Every difference known at the last stored step, as weights of the stored values."""
    size = len(stored)
    if size < 1 or list(stored) != sorted(set(stored)):
        fail("carrier", "stored", "be ascending steps, at least one", tuple(stored))
    kept: list[list[float]] = []
    for place in range(size):
        new = [[float(other == place) for other in range(size)]]
        for before in kept:
            gap = stored[place] - stored[place - 1]
            new.append([(a - b) / gap for a, b in zip(new[-1], before, strict=True)])
        kept = new
    return kept


def _solve(matrix: Sequence[Sequence[float]], right: Sequence[float]) -> list[float]:
    """Solve a small system by elimination with the largest pivot."""
    rows = [[*row, value] for row, value in zip(matrix, right, strict=True)]
    size = len(rows)
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(rows[row][column]))
        rows[column], rows[pivot] = rows[pivot], rows[column]
        for row in range(size):
            if row != column:
                share = rows[row][column] / rows[column][column]
                rows[row] = [a - share * b for a, b in zip(rows[row], rows[column], strict=True)]
    return [rows[place][-1] / rows[place][place] for place in range(size)]


def _distance(stored: Sequence[int], index: int) -> int:
    if index < stored[-1]:
        fail("carrier", "index", f"be at least {stored[-1]}, the last full step", index)
    return index - stored[-1]


def _check_order(carrier: Carrier) -> None:
    if carrier.order < 0:
        fail(type(carrier).__name__, "order", "be at least 0", carrier.order)


# features that are not recomputed stay as they were stored
REUSE = Taylor(0)

_KINDS: dict[str, type] = {kind.__name__: kind for kind in (Taylor, Newton, Hermite, Chebyshev)}


def describe_carrier(carrier: Carrier) -> dict[str, Any]:
    """The carrier as JSON values, for ``make_carrier``."""
    return {"kind": type(carrier).__name__, **asdict(cast(Any, carrier))}


def make_carrier(described: Mapping[str, Any]) -> Carrier:
    """Make the carrier that ``describe_carrier`` described.

    Raises:
        ValueError: there is no such carrier.
    """
    fields = dict(described)
    kind = _KINDS.get(fields.pop("kind", ""))
    if kind is None:
        fail("make_carrier", "described", f"be of kind {', '.join(_KINDS)}", dict(described))
    carrier: Carrier = kind(**fields)
    return carrier
